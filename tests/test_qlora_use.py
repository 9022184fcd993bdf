"""What a run has trained is used: talked to, and merged into one model."""

import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import optax_lowmem as lowmem
from optax_lowmem import nn as lowmem_nn
from optax_lowmem.qlora.commands.chat import Speaker
from optax_lowmem.qlora.kinds.model_folder import template_of, write_companions
from optax_lowmem.qlora.loading.llama import load_llama
from optax_lowmem.qlora.loading.weights import open_checkpoint
from optax_lowmem.qlora.models.generation import Generator
from optax_lowmem.qlora.run.finished import of_run
from optax_lowmem.qlora.run.recipe import trained_model
from optax_lowmem.qlora.run.runs import began
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer
from qlora_cases import SCRIPT, arguments, main, same, save_model, save_rows
from test_llama_files import write_gguf


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("qlora")
  save_model(folder / "model", tied=False)
  save_rows(folder / "rows.json")
  options = "--lr 3e-2 --targets all-linear --eval-every 4 --warmup 0 --schedule constant".split()
  assert main(arguments(folder, folder / "run", *options)) == 0
  return folder / "run"


def refused(argv, capsys):
  with pytest.raises(SystemExit) as exit:
    main(argv)
  assert exit.value.code == 2
  return capsys.readouterr().err


def test_tokens_one_by_one_are_those_of_the_generator(run):
  s, path, adapter = of_run(run)
  model = trained_model(path, s, adapter)
  tokenizer = ChatTokenizer.from_model(path)
  prompt = tokenizer.encode_prompt([{"role": "user", "content": "say 7"}])
  graph, *variables = nnx.split(model, ...)
  want = Generator(graph, tokenizer.stop_ids, 20)(variables, [np.array(prompt)])[0]
  speaker = Speaker(model, tokenizer.stop_ids, 20, temperature=0.0)
  assert list(speaker(prompt)) == want.tolist() and len(want) > 2


def test_chat_reads_lines_and_remembers(run):
  lines = "say 7\n\nsay 8\n/clear\nsay 7\nsay 8 <|im_end|>\n"
  root = str(Path(lowmem.__file__).parents[1])
  options = "--temperature 0 --max-tokens 24 --best".split()
  done = subprocess.run(
    [sys.executable, SCRIPT, "chat", str(run), *options],
    input=lines,
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": root},
  )
  assert done.returncode == 0, done.stderr
  s, path, adapter = of_run(run, best=True)
  model, tokenizer = trained_model(path, s, adapter), ChatTokenizer.from_model(path)
  speaker, messages, want = Speaker(model, tokenizer.stop_ids, 24, 0.0), [], []
  for question in ("say 7", "say 8"):
    messages.append({"role": "user", "content": question})
    answer = tokenizer.decode(speaker(tokenizer.encode_prompt(messages)))
    messages.append({"role": "assistant", "content": answer})
    want.append(answer)
  written = done.stdout
  assert written.startswith(f"{want[0]}\n{want[1]}\n{want[0]}\n")
  assert "contains the control token '<|im_end|>'" in written


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_model_is_base_and_adapter(run, tmp_path, dtype, capsys):
  out = tmp_path / "merged"
  argv = ["merge", str(run), "--out", str(out), "--dtype", dtype]
  assert main(argv) == 0
  assert "merged model" in capsys.readouterr().out
  ids = jnp.arange(24).reshape(2, 12) * 7 % 270
  _, path, adapter = of_run(run)
  want = lowmem_nn.load_peft(load_llama(path), adapter)(ids)
  assert float(abs(want - load_llama(path)(ids)).max()) > 0.1  # the adapter does something
  got = load_llama(out)(ids)
  tolerance = 1e-4 if dtype == "float32" else 0.05
  np.testing.assert_allclose(got, want, atol=tolerance * float(abs(want).max()))
  assert ChatTokenizer.from_model(out).encode("the cat") == (
    ChatTokenizer.from_model(path).encode("the cat")
  )
  if dtype == "float32":
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
      logits = theirs(torch.tensor(np.asarray(ids))).logits.numpy()
    np.testing.assert_allclose(logits, want, atol=1e-4 * float(abs(want).max()))
  assert "is not empty" in refused(argv, capsys)


def test_merged_model_of_a_gguf_file_is_that_of_its_directory(run, tmp_path):
  s, path, _ = of_run(run)
  backend = ChatTokenizer.from_model(path).backend

  def tokenizer(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([backend.id_to_token(i) for i in range(backend.get_vocab_size())])
    merges = json.loads(backend.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)

  config, weights = open_checkpoint(path).config, load_file(path / "model.safetensors")
  lone = tmp_path / "model.gguf"
  write_gguf(lone, weights, config, add=tokenizer)
  shutil.copytree(run / "last", tmp_path / "run" / "last")
  settings = dataclasses.asdict(s) | {"model": str(lone)}
  (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": settings}))
  outs = [tmp_path / "of_file", tmp_path / "of_directory"]
  for folder, out in zip((tmp_path / "run", run), outs, strict=True):
    assert main(["merge", str(folder), "--out", str(out)]) == 0
  files = [load_file(out / "model.safetensors") for out in outs]
  assert files[0].keys() == files[1].keys() == weights.keys()
  assert all(files[0][name].tobytes() == files[1][name].tobytes() for name in weights)
  stored = json.loads((outs[0] / "config.json").read_text())
  assert stored["torch_dtype"] == "bfloat16" and stored["eos_token_id"] == 2
  assert np.isclose(open_checkpoint(outs[0]).config.rms_norm_eps, config.rms_norm_eps)
  assert ChatTokenizer.from_model(outs[0]).encode("the cat 12") == (
    ChatTokenizer.from_model(lone).encode("the cat 12")
  )


OWN = (
  "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + "
  "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("template", [OWN, ""], ids=["own", "known"])
def test_what_lies_beside_merged_weights_says_what_the_run_had(tmp_path, template, add_bos):
  path = tmp_path / "model.gguf"
  backend = ChatTokenizer.from_model(save_model(tmp_path / "model")).backend
  backend.add_special_tokens(["<s>"])
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("gpt-2")
  tokens = [token for i in range(backend.get_vocab_size()) if (token := backend.id_to_token(i))]
  assert len(tokens) == backend.get_vocab_size()
  writer.add_token_list(tokens)
  writer.add_token_types([3 if token[0] == "<" and token[2:] else 1 for token in tokens])
  merges = json.loads(backend.to_str())["model"]["merges"]
  writer.add_token_merges([" ".join(pair) for pair in merges])
  writer.add_bos_token_id(tokens.index("<s>"))
  writer.add_eos_token_id(0)  # answers are ended by another one
  writer.add_add_bos_token(add_bos)
  if template:
    writer.add_chat_template(template)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()

  lone, folder = ChatTokenizer.from_model(path), tmp_path / "merged"
  folder.mkdir()
  write_companions(folder, {"model_type": "llama"}, lone)
  config = json.loads((folder / "config.json").read_text())
  assert config["bos_token_id"] == tokens.index("<s>") and config["eos_token_id"] == [0, 2]
  again = ChatTokenizer.from_model(folder)
  talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
  assert again.encode_chat(talk) == lone.encode_chat(talk)
  assert again.encode_completion("the", " cat") == lone.encode_completion("the", " cat")
  assert set(again.stop_ids) == set(lone.stop_ids) == {0, 2}
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  prompt = theirs.apply_chat_template(talk[:1], add_generation_prompt=True, tokenize=False)
  assert theirs.encode(prompt, add_special_tokens=False) == lone.encode_prompt(talk[:1])
  assert theirs.bos_token_id == config["bos_token_id"]
  assert theirs.encode("the cat") == lone.encode_completion("the cat", "")[0][:-1]


def save_adapter(model, run):
  """An adapter that is still zero."""
  adapted = lowmem_nn.add_lora(load_llama(model), 2, 4, "q_proj", rngs=nnx.Rngs(0))
  lowmem_nn.save_peft(adapted, run / "last")


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_merged_directory_has_the_template_of_the_run(tmp_path, place):
  model, run = save_model(tmp_path / "model", tied=False), tmp_path / "run"
  about = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
  if place == "chat_template.jinja":
    (model / place).write_text(OWN)
  else:
    about |= {"chat_template": OWN}
  (model / "tokenizer_config.json").write_text(json.dumps(about))
  save_adapter(model, run)
  talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
  for name in ("auto", "plain"):
    settings = {"settings": {"model": str(model), "chat_template": name}}
    (run / "run.json").write_text(json.dumps(settings))
    assert main(["merge", str(run), "--out", str(tmp_path / name)]) == 0
    of_it, want = ChatTokenizer.from_model(tmp_path / name), ChatTokenizer.from_model(model, name)
    assert of_it.encode_chat(talk) == want.encode_chat(talk)
    assert set(of_it.stop_ids) == set(want.stop_ids)


@pytest.mark.parametrize("ends", [None, 0, [0, 5]])
def test_what_was_merged_from_a_directory_stops(tmp_path, ends):
  """A base that knows neither template nor end of what it was trained with."""
  model, run = save_model(tmp_path / "model", tied=False), tmp_path / "run"
  (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
  if ends is not None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    generation = {"eos_token_id": ends, "top_p": 0.9}
    (model / "generation_config.json").write_text(json.dumps(generation))
  save_adapter(model, run)
  settings = {"settings": {"model": str(model), "chat_template": "auto"}}
  (run / "run.json").write_text(json.dumps(settings))
  assert main(["merge", str(run), "--out", str(tmp_path / "out")]) == 0
  used, merged = (ChatTokenizer.from_model(tmp_path / name) for name in ("model", "out"))
  stops = {0, 2} | {*(ends if isinstance(ends, list) else ())}  # 2 is <|im_end|>, ChatML's
  assert set(used.stop_ids) == set(merged.stop_ids) == stops
  files = ["config.json"] if ends is None else ["config.json", "generation_config.json"]
  for name in files:
    about = json.loads((tmp_path / "out" / name).read_text())
    assert set(about["eos_token_id"]) >= {0, 2}
    if name == "generation_config.json":
      assert set(about["eos_token_id"]) == stops and about["top_p"] == 0.9
  assert (tmp_path / "out" / "chat_template.jinja").read_text() == template_of(used)
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  known = theirs.generation_config.eos_token_id
  assert {0, 2} <= {*([known] if isinstance(known, int) else known)}


def test_a_base_model_that_has_moved_is_named(tmp_path, capsys):
  moved = save_model(tmp_path / "moved", tied=False)
  save_adapter(moved, tmp_path / "run")
  settings = {"settings": {"model": str(tmp_path / "model")}}
  (tmp_path / "run" / "run.json").write_text(json.dumps(settings))
  merge = ["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]
  for argv in (merge, ["chat", str(tmp_path / "run")]):
    said = refused(argv, capsys)
    assert f"no model at {tmp_path / 'model'}" in said and "name it with --model" in said
    assert f"no model at {tmp_path}/else" in refused([*argv, "--model", f"{tmp_path}/else"], capsys)
  assert main([*merge, "--model", str(moved), "--dtype", "float32"]) == 0
  merged = load_file(tmp_path / "merged" / "model.safetensors")
  assert same(merged, load_file(moved / "model.safetensors"))
  assert of_run(tmp_path / "run", model=moved)[1] == moved


def test_the_day_of_a_run_is_that_of_its_conversations(tmp_path):
  record = {"settings": {}, "data_sha256": ""}
  for more, day in (({}, None), ({"today": "2024-02-29"}, datetime.date(2024, 2, 29))):
    (tmp_path / "run.json").write_text(json.dumps(record | more))
    assert began(tmp_path) == day
  (tmp_path / "run.json").write_text(json.dumps(record | {"today": "Friday"}))
  with pytest.raises(ValueError, match=r"run.json is damaged .*'Friday'"):
    began(tmp_path)


def test_bad_arguments(run, tmp_path, capsys):
  assert "no run in that folder" in refused(["chat", str(tmp_path)], capsys)
  assert "--top-p must be above 0" in refused(["chat", str(run), "--top-p", "0"], capsys)
  assert "--max-tokens must be" in refused(["chat", str(run), "--max-tokens", "0"], capsys)
  (tmp_path / "run.json").write_text(json.dumps({"settings": {"model": str(run.parent / "model")}}))
  merge = ["merge", str(tmp_path), "--out", str(tmp_path / "m"), "--best"]
  assert "There is no best/" in refused(merge, capsys)
