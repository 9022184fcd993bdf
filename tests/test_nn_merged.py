"""Adapters, merged into the weights of a model tensor by tensor, in files of Hugging Face."""

import collections.abc
import json
import shutil
import tracemalloc
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

import nn_llama
from optax_lowmem import nn
from optax_lowmem.nn._merging import delta as _delta
from optax_lowmem.qlora.loading.llama import load_llama
from peft_cases import ADAPTERS, BASE, GOLDEN, KINDS, logits, randomized, torch_base

INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  monkeypatch.setattr(_delta, "TILE", 1000)  # several to a weight, the last one short


def read(folder):
  """{name: array} of a folder, of whatever files."""
  found = {}
  for path in sorted(folder.glob("*.safetensors")):
    found |= safetensors.numpy.load_file(path)
  return found


def same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape)
    assert a[name].tobytes() == b[name].tobytes(), name


WEIGHTS = read(BASE)


MAKE = {
  "packed": lambda: load_llama(BASE, "nf4"),
  "stacked": lambda: load_llama(BASE),
  "one module a layer": lambda: nn_llama.load(BASE),
}
WAYS = {
  "lora": ("stacked", "one module a layer"),
  "rslora": ("stacked",),
  "dora": ("packed", "stacked"),
  "lora_pattern": ("packed", "stacked"),
  "lora_embed_head": ("packed", "one module a layer"),
  "lora_modules_to_save": ("packed", "one module a layer"),
  "minimal": ("one module a layer",),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_is_what_peft_merges_by_every_way(name, tmp_path):
  adapter = GOLDEN / name
  nn.merge_peft(BASE, adapter, tmp_path / "files")
  got = read(tmp_path / "files")
  assert got.keys() == WEIGHTS.keys()
  if (adapter / "merged.safetensors").exists():
    want = safetensors.numpy.load_file(adapter / "merged.safetensors")
    for key, value in got.items():
      np.testing.assert_allclose(value, want[key], rtol=0, atol=1e-5)
  for way in WAYS[name]:
    # A packed model gives the same bits with the original: what its base holds is not looked at.
    # From a float one all is taken.
    model = nn.load_peft(MAKE[way](), adapter)
    nn.save_merged(model, tmp_path / way, BASE if way == "packed" else None)
    same(read(tmp_path / way), got)


def test_a_packed_base_without_its_original_is_decoded(tmp_path):
  model = nn.load_peft(load_llama(BASE, "nf4"), GOLDEN / "dora")
  ids = jnp.arange(12).reshape(2, 6)
  logits = model(ids)
  nn.save_merged(model, tmp_path / "out")
  got = read(tmp_path / "out")
  merged = nn.merge_lora(model)
  for i in range(2):
    want = merged.model.layers.mlp.up_proj.kernel[...][i].T
    name = f"model.layers.{i}.mlp.up_proj.weight"
    np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-6)
    assert np.abs(got[name] - WEIGHTS[name]).max() > 1e-3
  assert got.keys() == WEIGHTS.keys()
  shutil.copy(BASE / "config.json", tmp_path / "out")
  np.testing.assert_allclose(load_llama(tmp_path / "out")(ids), logits, rtol=0, atol=1e-4)


# With PEFT and transformers.


def from_pretrained(folder, **options):
  import torch
  import transformers

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    options = {"dtype": torch.float32, "output_loading_info": True} | options
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
  model, info = loaded
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_loads_it_and_computes_what_peft_does(kind, tmp_path, peft):
  settings = dict(KINDS[kind])
  base = torch_base(**settings.pop("_base", {}))
  base.save_pretrained(tmp_path / "base")
  plain = logits(base)
  made = randomized(peft, base, settings)
  want = logits(made)
  assert np.abs(want - plain).max() > 1e-2
  made.save_pretrained(tmp_path / "peft")
  nn.merge_peft(tmp_path / "base", tmp_path / "peft", tmp_path / "out")
  np.testing.assert_allclose(logits(from_pretrained(tmp_path / "out")), want, rtol=0, atol=1e-4)


def sharded(folder, shards=3):
  """The base in several files, with what lies beside weights."""
  folder.mkdir()
  names = list(WEIGHTS)
  files = {n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(names)}
  for file in set(files.values()):
    safetensors.numpy.save_file(
      {n: WEIGHTS[n] for n in names if files[n] == file}, folder / file, metadata={"format": "pt"}
    )
  metadata = {"total_size": 1, "total_parameters": 7}
  (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": files}))
  shutil.copy(BASE / "config.json", folder)
  for name in ("tokenizer.model", "LICENSE", "pytorch_model.bin", "adapter_config.json"):
    (folder / name).write_text(name)
  (folder / "runs").mkdir()
  return files


def test_the_files_of_the_original_are_kept_or_split_anew(tmp_path):
  files = sharded(tmp_path / "base")
  adapter = GOLDEN / "lora"
  merged = safetensors.numpy.load_file(adapter / "merged.safetensors")
  total = sum(value.nbytes for value in WEIGHTS.values())
  beside = {"config.json", "tokenizer.model", "LICENSE", INDEX}

  out = nn.merge_peft(tmp_path / "base", adapter, tmp_path / "kept")
  assert {path.name for path in out.iterdir()} == beside | set(files.values())
  index = json.loads((out / INDEX).read_text())
  assert index["weight_map"] == files
  assert index["metadata"] == {"total_size": total, "total_parameters": 7}
  for name, file in files.items():
    with safetensors.safe_open(out / file, framework="np") as opened:
      assert opened.metadata() == {"format": "pt"}
      np.testing.assert_allclose(opened.get_tensor(name), merged[name], rtol=0, atol=1e-5)

  for limit, count in (("100KB", 5), (100_000, 5), ("0.1 MB", 5), ("1GiB", 1)):
    again = nn.merge_peft(tmp_path / "base", adapter, tmp_path / "new", max_shard_size=limit)
    found = sorted(again.glob("*.safetensors"))
    assert len(found) == count and (again / INDEX).exists() == (count > 1)
    assert all(path.stat().st_size < 104_000 or count == 1 for path in found)
    same(read(again), read(out))
    if count == 1:
      assert found[0].name == "model.safetensors"
    shutil.rmtree(again)


def test_hugging_face_loads_several_files_in_half_precision(tmp_path, peft):
  import torch

  sharded(tmp_path / "base")
  adapter = GOLDEN / "lora"
  want = np.load(adapter / "logits.npy")
  options: dict[str, Any]
  for options in ({}, {"max_shard_size": "100KB"}):
    out = tmp_path / f"out{len(options)}"
    nn.merge_peft(tmp_path / "base", adapter, out, **options)
    np.testing.assert_allclose(logits(from_pretrained(out)), want, rtol=0, atol=1e-4)
  nn.merge_peft(tmp_path / "base", adapter, tmp_path / "half", dtype="bfloat16")
  assert from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16


def test_sums_are_rounded_once_to_the_dtype_asked_for(tmp_path):
  half = {name: value.astype(jnp.bfloat16) for name, value in WEIGHTS.items()}
  (tmp_path / "half").mkdir()
  safetensors.numpy.save_file(half, tmp_path / "half" / "model.safetensors")
  shutil.copy(BASE / "config.json", tmp_path / "half")

  def merged(base, **options):
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    return read(nn.merge_peft(base, GOLDEN / "lora", tmp_path / "out", **options))

  full = merged(BASE)
  for dtype in ("bfloat16", jnp.float16):
    same(merged(BASE, dtype=dtype), {n: v.astype(dtype) for n, v in full.items()})
  wide = merged(tmp_path / "half", dtype="float32")  # each dtype of the original, by default
  same(merged(tmp_path / "half"), {n: v.astype(jnp.bfloat16) for n, v in wide.items()})
  merged(BASE, dtype="bfloat16")
  assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


# Memory.


class Made(collections.abc.Mapping):
  """Weights that are made when they are asked for."""

  def __init__(self, names, shape, fail=None):
    self.names, self.shape, self.fail, self.reads = names, shape, fail, 0

  def __getitem__(self, name):
    self.reads += 1
    if self.reads == self.fail:
      raise KeyboardInterrupt
    value = np.full(self.shape, self.names.index(name), np.float32)
    return value if name.endswith(".weight") else value[:, 0].copy()

  def __iter__(self):
    return iter(self.names)

  def __len__(self):
    return len(self.names)


def wide_adapter(folder, layers, width):
  model = nnx.Dict(
    layers=nnx.List(
      [nnx.Dict(up=nnx.Linear(width, width, rngs=nnx.Rngs(0))) for _ in range(layers)]
    )
  )
  nn.save_peft(nn.add_lora(model, 1, 2, "up", rngs=nnx.Rngs(0)), folder)
  return [f"layers.{i}.up.{kind}" for i in range(layers) for kind in ("weight", "bias")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_tensor_is_in_memory_at_a_time(tmp_path, dtype):
  names = wide_adapter(tmp_path / "adapter", layers=12, width=1024)
  source, one = Made(names, (1024, 1024)), 4 << 20
  for original in (source, tmp_path / "out0"):
    out = tmp_path / f"out{int(original is not source)}"
    tracemalloc.start()
    nn.merge_peft(original, tmp_path / "adapter", out, dtype=dtype, max_shard_size="20MB")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = {"float32": one, "bfloat16": one // 2}[dtype]
    read_as = one if original is source else size
    # As it is read, as it is written, which of its elements are finite, and the small things.
    assert peak < read_as + size + one // 4 + (1 << 20)
    assert sum(path.stat().st_size for path in out.iterdir()) > 12 * size


def test_a_packed_model_is_decoded_layer_by_layer(tmp_path, monkeypatch):
  from optax_lowmem.nn._merging import merged_folder as _merged_folder

  stack = nnx.Linear(256, 256, use_bias=False, rngs=nnx.Rngs(0))
  stack.kernel = nnx.Param(jnp.ones((16, 256, 256)))
  model = nn.quantize_model(nnx.Dict(layers=nnx.Dict(up=stack)))
  nn.add_lora(model, 2, 4, "up", rngs=nnx.Rngs(0))
  del stack
  value, live = _merged_folder._value, []

  def counted(*args):
    result = value(*args)
    live.append(sum(x.nbytes for x in jax.live_arrays()))
    return result

  monkeypatch.setattr(_merged_folder, "_value", counted)
  before = sum(x.nbytes for x in jax.live_arrays())
  nn.save_merged(model, tmp_path / "out")
  assert len(live) == 16 and max(live) - before <= 2 * 4 * 256 * 256
  assert all((w == 1).all() for w in read(tmp_path / "out").values())


def test_nothing_is_left_of_an_interrupted_write(tmp_path):
  names = wide_adapter(tmp_path / "adapter", layers=3, width=8)
  source = Made(names, (8, 8), fail=len(names) + 4)
  before = set(tmp_path.iterdir())
  with pytest.raises(KeyboardInterrupt):
    nn.merge_peft(source, tmp_path / "adapter", tmp_path / "out", max_shard_size=200)
  assert source.reads == len(names) + 4
  assert set(tmp_path.iterdir()) == before


# Layers of other kinds, and models that hold more than layers.


@pytest.mark.parametrize("quantized", [False, True])
def test_general_layers_are_the_matrices_of_pytorch(quantized, tmp_path):
  rngs = nnx.Rngs(0)
  options = {"bias_init": nnx.initializers.normal(), "rngs": rngs}
  model: Any = nnx.Dict(
    q=nnx.LinearGeneral(64, (4, 16), **options),
    o=nnx.LinearGeneral((4, 16), 32, axis=(-2, -1), **options),
    e=nnx.Einsum("BTD,NDH->BTHN", (4, 64, 16), (16, 4), **options),
    plain=nnx.LinearGeneral(64, (2, 32), **options),
  )
  kernels = {name: np.asarray(layer.kernel[...]) for name, layer in model.items()}
  biases = {name: np.asarray(layer.bias[...]) for name, layer in model.items()}
  if quantized:
    nn.quantize_model(model)
  nn.add_lora(model, 2, 4, "q|o|e", rngs=nnx.Rngs(0))
  for name in "qoe":
    model[name].lora_b[...] = model[name].lora_b[...] + 0.1
  if quantized:
    nn.save_merged(model, tmp_path / "out")
    kernels = {
      name: np.asarray(layer.kernel[...])
      for name, layer in nn.merge_lora(model).items()
      if name != "plain"
    }
    delta = dict.fromkeys(kernels, 0.0)
  else:
    nn.save_merged(model, tmp_path / "out")
    delta = {name: np.asarray(model[name].delta()) for name in "qoe"} | {"plain": 0.0}
  got = read(tmp_path / "out")
  want = {
    "q": lambda k: k.reshape(64, 64).T,
    "o": lambda k: k.reshape(64, 32).T,
    "e": lambda k: k.transpose(0, 2, 1).reshape(64, 64),
    "plain": lambda k: k.reshape(64, 64).T,
  }
  for name, kernel in kernels.items():
    np.testing.assert_allclose(
      got[f"{name}.weight"], want[name](kernel) + delta[name], rtol=0, atol=1e-6
    )
  for name, bias in biases.items():
    np.testing.assert_array_equal(
      got[f"{name}.bias"], (bias.T if name == "e" else bias).reshape(-1)
    )


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_that_changed_its_base_merges_into_both(use_dora, tmp_path):
  model: Any = load_llama(BASE)
  options = {"init": "pissa", "use_dora": use_dora, "rngs": nnx.Rngs(0)}
  nn.add_lora(model, 4, 8, "q_proj|up_proj", **options)
  for layer in (model.model.layers.self_attn.q_proj, model.model.layers.mlp.up_proj):
    layer.lora_b[...] = layer.lora_b[...] * 1.5
  nn.save_merged(model, tmp_path / "base")
  nn.save_merged(model, tmp_path / "original", BASE)
  nn.save_peft(model, tmp_path / "adapter")
  nn.merge_peft(BASE, tmp_path / "adapter", tmp_path / "files")
  base, original = read(tmp_path / "base"), read(tmp_path / "original")
  same(original, read(tmp_path / "files"))
  for name, value in original.items():
    np.testing.assert_allclose(value, base[name], rtol=0, atol=1e-5)
  name = "model.layers.1.mlp.up_proj.weight"
  assert np.abs(original[name] - WEIGHTS[name]).max() > 1e-2


def test_what_is_trained_beside_is_taken_from_the_model(tmp_path):
  model = nn_llama.load(BASE)
  saved = ["norm", "lm_head"]
  nn.add_lora(model, 2, 4, "q_proj", modules_to_save=saved, rngs=nnx.Rngs(0))
  model.lm_head.kernel[...] = model.lm_head.kernel[...] * 2
  model.model.norm.scale[...] = model.model.norm.scale[...] + 1
  nn.save_merged(model, tmp_path / "out", BASE, dtype="bfloat16")
  changed = {n: WEIGHTS[n] for n in WEIGHTS}
  changed["lm_head.weight"] = changed["lm_head.weight"] * 2
  changed["model.norm.weight"] = changed["model.norm.weight"] + 1
  same(read(tmp_path / "out"), {n: v.astype(jnp.bfloat16) for n, v in changed.items()})


class Tied(nnx.Module):
  """A table that is the output layer's too: one module, one Variable, or so says the config."""

  def __init__(self, how="config"):
    self.embed_tokens = nnx.Embed(16, 8, rngs=nnx.Rngs(0))
    self.up = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    if how == "module":
      self.head = self.embed_tokens
    elif how == "variable":
      self.head = nnx.Embed(16, 8, rngs=nnx.Rngs(0))
      self.head.embedding = self.embed_tokens.embedding
    else:
      self.config = type("Config", (), {"tie_word_embeddings": True})()


@pytest.mark.parametrize("how", ["config", "module", "variable"])
def test_a_tied_table_is_written_once_and_refused_where_one_is_not_enough(how, tmp_path):
  model = nn.add_lora(Tied(how), 2, 4, "up", rngs=nnx.Rngs(0))
  nn.save_merged(model, tmp_path / "out")
  got = read(tmp_path / "out")
  assert sorted(got) == ["embed_tokens.weight", "up.bias", "up.weight"]
  nn.add_lora(model, 2, 4, "embed_tokens", rngs=nnx.Rngs(0))
  nn.save_peft(model, tmp_path / "adapter")
  for merge in (
    lambda: nn.save_merged(model, tmp_path / "no"),
    lambda: nn.save_merged(model, tmp_path / "no", got),
    lambda: nn.merge_peft(got, tmp_path / "adapter", tmp_path / "no", tied=True),
    lambda: nn.merge_peft(tmp_path / "out", tmp_path / "adapter", tmp_path / "no"),
  ):
    (tmp_path / "out" / "config.json").write_text('{"tie_word_embeddings": true}')
    with pytest.raises(ValueError, match=r"`embed_tokens` has an adapter.*tied"):
      merge()
  if how == "config":
    with pytest.raises(ValueError, match=r"`embed_tokens` has an adapter.*tied"):
      nn.merge_lora(model)
    assert isinstance(model.up, nn.LoRALinear)
  (tmp_path / "out" / "config.json").write_text('{"tie_word_embeddings": false}')
  nn.merge_peft(tmp_path / "out", tmp_path / "adapter", tmp_path / "yes")

  whole = nn.add_lora(Tied(), 2, 4, "up", modules_to_save=["embed_tokens"], rngs=nnx.Rngs(0))
  nn.save_merged(whole, tmp_path / "whole", got)
  with pytest.raises(ValueError, match=r"its tied copy `lm_head\.weight`"):
    nn.save_merged(whole, tmp_path / "no", got | {"lm_head.weight": got["embed_tokens.weight"]})


def test_a_packed_weight_that_was_bfloat16_is_not_rounded_to_it_again(tmp_path):
  layer = nnx.Linear(64, 64, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  model: Any = nn.add_lora(nn.quantize_model(nnx.Dict(q=layer)), 2, 4, "q", rngs=nnx.Rngs(1))
  model.q.lora_b[...] = model.q.lora_b[...] + 0.1
  got = read(nn.save_merged(model, tmp_path / "out"))["q.weight"]
  assert got.dtype == np.float32
  want = nn.merge_lora(model, dtype=jnp.float32).q.kernel[...]
  np.testing.assert_allclose(got.T, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("adapted", ["a", "b", "c", "b|c"])
def test_a_shared_weight_is_written_for_every_layer_that_differs(adapted, tmp_path):
  def make():
    model = nnx.Dict({n: nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0)) for n in "abc"})
    model.b.kernel = model.c.kernel = model.a.kernel
    return model

  model: Any = nn.add_lora(make(), 2, 4, adapted, rngs=nnx.Rngs(1))
  for name in adapted.split("|"):
    model[name].lora_b[...] = model[name].lora_b[...] + ord(name) - 96
  got = read(nn.save_merged(model, tmp_path / "out"))
  rest = [name for name in "abc" if name not in adapted]
  # Those without an adapter stay tied, and are written once.
  assert sorted(got) == sorted(f"{name}.weight" for name in [*adapted.split("|"), rest[0]])
  merged = nn.merge_lora(model)
  for name, value in got.items():
    np.testing.assert_allclose(value.T, merged[name[0]].kernel[...], rtol=0, atol=1e-6)


# What is refused.


def small(**changes):
  model = nnx.Dict(up=nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
  weights = {"up.weight": np.ones((4, 8), np.float32), "up.bias": np.ones(4, np.float32)}
  return nn.add_lora(model, 2, 4, "up", rngs=nnx.Rngs(0)), {
    name: value for name, value in (weights | changes).items() if value is not None
  }


def test_tensors_lie_at_multiples_of_their_size(tmp_path):
  odd = {"a": np.ones(3, jnp.bfloat16), "z": np.ones(3, np.int8), "b": np.ones((), np.float64)}
  model, weights = small(**odd)
  nn.save_merged(model, tmp_path / "out", weights)
  content = (tmp_path / "out" / "model.safetensors").read_bytes()
  size = int.from_bytes(content[:8], "little")
  header = json.loads(content[8 : 8 + size])
  assert size % 8 == 0 and len(header) == 6
  for name, array in read(tmp_path / "out").items():
    assert header[name]["data_offsets"][0] % array.itemsize == 0
    assert array.dtype == weights[name].dtype


class Scale(nnx.Module):
  def __init__(self):
    self.by = nnx.Param(jnp.ones(3))


def refused(out, original=None, model=None, **options):
  made, weights = small(**(original or {}))
  weights = None if original is None else weights
  return lambda: nn.save_merged(made if model is None else model, out, weights, **options)


REFUSED = {
  "no adapter": (ValueError, "nothing to merge", lambda out: refused(out, model=Scale())),
  "no such weight": (
    ValueError,
    r"lacks `up\.weight`.*Nearest: upp\.weight",
    lambda out: refused(out, {"up.weight": None, "upp.weight": np.ones((4, 8))}),
  ),
  "another shape": (
    ValueError,
    r"shape \(8, 4\) for `up\.weight`.*\(4, 8\)",
    lambda out: refused(out, {"up.weight": np.ones((8, 4), np.float32)}),
  ),
  "integers": (
    ValueError,
    "holds `up.weight` as int8.*before it was quantized",
    lambda out: refused(out, {"up.weight": np.ones((4, 8), np.int8)}),
  ),
  "no array": (TypeError, "maps 'x' to a list", lambda out: refused(out, {"x": [1.0]})),
  "complex": (
    ValueError,
    "`x` is complex64, which is not written",
    lambda out: refused(out, {"x": np.ones(2, np.complex64)}),
  ),
  "integer dtype": (ValueError, "`dtype` must be floating", lambda o: refused(o, dtype="int8")),
  "no dtype": (ValueError, "`dtype` must be a dtype", lambda out: refused(out, dtype="half-ish")),
  "size": (
    ValueError,
    "`max_shard_size` must be.*'five'",
    lambda out: refused(out, max_shard_size="five"),
  ),
  "no size": (ValueError, "`max_shard_size`", lambda out: refused(out, max_shard_size=0)),
  "overflow": (
    ValueError,
    "`up.weight` is not finite as float16",
    lambda out: refused(out, {"up.weight": np.full((4, 8), 1e6, np.float32)}, dtype="float16"),
  ),
  "overflow of a copy": (
    ValueError,
    "`x` is not finite as float16",
    lambda out: refused(out, {"x": np.full(2, 1e6, np.float32)}, dtype="float16"),
  ),
  "unknown Variable": (
    ValueError,
    r"`more\.by` is of type Param, and its name.*`original`",
    lambda out: refused(out, model=nnx.Dict(layer=small()[0], more=Scale())),
  ),
  "nothing there": (
    FileNotFoundError,
    "no safetensors in",
    lambda out: lambda: nn.save_merged(small()[0], out, out.parent),
  ),
  "stack": (
    ValueError,
    "`stack`",
    lambda out: refused(
      out, model=nn.add_lora(load_llama(BASE), 2, 4, "q_proj", rngs=nnx.Rngs(0)), stack="blocks"
    ),
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(case, tmp_path):
  error, words, make = REFUSED[case]
  call = make(tmp_path / "out")
  with pytest.raises(error, match=words):
    call()
  assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
  model, weights = small()
  (tmp_path / "mine").write_text("mine")
  for there in (tmp_path, tmp_path / "mine"):
    with pytest.raises(FileExistsError, match="not empty"):
      nn.save_merged(model, there, weights)
  assert [path.name for path in tmp_path.iterdir()] == ["mine"]
  (tmp_path / "empty").mkdir()
  assert nn.save_merged(model, tmp_path / "empty", weights) == tmp_path / "empty"
  assert [path.name for path in (tmp_path / "empty").iterdir()] == ["model.safetensors"]


def edited(folder, change=lambda tensors: tensors, **config):
  folder.mkdir()
  old = json.loads((GOLDEN / "lora" / "adapter_config.json").read_text())
  (folder / "adapter_config.json").write_text(json.dumps(old | config))
  tensors = safetensors.numpy.load_file(GOLDEN / "lora" / "adapter_model.safetensors")
  safetensors.numpy.save_file(change(tensors), folder / "adapter_model.safetensors")
  return folder


def without(part):
  return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


PREFIX = "base_model.model."


@pytest.mark.parametrize(
  ("change", "config", "words"),
  [
    (without("1.mlp.up_proj"), {}, r"lacks `model\.layers\.1\.mlp\.up_proj`"),
    (lambda t: t, {"r": 8}, "says rank 8"),
    (lambda t: t, {"rank_pattern": {"up_proj": 2}}, "says rank 2"),
    (lambda t: t, {"use_dora": True}, "lacks the magnitude"),
    (lambda t: t, {"lora_bias": True}, "lacks the bias"),
    (lambda t: t, {"fan_in_fan_out": True}, "`original` has shape"),
    (lambda t: t, {"modules_to_save": ["norm"]}, r"lacks `.*norm\.weight`"),
    (
      lambda t: t | {f"{PREFIX}model.norm.weight": np.ones(64, np.float32)},
      {},
      r"holds `model\.norm\.weight`",
    ),
    (
      lambda t: t | {f"{PREFIX}model.norm.weight": np.ones(3, np.float32)},
      {"modules_to_save": ["model.norm"]},
      r"shape \(64,\) for `model\.norm\.weight`",
    ),
    (
      lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()},
      {"target_modules": r".*layers\.(0|7).*"},
      r"lacks `model\.layers\.7",
    ),
  ],
)
def test_adapters_that_do_not_fit_are_refused(change, config, words, tmp_path):
  adapter = edited(tmp_path / "adapter", change, **config)
  with pytest.raises(ValueError, match=words):
    nn.merge_peft(BASE, adapter, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_damaged_originals_are_refused(tmp_path):
  adapter, base = GOLDEN / "lora", tmp_path / "base"
  files = sharded(base)
  first = next(iter(files.values()))
  content = (base / first).read_bytes()
  (base / first).write_bytes(content[:-10])
  with pytest.raises(ValueError, match="not a whole safetensors file"):
    nn.merge_peft(base, adapter, tmp_path / "out")
  (base / first).unlink()
  with pytest.raises(FileNotFoundError, match=first):
    nn.merge_peft(base, adapter, tmp_path / "out")
  (base / INDEX).unlink()
  with pytest.raises(ValueError, match="`original` lacks"):
    nn.merge_peft(base, adapter, tmp_path / "out")
  (base / first).write_bytes(content)
  (base / "copy.safetensors").write_bytes(content)
  with pytest.raises(ValueError, match=r"is in 'copy\.safetensors' and in"):
    nn.merge_peft(base, adapter, tmp_path / "out")
  assert {path.name for path in tmp_path.iterdir()} == {"base"}
