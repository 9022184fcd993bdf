"""Adapters and models that somebody made to harm: endless patterns, paths, pipes, huge ranks."""

import json
import os
import shutil
import threading
import time
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from optax_lowmem import nn
from optax_lowmem._peft import foreign_patterns as _foreign_patterns
from optax_lowmem._peft.foreign_patterns import check_pattern
from test_nn_peft import BASE, CONFIG, GOLDEN, PREFIX, WEIGHTS, edit, read, snapshot, tiny_llama

ENDLESS = ["(.*)*x", "(a|a)*(.+)+$x", "(?:[a-z0-9]+[._]?)+!", "((((.*)*)*)*)*y", "(.*.*)(.*.*)*!"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
  monkeypatch.setattr(_foreign_patterns, "SECONDS", 1.0)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
@pytest.mark.parametrize("pattern", ENDLESS[:2])
def test_a_pattern_that_backtracks_for_ever_is_refused(tmp_path, key, pattern):
  value = {pattern: 4} if key == "rank_pattern" else pattern
  folder, model = edit(tmp_path, **{key: value}), tiny_llama(True)
  before, begun = snapshot(model), time.monotonic()
  with pytest.raises(ValueError, match="takes more than 1 seconds") as error:
    nn.load_peft(model, folder)
  assert time.monotonic() - begun < 10 and snapshot(model) == before
  said = str(error.value)
  assert f"{folder}/{CONFIG}" in said and key in said and "List the names" in said
  begun = time.monotonic()
  with pytest.raises(ValueError, match=CONFIG):
    nn.merge_peft(GOLDEN / "base", folder, tmp_path / "merged")
  assert time.monotonic() - begun < 10 and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("pattern", ENDLESS)
def test_the_limit_holds_in_every_thread(pattern):
  found = []
  names = ["model.layers.0.self_attn.q_proj_with_a_rather_long_name"]

  def run():
    try:
      check_pattern("f", pattern, names)
    except ValueError as error:
      found.append(str(error))

  thread, begun = threading.Thread(target=run), time.monotonic()
  thread.start()
  thread.join(10)
  assert found and time.monotonic() - begun < 10


@pytest.mark.parametrize(
  ("pattern", "word"),
  [
    ("(", "is no regular expression"),
    ("a**", "is no regular expression"),
    (7, "must hold texts"),
    ("a" * 20_000, "at most 10,000 are read"),
    ("(" * 4000 + ")" * 4000, "is no regular expression|cannot be matched|takes more than"),
  ],
)
def test_patterns_that_are_none(pattern, word):
  with pytest.raises(ValueError, match=word) as error:
    check_pattern("the file", pattern, ["model.layers.0"])
  assert str(error.value).startswith("the file") and len(str(error.value)) < 600


def test_patterns_that_are_fine_are_read_as_before(tmp_path):
  whole = r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj))"
  config = json.loads((GOLDEN / "lora" / CONFIG).read_text())
  listed = "|".join(config["target_modules"])
  want = snapshot(nn.load_peft(tiny_llama(True), GOLDEN / "lora"))
  for pattern in (rf".*\.({listed})", whole):
    got = nn.load_peft(tiny_llama(True), edit(tmp_path, target_modules=pattern))
    assert snapshot(got) == want


@pytest.mark.parametrize(
  ("change", "word"),
  [
    ({"r": 10**8}, "r to 100000000: the rank must be a positive integer, at most 65,536"),
    ({"r": 60_000}, "rank 60000 and the layer of `model` need shape"),
    ({"r": True}, "r to True"),
    ({"rank_pattern": {"q_proj": 10**8}}, "a rank must be at most 65,536"),
    ({"rank_pattern": {"q_proj": 60_000}}, "rank 60000"),
    ({"rank_pattern": [4]}, "rank_pattern to"),
    ({"rank_pattern": {"(": 4}}, "is no regular expression"),
    ({"alpha_pattern": {"q_proj": 1e300}}, "alpha_pattern to"),
    ({"lora_alpha": 10**400}, "lora_alpha to"),
    ({"lora_dropout": "x"}, "lora_dropout to 'x'"),
    ({"target_modules": {"a": 1}}, "must be a text or a list of texts"),
    ({"target_modules": [{}]}, "must be a text or a list of texts"),
    ({"target_modules": "("}, "is no regular expression"),
    ({"exclude_modules": "["}, "is no regular expression"),
    ({"modules_to_save": [1]}, "must be a text or a list of texts"),
    ({"layers_to_transform": ["x"]}, "must be a number or a list of numbers"),
    ({"layers_pattern": "(", "layers_to_transform": [0]}, "is no regular expression"),
    ({"bias": {}}, "bias to {}"),
  ],
)
def test_a_configuration_of_another_kind_names_the_file(tmp_path, change, word):
  folder = edit(tmp_path, **change)
  tracemalloc.start()
  with pytest.raises(ValueError) as error:
    nn.load_peft(tiny_llama(True), folder, rngs=nnx.Rngs(0))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert word in str(error.value) and str(folder) in str(error.value) and peak < 200e6
  with pytest.raises(ValueError, match=str(folder)):
    nn.merge_peft(GOLDEN / "base", folder, tmp_path / "merged")


@pytest.mark.parametrize(
  "content", [b"", b"{", b"[]", b"[" * 100_000, b"\xff", b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}"]
)
def test_a_broken_configuration_names_the_file(tmp_path, content):
  folder = edit(tmp_path)
  (folder / CONFIG).write_bytes(content)
  with pytest.raises(ValueError, match=f"{folder}/{CONFIG}"):
    nn.load_peft(tiny_llama(True), folder)
  index = shutil.copytree(GOLDEN / "base", tmp_path / "base")
  (index / "model.safetensors").unlink()
  (index / "model.safetensors.index.json").write_bytes(content)
  with pytest.raises(ValueError, match=f"{index}"):
    nn.merge_peft(index, GOLDEN / "lora", tmp_path / "merged")


def test_an_adapter_that_cannot_be_merged_is_named(tmp_path):
  key = PREFIX + "model.layers.1.mlp.up_proj.lora_A.weight"
  infinite = {"tensors": lambda tensors: tensors | {key: np.full((4, 64), np.inf, "f4")}}
  for change, word in ((infinite, "is not finite"), ({"fan_in_fan_out": True}, "has shape")):
    folder = edit(tmp_path, **change)
    with pytest.raises(ValueError, match=word) as error:
      nn.merge_peft(GOLDEN / "base", folder, tmp_path / "merged")
    assert str(folder) in str(error.value)


def test_names_of_tensors_have_a_limit(tmp_path):
  name = PREFIX + "a." * 500_000 + "weight"
  folder = edit(tmp_path, lambda tensors: tensors | {name: np.ones((1, 1), "f4")})
  with pytest.raises(ValueError, match="at most 1,000 are read"):
    nn.load_peft(tiny_llama(True), folder)
  base = tmp_path / "base.safetensors"
  safetensors.numpy.save_file({name: np.ones((1, 1), "f4")}, base)
  with pytest.raises(ValueError, match="at most 1,000 are read"):
    nn.merge_peft(base, GOLDEN / "lora", tmp_path / "merged")


def test_merging_reads_and_copies_nothing_from_outside_the_base(tmp_path):
  base = shutil.copytree(GOLDEN / "base", tmp_path / "base")
  secret = tmp_path / "secret.txt"
  secret.write_text("secret")
  (base / "notes.txt").symlink_to(secret)
  (base / "near.txt").symlink_to("README.md")
  (base / "README.md").write_text("of the model")
  os.mkfifo(base / "pipe.txt")
  out = nn.merge_peft(base, GOLDEN / "lora", tmp_path / "merged")
  assert not (out / "notes.txt").exists() and not (out / "pipe.txt").exists()
  assert (out / "near.txt").read_text() == (out / "README.md").read_text() == "of the model"

  outside = tmp_path / "outside.safetensors"
  (base / "model.safetensors").rename(outside)
  for name in ("../outside.safetensors", str(outside), ".", "sub/../../outside.safetensors"):
    index = {"weight_map": dict.fromkeys(BASE, name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="Only bare names are read"):
      nn.merge_peft(base, GOLDEN / "lora", tmp_path / "again")
  (base / "model.safetensors.index.json").unlink()
  for make in (lambda path: path.symlink_to(outside), os.mkfifo):
    make(base / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors' is (a symbolic link|no regular)"):
      nn.merge_peft(base, GOLDEN / "lora", tmp_path / "again")
    (base / "model.safetensors").unlink()
  assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_an_adapter_is_of_regular_files(tmp_path, name):
  folder = edit(tmp_path)
  outside = tmp_path.with_name(f"{tmp_path.name}-{name}")
  (folder / name).rename(outside)
  for make in (lambda path: path.symlink_to(outside), os.mkfifo):
    make(folder / name)
    with pytest.raises(ValueError, match=rf"{name}' is (a symbolic link|no regular file)"):
      nn.load_peft(tiny_llama(True), folder)
    (folder / name).unlink()
  outside.rename(folder / name)
  assert read(folder / WEIGHTS) and nn.load_peft(tiny_llama(True), folder)
