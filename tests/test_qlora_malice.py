"""Files that hang, eat memory, lead out of their folder, or are wrong in a way nobody foresaw."""

import json
import os
import struct
import threading
import time
import tracemalloc
from typing import Any

import gguf
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from optax_lowmem.qlora.data.dataset import DataError, load
from optax_lowmem.qlora.files.model_files import MOST_JSON
from optax_lowmem.qlora.loading.weights import open_checkpoint
from optax_lowmem.qlora.run.arguments import parse
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer
from optax_lowmem.qlora.text.templates import Template
from qlora_cases import arguments, main, save_model
from test_llama_files import BASE, directory, write_gguf

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def tokenizer(model):
  return ChatTokenizer.from_model(model)


@pytest.fixture
def folder(tmp_path):
  return directory(tmp_path / "model", load_file(BASE / "model.safetensors"))


@pytest.fixture
def within():
  """The block takes at most 10 seconds, and 200 MB of Python's memory."""

  class Within:
    def __enter__(self):
      tracemalloc.start()
      self.begun = time.monotonic()

    def __exit__(self, *_):
      took, (_, peak) = time.monotonic() - self.begun, tracemalloc.get_traced_memory()
      tracemalloc.stop()
      assert took < 10 and peak < 200e6

  return Within()


def refused(path, *words, error=ValueError):
  with pytest.raises(error) as caught:
    open_checkpoint(path)
  said = str(caught.value)
  assert "\n" not in said and len(said) < 5000
  for word in (str(path), *words):
    assert word in said
  return said


# --- configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [10**4, 10**6, 10**9, 10**30])
def test_layers_that_no_model_has_are_refused_at_once(folder, layers, within):
  for more in ({}, {"model_type": "mistral", "sliding_window": 64, "rope_parameters": None}):
    config = json.loads((folder / "config.json").read_text()) | more
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with within:
      said = refused(folder)
    assert "at most 10,000" in said if layers > 10**4 else "says 10,000 layers" in said


@pytest.mark.parametrize(
  ("changes", "word"),
  [
    ({"vocab_size": 10**12}, "`vocab_size` must be at most 2,147,483,647"),
    ({"rope_theta": 10**400, "rope_parameters": None}, "`rope_theta` must be a positive number"),
    ({"max_window_layers": "many", "model_type": "qwen2", "use_sliding_window": True}, "damaged"),
    ({"model_type": ["llama"]}, "`model_type` is ['llama']"),
    ({"rope_parameters": 7}, "damaged"),
    ({"": 3}, "damaged"),
  ],
)
def test_values_of_another_kind_name_the_file(folder, changes, word):
  config = json.loads((folder / "config.json").read_text()) | changes
  (folder / "config.json").write_text(json.dumps(config))
  refused(folder, "config.json", word)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
  ("content", "word"),
  [
    (b"{", "not valid JSON"),
    (DEEP.encode(), "nested too deeply"),
    (b"[]", "must hold a JSON object"),
    (b"\xff", "not valid UTF-8"),
    (b"[" * (MOST_JSON + 1), f"at most {MOST_JSON:,} are read"),
    (b'{"a": [' + b"[]," * 3_000_000 + b"0]}", "more than 2,097,152 values"),
  ],
)
def test_broken_json_names_the_file(folder, name, content, word, within):
  if "index" in name:
    (folder / "model.safetensors").unlink()
  (folder / name).write_bytes(content)
  with within:
    refused(folder, f"{folder}/{name}", word)


# --- which files are read -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["../", "absolute", "sub/", "..", "", 7])
def test_an_index_names_bare_files_of_its_folder_only(folder, tmp_path, how):
  (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
  (folder / "sub").mkdir()
  os.link(tmp_path / "other.safetensors", folder / "sub" / "other.safetensors")
  names = {"../": "../other.safetensors", "absolute": f"{tmp_path}/other.safetensors"}
  names["sub/"] = "sub/other.safetensors"
  weight_map = dict.fromkeys(load_file(BASE / "model.safetensors"), names.get(how, how))
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  said = refused(folder)
  assert "Only bare names are read" in said or "not there: 7" in said


def test_links_out_of_the_folder_are_not_followed_but_those_of_the_hubs_cache_are(tmp_path, folder):
  kept = tmp_path / "models--x" / "snapshots" / "abc"
  kept.mkdir(parents=True)
  (kept.parent.parent / "blobs").mkdir()
  for name in ("config.json", "model.safetensors"):
    (folder / name).rename(kept.parent.parent / "blobs" / name)
    (kept / name).symlink_to(f"../../blobs/{name}")
  assert open_checkpoint(kept)
  for name in ("config.json", "model.safetensors"):
    (folder / name).symlink_to(kept / name)
  refused(folder, "config.json is a symbolic link to", "copy it there")
  (folder / "loop").symlink_to("loop")
  (folder / "config.json").unlink()
  (folder / "config.json").symlink_to("loop")
  refused(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_a_pipe_does_not_hang(model, tmp_path, name):
  copy = save_model(tmp_path / "model")
  (copy / name).unlink()
  os.mkfifo(copy / name)
  read = ChatTokenizer.from_model if "tokenizer" in name else open_checkpoint
  with pytest.raises(ValueError, match=rf"{copy}/{name} is no regular file"):
    read(copy)
  os.mkfifo(tmp_path / "model.gguf")
  with pytest.raises(ValueError, match=r"model.gguf.*is no regular file"):
    open_checkpoint(tmp_path / "model.gguf")


# --- GGUF -----------------------------------------------------------------------------------------


def text(value):
  return struct.pack("<Q", len(value)) + value


def lone(path, *fields, tensors=b"", count=0):
  start = b"GGUF" + struct.pack("<IQQ", 3, count, len(fields))
  path.write_bytes(start + b"".join(fields) + tensors)
  return path


def array(key, kind, count, content=b""):
  return text(key) + struct.pack("<IIQ", 9, kind, count) + content


BEYOND = {
  "an array of bytes": [array(b"a", 0, 1 << 40)],
  "an array of numbers": [array(b"a", 12, 1 << 62)],
  "an array of texts": [array(b"a", 8, 1 << 34)],
  "a text in an array": [array(b"a", 8, 1, struct.pack("<Q", 1 << 50))],
  "a text": [text(b"a") + struct.pack("<IQ", 8, 1 << 63)],
  "a key": [struct.pack("<Q", 1 << 35)],
  "an array of arrays": [array(b"a", 9, 1 << 30)],
  "an unknown type": [text(b"a") + struct.pack("<I", 77)],
}


@pytest.mark.parametrize("what", BEYOND)
def test_lengths_beyond_the_end_of_a_gguf_file(tmp_path, what, within):
  path = lone(tmp_path / "m.gguf", *BEYOND[what])
  for read, word in ((open_checkpoint, "truncated or not"), (ChatTokenizer.from_model, "GGUF")):
    with within, pytest.raises(ValueError, match=rf"m.gguf.*{word}"):
      read(path)


def test_counts_beyond_the_end_of_a_gguf_file(tmp_path, within):
  path = tmp_path / "m.gguf"
  for counts in ((1 << 60, 0), (0, 1 << 60)):
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts))
    with within:
      refused(path, f"it says that it has {1 << 60:,}")
  dims = text(b"x") + struct.pack("<I", 4) + struct.pack("<4Q", *[1 << 62] * 4)
  lone(path, tensors=dims + struct.pack("<IQ", 0, 0), count=1)
  with within:
    refused(path, "the tensor 'x' ends behind it")
  lone(path, tensors=text(b"x") + struct.pack("<I", 1 << 31) + bytes(20), count=1)
  with within:
    refused(path, "the tensor 'x' has 2147483648 axes")


@pytest.mark.parametrize(
  ("name", "value", "word"),
  [
    ("head_count", 0, "`num_attention_heads` must be a positive integer, got 0"),
    ("head_count_kv", 0, "`num_key_value_heads` must be a positive integer, got 0"),
    ("key_length", 0, "`head_dim` must be a positive integer, got 0"),
    ("block_count", 10**6, "`num_hidden_layers` must be at most 10,000, got 1000000"),
    ("block_count", 9000, "the configuration says 9,000 layers, and there are 21 tensors"),
  ],
)
def test_numbers_in_gguf_metadata(tmp_path, name, value, word, monkeypatch, within):
  real = getattr(gguf.GGUFWriter, f"add_{name}")
  monkeypatch.setattr(gguf.GGUFWriter, f"add_{name}", lambda self, _: real(self, value))
  weights, config = load_file(BASE / "model.safetensors"), open_checkpoint(BASE).config
  write_gguf(tmp_path / "m.gguf", weights, config)
  with within:
    refused(tmp_path / "m.gguf", word)


def test_a_part_of_a_split_gguf_file(tmp_path):
  weights, config = load_file(BASE / "model.safetensors"), open_checkpoint(BASE).config

  def split(writer):
    writer.add_uint16("split.count", 3)
    writer.add_uint16("split.no", 1)

  write_gguf(tmp_path / "m.gguf", weights, config, add=split)
  said = refused(tmp_path / "m.gguf", "it is part 2 of a model in 3 files")
  assert "llama-gguf-split --merge" in said


@pytest.mark.parametrize(
  ("key", "value"), [("tokens", 7), ("merges", ["ab"]), ("token_type", ["x"]), ("tokens", [1, 2])]
)
def test_a_gguf_tokenizer_of_another_kind(tmp_path, key, value):
  writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
  given = {"tokens": ["a", "b", "ab"], "merges": ["a b"], "token_type": [1, 1, 1]} | {key: value}
  writer.add_tokenizer_model("gpt2")
  writer.add_eos_token_id(0)
  for name, each in given.items():
    add: Any = writer.add_array if isinstance(each, list) else writer.add_uint32
    add(f"tokenizer.ggml.{name}", each)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  with pytest.raises(ValueError, match=r"m\.gguf"):
    ChatTokenizer.from_model(tmp_path / "m.gguf")


# --- templates ------------------------------------------------------------------------------------

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ENDLESS = {
  "range": "{{ range(10**9) | list }}",
  "times": "{{ 'a' * 10**9 }}",
  "constant": "{{ 'a' | center(1000000000) }}",
  "format": "{{ '%0999999999d' % 1 }}",
  "powers": "{{ 9 ** (9 ** 9) }}",
  "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
  "doubled": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
  "{% endfor %}{{ n.x }}",
  "much output": "{% for i in range(99999) %}{{ 'a' ~ 'aaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
  "calls itself": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
  "calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
  "{% endmacro %}{{ f(60) }}",
  "deep": "{{ " + "(" * 5000,
}


@pytest.mark.parametrize("what", ENDLESS)
def test_a_template_has_a_limit_of_time_memory_and_output(what, within, monkeypatch):
  monkeypatch.setattr("optax_lowmem.qlora.text.confined.SECONDS", 1.0)
  template = Template("own", ENDLESS[what], origin="model/chat_template.jinja")
  for _ in range(1 if what == "nested loops" else 2):
    with within, pytest.raises(ValueError) as error:
      template.render(TALK, {})
    said = str(error.value)
    assert "model/chat_template.jinja" in said and len(said) < 500 and "\n" not in said
  fine = Template("own", "{{ messages | length }}", origin="model/chat_template.jinja")
  assert fine.render(TALK, {}) == "2"  # the next one finds a process that works


def test_a_limit_holds_in_every_thread(monkeypatch):
  monkeypatch.setattr("optax_lowmem.qlora.text.confined.SECONDS", 1.0)
  found = []

  def run():
    try:
      Template("own", ENDLESS["nested loops"], origin="f").render(TALK, {})
    except ValueError as error:
      found.append(str(error))

  thread = threading.Thread(target=run)
  thread.start()
  thread.join(10)
  assert len(found) == 1 and ("1 seconds" in found[0] or "160 MiB" in found[0])


def test_a_slow_template_does_not_take_its_limit_again_and_again(model, tmp_path, monkeypatch):
  monkeypatch.setattr("optax_lowmem.qlora.text.confined.SECONDS", 1.0)
  copy = save_model(tmp_path / "model")
  # Half a second or so, each time it is run.
  slow = "{% for i in range(3000) %}{% for j in range(2000) %}{% endfor %}{% endfor %}"
  own = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
  (copy / "chat_template.jinja").write_text(f"{slow}{own}")
  begun = time.monotonic()
  tokenizer = ChatTokenizer.from_model(copy)
  for _ in range(9):
    with pytest.raises(ValueError, match="more than 1 seconds"):
      for _ in range(9):
        tokenizer.encode_chat(TALK)
  assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
  ("source", "line", "word"),
  [
    ("\n{{ 1 / 0 }}", 2, "ZeroDivisionError"),
    ("a\nb\n{% for %}", 3, "cannot be read"),
    ("\n\n{{ messages[7].content.x }}", 3, "has no element 7"),
    ("{{ raise_exception('not so') }}", 1, "not so"),
    ("\n{{ messages.append(1) }}", 2, "unsafe"),
  ],
)
def test_an_error_of_a_template_names_file_and_line(model, tmp_path, source, line, word):
  copy = save_model(tmp_path / "model")
  (copy / "chat_template.jinja").write_text(source)
  with pytest.raises(ValueError, match=word) as error:
    ChatTokenizer.from_model(copy).encode_chat(TALK)
  assert f"{copy}/chat_template.jinja" in str(error.value) and f"line {line}" in str(error.value)


@pytest.mark.parametrize(
  ("about", "word"),
  [
    ({"chat_template": 7}, "the chat template is no text"),
    ({"chat_template": [{"name": "default"}]}, "tokenizer_config.json is damaged"),
    ({"chat_template": ["x"]}, "tokenizer_config.json is damaged"),
    ({"chat_template": "a" * 2_000_000}, "at most 1,048,576 are read"),
    ({"added_tokens_decoder": {"x": {"content": "y"}}}, "tokenizer_config.json"),
    ({"added_tokens_decoder": []}, "tokenizer_config.json is damaged"),
    ({"eos_token": 7}, "`eos_token` is 7, which is no text"),
    ({"additional_special_tokens": 3}, "tokenizer_config.json is damaged"),
  ],
)
def test_a_tokenizers_files_are_named(tmp_path, about, word):
  copy = save_model(tmp_path / "model")
  (copy / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"} | about))
  with pytest.raises(ValueError, match=word) as error:
    ChatTokenizer.from_model(copy)
  assert str(copy) in str(error.value)
  for content in ("{", DEEP, "[]"):
    (copy / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=f"{copy}/tokenizer_config.json"):
      ChatTokenizer.from_model(copy)


def test_an_expression_of_a_tokenizer_that_gives_up_is_a_sentence(tmp_path):
  copy = save_model(tmp_path / "model")
  content = json.loads((copy / "tokenizer.json").read_text())
  split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
  content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split]}
  (copy / "tokenizer.json").write_text(json.dumps(content))
  tokenizer = ChatTokenizer.from_model(copy)
  file = rows(tmp_path / "rows.jsonl", GOOD, {"text": "a" * 60 + "c"})
  with pytest.raises(DataError, match=r"rows.jsonl, line 2: the model's tokenizer.json cannot be"):
    load(file, tokenizer, 32)


# --- settings -------------------------------------------------------------------------------------


def laughs(levels=30):
  lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, levels)]
  return "\n".join([*lines, f"targets: *a{levels - 1}"])


@pytest.mark.parametrize(
  ("content", "word"),
  [
    (laughs(), "more than 10,000 values"),
    ("a: &a {k: 1}\n" + "\n".join(f"b{i}: {{<<: [*a, *a]}}" for i in range(3000)), "values"),
    ("&a [*a]", "more than 10,000 values"),
    ("targets: " + DEEP[:30_000], "nested too deeply"),
    ("- " * 30_000, "nested too deeply"),
    ("? " * 30_000, "nested too deeply"),
    ("a: " * 200_000, "at most 65,536 are read"),
    ("rank: \udcff", "is not YAML"),
    ("? [a, b]\n: c", "is not YAML"),
    ("rank: !!python/object:os.system x", "is not YAML"),
    ("rank: 4\nsteps: 2024-99-99", "line 2: month must be in"),
    ("rank: 4\nrank: 5", "line 2: 'rank' is there twice"),
    ("rank: 100000000", "--rank must be at most 65,536, got 100000000"),
    ("rank_pattern: {q_proj: 100000000}", "--rank-pattern 'q_proj' must be from 1 to 65,536"),
    ("batch_size: 100000000000", "--batch-size must be at most"),
    ("lr: .inf", "--lr must be"),
  ],
)
def test_yaml_that_is_larger_than_it_looks(tmp_path, content, word, within):
  file = tmp_path / "run.yaml"
  file.write_bytes(content.encode("utf-8", "surrogateescape"))
  with within, pytest.raises(ValueError, match=word) as error:
    parse("", ["--config", str(file)])
  assert len(str(error.value)) < 1000
  assert str(file) in str(error.value) or "--" in str(error.value)


def test_merge_keys_are_still_read(tmp_path):
  file = tmp_path / "run.yaml"
  file.write_text("<<: &a {rank: 4}\nalpha: 8\n")
  assert yaml.safe_load(file.read_text()) == {"rank": 4, "alpha": 8}
  assert parse("", ["--config", str(file)]).rank == 4


def test_patterns_of_settings_have_a_limit_too(tmp_path, capsys, files, monkeypatch):
  monkeypatch.setattr("optax_lowmem.qlora.text.confined.SECONDS", 1.0)
  for option in ("--targets", "--rank-pattern"):
    bad = r"(.*.*)*x" + ("=8" if "pattern" in option else "")
    begun = time.monotonic()
    with pytest.raises(SystemExit):
      main(arguments(files, tmp_path / "out", option, bad))
    said = capsys.readouterr().err
    assert f"{option} " in said and "more than 1 seconds" in said
    assert time.monotonic() - begun < 12
  with pytest.raises(SystemExit):
    main(arguments(files, tmp_path / "out", "--rank", "1000"))
  assert "--rank must be at most 128 for this model, got 1,000" in capsys.readouterr().err


# --- rows -----------------------------------------------------------------------------------------


def rows(path, *lines):
  path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
  return path


GOOD = {"prompt": "the cat", "completion": " sat"}
SAT = {"role": "assistant", "content": "sat"}
BAD_ROWS = [
  {"messages": [{"role": {}, "content": "a"}]},
  {"messages": [{"role": "user", "content": {}}]},
  {"messages": [{"role": "user", "content": "a"}, SAT | {"tool_calls": 5}]},
  {"messages": [{"role": "user", "content": "a"}, SAT | {"tool_calls": ["x"]}]},
  {"messages": [{"role": "user", "content": "a"}, SAT | {"tool_calls": [{"function": 5}]}]},
  {"messages": [{"role": "user", "content": "a"}, SAT | {"reasoning_content": [1]}]},
  {"messages": [{"role": "user", "content": "a"}, SAT], "tools": [{"name": "\ud800"}]},
  {"messages": {}},
  {"conversations": [{"from": [], "value": "a"}]},
  {"instruction": [], "output": "a"},
  {"prompt": {}, "completion": "a"},
  {"text": None},
  {"messages": TALK, "tools": DEEP},
  '{"text": ' + DEEP,
  DEEP,
  '{"text": ' + "9" * 5000 + "}",
  '{"text": "a", "x": [' + "[]," * 1_100_000 + "0]}",
]


@pytest.mark.parametrize("number", range(len(BAD_ROWS)))
def test_bad_rows_name_file_and_line(tmp_path, tokenizer, number, within):
  bad = BAD_ROWS[number]
  file = rows(tmp_path / "rows.jsonl", GOOD, GOOD, bad, GOOD)
  with within, pytest.raises(DataError) as error:
    load(file, tokenizer, 32)
  assert f"{file}, line 3" in str(error.value) and len(str(error.value)) < 1000
  if number == len(BAD_ROWS) - 1:
    return  # in a list the end of a row is not known before it is read
  listed = [line if isinstance(line, str) else json.dumps(line) for line in (GOOD, bad)]
  file.write_text(f"[{', '.join(listed)}]")
  with pytest.raises(DataError) as error:
    load(file, tokenizer, 32)
  assert f"{file}, row 2" in str(error.value)


def test_a_small_parquet_file_of_endless_rows_is_refused(tmp_path, tokenizer, monkeypatch):
  pa = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  texts = pa.array(["the cat sat on the mat " * 40]).take(pa.array([0] * 20_000))
  parquet.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet")
  size = (tmp_path / "rows.parquet").stat().st_size
  monkeypatch.setattr("optax_lowmem.qlora.files.tables._LARGEST", 1 << 20)
  assert size < 20_000
  with pytest.raises(DataError, match="unpacked, its rows are more than") as error:
    load(tmp_path / "rows.parquet", tokenizer, 32)
  assert str(tmp_path / "rows.parquet") in str(error.value)


def test_a_long_answer_is_found_in_time(tmp_path, tokenizer, within):
  talk = {"messages": [{"role": "user", "content": "a"}, SAT | {"content": "x" * 150_000}]}
  with within:
    load(rows(tmp_path / "rows.jsonl", GOOD, talk), tokenizer, 32)


@pytest.mark.parametrize("key", ["text", "completion"])
def test_a_row_of_20_mb_is_cut_before_it_is_encoded(tmp_path, tokenizer, key):
  long = "the cat sat on the mat\n" * 870_000
  more = {"prompt": "the cat"} if key == "completion" else {}
  short = rows(tmp_path / "short.jsonl", GOOD, {key: long[:1000], **more})
  file = rows(tmp_path / "rows.jsonl", GOOD, {key: long, **more})
  begun = time.monotonic()
  got, want = load(file, tokenizer, 32), load(short, tokenizer, 32)
  assert time.monotonic() - begun < 10
  assert [row.ids.tolist() for row in got.rows] == [row.ids.tolist() for row in want.rows]
  assert [row.learned.tolist() for row in got.rows] == [row.learned.tolist() for row in want.rows]


def test_a_long_text_in_blocks_is_the_same_text(tokenizer, monkeypatch):
  prompt, completion = "the cat sat on the mat\n" * 50, " the dog ran\n" * 70
  want = tokenizer.encode_completion(prompt, completion)
  monkeypatch.setattr("optax_lowmem.qlora.text.chat_tokenizer.BLOCK", 100)
  assert tokenizer.encode_completion(prompt, completion) == want
  ids, learned = tokenizer.encode_completion(prompt, completion, 120)
  assert 120 < len(ids) < 250 and (ids, learned) == (want[0][: len(ids)], want[1][: len(ids)])


def test_a_conversation_of_20_mb_is_refused_with_its_limit(tmp_path, tokenizer, within):
  talk = {"messages": [{"role": "user", "content": "the cat " * 2_500_000}, SAT]}
  file = rows(tmp_path / "rows.jsonl", GOOD, talk)
  with within, pytest.raises(DataError, match="at most 524,288 are encoded as one") as error:
    load(file, tokenizer, 32)
  assert f"{file}, line 2" in str(error.value)


# --- safetensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "raw",
  [
    b"",
    struct.pack("<Q", 1 << 62),
    struct.pack("<Q", 100) + b"{" * 100,
    struct.pack("<Q", 100_000) + DEEP.encode(),
    struct.pack("<Q", 60) + b'{"x":{"dtype":"F32","shape":[99999999,9],"data_offsets":[0,4]}}'[:60],
  ],
)
def test_headers_of_safetensors(folder, raw, within):
  (folder / "model.safetensors").write_bytes(raw)
  with within:
    refused(folder, "truncated or not a safetensors file")


def test_a_million_names_do_not_make_an_error_slow(folder, within):
  weights = load_file(folder / "model.safetensors")
  del weights["model.norm.weight"]
  weights |= {f"model.norm.weigh{i}": np.zeros(1, "f4") for i in range(50_000)}
  save_file(weights, folder / "model.safetensors")
  with within:
    refused(folder, "missing 1 tensor: model.norm.weight")
