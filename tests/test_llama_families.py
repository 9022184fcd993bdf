"""Each family of models: cache, packed rows, quantized base, adapters, training, merging."""

import functools
import sys
import tempfile
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import GOLDEN
from optax_lowmem import nn
from optax_lowmem.qlora.loading.llama import abstract_llama, load_llama
from optax_lowmem.qlora.loading.weights import open_checkpoint
from optax_lowmem.qlora.models.llama_config import LlamaConfig, linear_shapes
from optax_lowmem.qlora.models.norms import OffsetRMSNorm

sys.path.insert(0, str(GOLDEN))
import make_llama
from make_llama import save_directory

NEW = [name for name, (kind, _) in make_llama.CASES.items() if kind not in make_llama.FIRST]


@functools.cache
def folder_of(name):
  return save_directory(tempfile.mkdtemp(), *make_llama.read(name)[:2])


@nnx.jit
def logits_of(model, ids, segments=None):
  return model(ids, segments=segments)


@nnx.jit
def extend(model, ids, cache, lengths=None):
  hidden, cache = model.extend(ids, cache, lengths)
  return model.head(hidden), cache


def moved(model):
  """The model with adapters on all its linear layers that do something."""
  model = nn.add_lora(model, 2, 4, "all-linear", rngs=nnx.Rngs(1))
  lora = nnx.state(model, nnx.LoRAParam)
  keys = iter(jax.random.split(jax.random.key(2), 99))
  nnx.update(model, jax.tree.map(lambda w: w + 0.1 * jax.random.normal(next(keys), w.shape), lora))
  return model


# Compiling a step takes longest: three of them are of all kinds of blocks but two.
@pytest.mark.parametrize(
  "name",
  [
    name if name in ("gemma2", "phi3", "smollm3") else pytest.param(name, marks=pytest.mark.slow)
    for name in NEW
  ],
)
def test_a_quantized_model_learns_by_adapters_on_every_linear(name):
  ids = make_llama.read(name)[2]["ids"]
  model = load_llama(folder_of(name), "nf4")
  before = logits_of(model, ids)
  model = nn.add_lora(model, 2, 4, "all-linear", rngs=nnx.Rngs(1))
  adapted = {
    ".".join(map(str, path[2:]))
    for path, module in nnx.iter_modules(model)
    if isinstance(module, nn.LoRALinear)
  }
  assert adapted == set(linear_shapes(model.config))
  np.testing.assert_allclose(logits_of(model, ids), before, rtol=0, atol=1e-6)
  graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

  @jax.jit
  def step(lora):
    def loss(lora):
      logits = nnx.merge(graph, lora, rest)(jnp.asarray(ids))[:, :-1]
      return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], -1).mean()

    value, slope = jax.value_and_grad(loss)(lora)
    return value, slope, jax.tree.map(lambda w, g: w - 0.3 * g, lora, slope)

  first, slope, lora = step(lora)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(slope))
  # A is behind B, which is nought at first: only the slopes of B say what counts.
  b = {
    jax.tree_util.keystr(p): g for p, g in jax.tree.leaves_with_path(slope) if "lora_b" in str(p)
  }
  assert len(b) == len(adapted) and all(np.abs(g).max() > 0 for g in b.values())
  last = first
  for _ in range(4):
    last, _, lora = step(lora)
  assert last < first - 0.01


@pytest.mark.parametrize(
  "name",
  [
    n if n in ("gemma3", "phi3", "smollm3") else pytest.param(n, marks=pytest.mark.slow)
    for n in NEW
  ],
)
def test_packed_rows_and_the_cache_give_what_each_row_gives_alone(name):
  ids = jnp.asarray(make_llama.read(name)[2]["ids"])
  model = moved(load_llama(folder_of(name)))
  expected = logits_of(model, ids)
  starts = (0, 7, 16, 24)
  segments = jnp.repeat(jnp.arange(1, 4), jnp.diff(jnp.array(starts)))[None]
  together = logits_of(model, ids, segments)
  for i in (0, 1):  # whatever came before it in the row, or stands behind it
    part = slice(starts[i], starts[i + 1])
    other = ids.at[:, starts[i + 1] :].set(3).at[:, : starts[i]].set(5)
    np.testing.assert_allclose(
      together[:, part], logits_of(model, other, segments)[:, part], rtol=0, atol=1e-5
    )
  np.testing.assert_allclose(together[:, :7], expected[:, :7], rtol=0, atol=1e-5)
  logits, cache = extend(model, ids[:, :9], model.init_cache(1, 24))
  np.testing.assert_allclose(logits, expected[:, :9], rtol=0, atol=2e-5)
  for i in range(9, 12):
    logits, cache = extend(model, ids[:, i : i + 1], cache)
    np.testing.assert_allclose(logits[:, 0], expected[:, i], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["gemma2", "phi3", "olmo2"])
def test_merged_folders_are_the_adapted_model(tmp_path, name):
  ids = make_llama.read(name)[2]["ids"]
  model = moved(load_llama(folder_of(name)))
  expected = logits_of(model, ids)
  nn.save_peft(model, tmp_path / "adapter")
  again = nn.load_peft(load_llama(folder_of(name)), tmp_path / "adapter")
  np.testing.assert_allclose(logits_of(again, ids), expected, rtol=0, atol=1e-6)
  tied = model.config.tie_word_embeddings
  nn.merge_peft(folder_of(name), tmp_path / "adapter", tmp_path / "m", dtype="float32", tied=tied)
  merged = load_llama(tmp_path / "m")
  np.testing.assert_allclose(logits_of(merged, ids), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NEW)
def test_peft_takes_the_adapters(tmp_path, peft, name):
  import torch

  ids = make_llama.read(name)[2]["ids"]
  model = moved(load_llama(folder_of(name)))
  nn.save_peft(model, tmp_path / "adapter")
  theirs = peft.PeftModel.from_pretrained(make_llama.build(name), tmp_path / "adapter").eval()
  with torch.no_grad():
    expected = theirs(torch.from_numpy(ids)).logits.numpy()
  np.testing.assert_allclose(logits_of(model, ids), expected, rtol=0, atol=1e-4)


def test_gemma_trains_norms_as_it_stores_them(tmp_path):
  model: Any = load_llama(folder_of("gemma2"))
  stored = open_checkpoint(folder_of("gemma2")).read("model.norm.weight")
  np.testing.assert_array_equal(model.model.norm.scale[...], stored.astype(np.float32))
  model = nn.add_lora(model, 2, 4, "q_proj", modules_to_save=["norm"], rngs=nnx.Rngs(0))
  nn.save_peft(model, tmp_path / "a")
  from safetensors.numpy import load_file

  saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
  (norm,) = [value for key, value in saved.items() if key.endswith("model.norm.weight")]
  np.testing.assert_array_equal(norm, stored.astype(np.float32))


def test_an_offset_norm_begins_as_one_that_changes_nothing():
  config = LlamaConfig(32, 16, 24, 2, 2, 1, 8, norm_offset=True)
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # a norm is not named among weights that are not packed
    norm = abstract_llama(config, "nf4").model.norm
  assert isinstance(norm, OffsetRMSNorm) and norm.scale is not None and norm.scale.shape == (16,)
  norm = OffsetRMSNorm(
    4, dtype=jnp.bfloat16, scale_init=jax.nn.initializers.zeros, rngs=nnx.Rngs(0)
  )
  x = jnp.array([3.0, -3.0, 3.0, 3.0], jnp.bfloat16)
  assert norm(x).tolist() == [1, -1, 1, 1] and norm(x).dtype == jnp.bfloat16
