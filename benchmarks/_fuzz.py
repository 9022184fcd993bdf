"""The worker of `reliability.py`: reads one damaged file after another, and says what became of it.

It is given cases as lines of JSON and answers each with a line: what the reader did, in how many
seconds, and by how much the most memory it ever had grew. Whoever starts it stops it when a case
takes too long.
"""

from __future__ import annotations

import json
import pathlib
import random
import shutil
import struct
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

ODD = [None, True, 0, -1, 10**9, 10**18, 10**400, 1e308, "", "x", "(a+)+$", [], {}, [[]], {"a": {}}]
ODD += ["../../etc/passwd", "/etc/passwd", "\0", "é" * 9, [1] * 1000, {"a": "b" * 1000}]
NUMBERS = [0, 1, 7, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, 1 << 62, (1 << 64) - 1]
PIECES = [
  "{{ range(10**9) }}", "{{ 'a' * 10**9 }}", "{{ 9 ** (9 ** 9) }}", "{{ 1 / 0 }}", "{{ 5 % 0 }}",
  "{% for i in range(99999) %}{% for j in range(99999) %}", "{% endfor %}", "{% endfor %}",
  "{% for i in range(999) %}{% for j in range(999) %}.{% endfor %}{% endfor %}",
  "{% for m in messages %}", "{{ messages[0].content }}", "{{ messages|tojson }}", "plain",
  "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{{ 'a'|center(999999999) }}",
  "{% macro g(n) %}{% if n %}{{ g(n-1) }}{{ g(n-1) }}{% endif %}{% endmacro %}{{ g(50) }}",
  "{% set n = namespace(x='aaaa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
  "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}",
  "{{ n.x }}", "{{ '%09999999d' % 1 }}", "{{ '{:>999999999}'.format(1) }}", "{{ [0] * 99999999 }}",
  "{{ m.role + '\\n' + m.content + '<|im_end|>' }}", "{{ m.content * 99999999 }}", "{{ (", ")) }}",
  "{% if x %}", "{% else %}", "{% endif %}", "{% raw %}", "{{ loop.index }}", "{{ cycler() }}",
  "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ lipsum(99999) }}",
  "{% generation %}", "{% endgeneration %}", "{{ raise_exception('no') }}", "{% include 'x' %}",
  "{{ 'a b'|urlize|wordwrap(1)|indent(9999) }}", "{% import 'x' as y %}",
  "{{ messages|map(attribute='content')|join(', ') }}",
]  # fmt: skip
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
CHATML += "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def mutated_bytes(raw: bytes, rng: random.Random) -> bytes:
  """A file with some of its bytes flipped, cut off, repeated, or made to say large numbers."""
  data = bytearray(raw)
  early = lambda: int(len(data) * rng.random() ** rng.choice([1, 3, 6]))  # noqa: E731
  for _ in range(rng.choice([1, 1, 2, 5, 20])):
    at = min(early(), max(0, len(data) - 1))
    match rng.randrange(6):
      case 0:
        data[at : at + 1] = bytes([rng.randrange(256)])
      case 1:
        data[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))
      case 2:
        data[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
      case 3:
        del data[at : at + rng.choice([1, 8, 1000, len(data)])]
      case 4:
        data[at:at] = data[at : at + rng.choice([1, 8, 100])] * rng.choice([1, 3, 50])
      case 5:
        data[at:at] = rng.choice([b"\0", b"\xff", b"[" * 5000, b"{" * 5000, b'"', b"-", b"\n"])
  return bytes(data)


def mutated_json(value, rng: random.Random):
  """A JSON value with one of its parts replaced by an odd one."""
  if isinstance(value, (dict, list)) and value and rng.random() < 0.75:
    copy = value.copy()
    key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    copy[key] = mutated_json(copy[key], rng)
    if isinstance(copy, dict) and rng.random() < 0.1:
      del copy[key]
    return copy
  if rng.random() < 0.1:
    deep: list = []
    for _ in range(rng.choice([50, 300])):
      deep = [deep]
    return deep
  if rng.random() < 0.1:
    return rng.choice(["(.*)*x", "(a|aa)+$", "a{1,65535}{1,65535}", "x" * 100_000])
  return rng.choice(ODD)


def mutated_text(raw: bytes, rng: random.Random, lines: bool = False) -> bytes:
  """Broken JSON, or whole JSON (in each line) that says something odd."""
  if rng.random() < 0.4:
    return mutated_bytes(raw, rng)
  parts = raw.decode().split("\n") if lines else [raw.decode()]
  at = rng.randrange(len(parts))
  whole = json.loads(parts[at])
  for _ in range(rng.choice([1, 1, 2, 4])):
    whole = mutated_json(whole, rng)
  parts[at] = json.dumps(whole)
  return "\n".join(parts).encode()


def laughs(rng: random.Random) -> bytes:
  """YAML of aliases, depths, odd values and settings that no run can have."""
  many, deep = rng.choice([2, 9]), rng.choice([5, 30, 2000])
  lines = ["a0: &a0 [x, y]"]
  lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * many)}]" for i in range(1, min(deep, 40))]
  name = rng.choice(["rank", "targets", "rank_pattern", "steps", "modules_to_save", "lr", "seed"])
  last = f"*a{len(lines) - 1}" if rng.random() < 0.5 else json.dumps(mutated_json({}, rng))
  kinds = ["\n".join([*lines, f"{name}: {last}"]), f"{name}: {'[' * deep}", f"{name}: {last}"]
  kinds += [f"{'- ' * deep}x", f"&a {{{name}: *a}}", f"{name}: 4\n{name}: 5", f"? {'{' * deep}"]
  return rng.choice(kinds).encode()


def template(rng: random.Random) -> bytes:
  if rng.random() < 0.25:
    return mutated_bytes(CHATML.encode(), rng)
  return "".join(rng.choice(PIECES) for _ in range(rng.choice([1, 2, 3, 6, 12]))).encode()


def write_sources(folder: pathlib.Path) -> None:
  """What is damaged: a model, its GGUF file, an adapter, rows, settings, and a run's record."""
  from safetensors.numpy import load_file

  from conftest import GOLDEN
  from optax_lowmem.qlora.loading.config_files import config_from_hf
  from qlora_cases import save_model, save_rows
  from test_llama_files import write_gguf

  save_model(folder / "model", tied=False)
  (folder / "model" / "chat_template.jinja").write_text(CHATML)
  config = config_from_hf(json.loads((folder / "model" / "config.json").read_text()))
  vocabulary = json.loads((folder / "model" / "tokenizer.json").read_text())["model"]

  def tokenizer(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(vocabulary["vocab"]))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_eos_token_id(2)

  weights = load_file(folder / "model" / "model.safetensors")
  write_gguf(folder / "model.gguf", weights, config, add=tokenizer)
  shutil.copytree(GOLDEN / "peft", folder / "peft")
  rows = json.loads(save_rows(folder / "rows.json", 9).read_text())
  rows += [{"messages": [{"role": r, "content": "the cat"} for r in ("user", "assistant")]}] * 3
  rows += [{"text": "the cat"}, {"prompt": "the", "completion": " cat", "tools": []}]
  (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
  index = {"weight_map": dict.fromkeys(weights, "part.safetensors")}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  (folder / "run.json").write_text(json.dumps({"settings": {"rank": 4, "targets": "q_proj"}}))


def make(case: dict, source: pathlib.Path, work: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes the damaged file of a case; gives it, and what is to be opened."""
  rng, kind = random.Random(f"{case['seed']} {case['kind']} {case['number']}"), case["kind"]
  if kind == "GGUF":
    file = work / "model.gguf"
    file.write_bytes(mutated_bytes((source / "model.gguf").read_bytes(), rng))
    return file, file
  if kind in ("rows", "YAML", "run.json"):
    names = {"rows": "rows.jsonl", "YAML": "run.yaml", "run.json": "run.json"}
    file = work / names[kind]
    if kind == "YAML":
      file.write_bytes(laughs(rng))
    else:
      raw = (source / file.name).read_bytes()
      file.write_bytes(mutated_text(raw, rng, lines=kind == "rows"))
    return file, work if kind == "run.json" else file
  if kind == "adapters":
    folder = pathlib.Path(shutil.copytree(source / "peft" / "lora", work / "adapter"))
    file = folder / rng.choice(["adapter_config.json"] * 3 + ["adapter_model.safetensors"])
    change = mutated_text if file.suffix == ".json" else mutated_bytes
    file.write_bytes(change(file.read_bytes(), rng))
    return file, folder
  folder = pathlib.Path(shutil.copytree(source / "model", work / "model"))
  if kind == "templates":
    file = folder / "chat_template.jinja"
    file.write_bytes(template(rng))
  elif kind == "safetensors":
    file = folder / "model.safetensors"
    file.write_bytes(mutated_bytes(file.read_bytes(), rng))
  else:
    names = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    file = folder / rng.choice([*names, "model.safetensors.index.json"])
    if "index" in file.name:
      (folder / "model.safetensors").rename(folder / "part.safetensors")
      shutil.copy(source / file.name, file)
    file.write_bytes(mutated_text(file.read_bytes(), rng))
  return file, folder


def read(kind: str, path: pathlib.Path, source: pathlib.Path, work: pathlib.Path) -> None:
  """Does with a file what the script does with it."""
  import numpy as np

  from optax_lowmem import nn
  from optax_lowmem.qlora.data.dataset import load
  from optax_lowmem.qlora.loading.weights import open_checkpoint
  from optax_lowmem.qlora.run.arguments import of_record, parse
  from optax_lowmem.qlora.run.runs import read_run
  from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer

  if kind == "YAML":
    parse("", ["--config", str(path)])
  elif kind == "run.json":
    of_record(read_run(path)["settings"], path / "run.json")
  elif kind == "rows":
    load(path, ChatTokenizer.from_model(source / "model"), 32)
  elif kind == "adapters":
    nn.merge_peft(source / "peft" / "base", path, work / "merged")
  else:
    if kind != "templates":
      checkpoint = open_checkpoint(path)
      for name in checkpoint.shapes:
        np.isfinite(checkpoint.read(name)).all()
    tokenizer = ChatTokenizer.from_model(path)
    tokenizer.encode_chat([{"role": r, "content": "the cat"} for r in ("user", "assistant")])


def peak() -> int:
  """The most bytes this process has held since `forget`."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  own = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
  return own * 1024


def forget() -> None:
  pathlib.Path("/proc/self/clear_refs").write_text("5")


def result(case: dict, source: pathlib.Path) -> dict:
  """What became of a case."""
  with tempfile.TemporaryDirectory() as scratch:
    work = pathlib.Path(scratch)
    file, opened = make(case, source, work)
    size = file.stat().st_size
    forget()
    before, begun = peak(), time.monotonic()
    try:
      read(case["kind"], opened, source, work)
      what, said = "read", ""
    except (ValueError, OSError) as error:
      said = str(error)
      flag = said.startswith("--") and case["kind"] == "YAML"
      good = (scratch in said or flag) and "\n" not in said and len(said) < 5000
      what = "refused" if good else "unnamed"
    except Exception as error:
      what, said = "wrong kind", f"{type(error).__name__}: {error}"
    seconds, memory = time.monotonic() - begun, peak() - before
    return {"what": what, "said": said[:300], "size": size, "seconds": seconds, "memory": memory}


def main() -> None:
  source = pathlib.Path(sys.argv[1])
  out = sys.stdout
  sys.stdout = sys.stderr
  for kind, name in (("rows", "rows.jsonl"), ("GGUF", "model.gguf"), ("adapters", "peft/lora")):
    with tempfile.TemporaryDirectory() as scratch:  # what is imported for it is not of the file
      read(kind, source / name, source, pathlib.Path(scratch))
  for line in sys.stdin:
    out.write(json.dumps(result(json.loads(line), source)) + "\n")
    out.flush()


if __name__ == "__main__":
  main()
