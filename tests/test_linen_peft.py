"""Adapters of Linen models in PEFT's files, read by the NNX half, which is tested against PEFT."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from safetensors import numpy as safetensors

from optax_lowmem import linen as lowmem_linen
from optax_lowmem import nn as lowmem_nn


class Block(linen.Module):
  @linen.compact
  def __call__(self, x, _=None):
    return x + linen.Dense(6, name="down")(jnp.tanh(linen.Dense(10, name="up")(x))), None


class Model(linen.Module):
  @linen.compact
  def __call__(self, ids):
    x = linen.Embed(7, 6, name="embed")(ids)
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    return linen.scan(Block, length=2, **axes)(name="layers")(x, None)[0]


class Layer(nnx.Module):
  up: nnx.Linear
  down: nnx.Linear

  def __init__(self, params, i):
    for name in ("up", "down"):
      kernel = jnp.asarray(params[name]["kernel"][i])
      layer = nnx.eval_shape(lambda kernel=kernel: nnx.Linear(*kernel.shape, rngs=nnx.Rngs(0)))
      layer.kernel = nnx.Param(kernel)
      layer.bias = nnx.Param(jnp.asarray(params[name]["bias"][i]))
      setattr(self, name, layer)

  def __call__(self, x):
    return x + self.down(jnp.tanh(self.up(x)))


class Same(nnx.Module):
  """The model in NNX, with the same weights."""

  def __init__(self, params):
    self.embed = nnx.Embed(7, 6, rngs=nnx.Rngs(0))
    self.embed.embedding = nnx.Param(jnp.asarray(params["embed"]["embedding"]))
    self.layers = nnx.List([Layer(params["layers"], i) for i in range(2)])

  def __call__(self, ids):
    x = self.embed(ids)
    for layer in self.layers:
      x = layer(x)
    return x


IDS = jnp.array([[1, 3, 6]])


def random_like(tree):
  random = np.random.default_rng(0)
  return jax.tree.map(lambda s: jnp.asarray(random.normal(size=s.shape) / 3, s.dtype), tree)


def setup(**options):
  model = Model()
  variables = random_like(jax.eval_shape(model.init, jax.random.key(0), IDS))
  layers = lowmem_linen.find_layers(model, variables, IDS)
  options = {"rank": 2, "alpha": 3, "targets": ".*", **options}
  lora = lowmem_linen.LoRA(model, layers, **options)
  return variables["params"], lora, random_like(jax.eval_shape(lora.init, jax.random.key(0)))


@pytest.mark.parametrize(
  "options",
  [{}, {"use_rslora": True, "rank_pattern": {"up": 3}, "alpha_pattern": {"down": 5.5}}],
)
def test_files_mean_the_same_to_the_nnx_half_and_come_back(tmp_path, options):
  params, lora, adapters = setup(**options)
  lowmem_linen.save_peft(lora, adapters, tmp_path)
  want = lora.apply({"params": params, "lora": adapters}, IDS)
  other = lowmem_nn.load_peft(Same(params), tmp_path)
  np.testing.assert_allclose(other(IDS), want, rtol=1e-5, atol=1e-5)
  back = lowmem_linen.load_peft(lora, tmp_path)
  jax.tree.map(np.testing.assert_array_equal, back, adapters)
  lowmem_nn.save_peft(other, tmp_path / "again")
  again = lowmem_linen.load_peft(lora, tmp_path / "again")
  jax.tree.map(np.testing.assert_array_equal, again, adapters)


def test_names_shapes_and_configuration_are_those_of_peft(tmp_path):
  _, lora, adapters = setup(targets=["up", "embed"], dropout=0.1)
  lowmem_linen.save_peft(lora, adapters, tmp_path, base_model="base")
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 3, 0.1)
  assert config["target_modules"] == ["embed", "up"] and config["peft_type"] == "LORA"
  tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
  shapes = {name.removeprefix("base_model.model."): v.shape for name, v in tensors.items()}
  up = {"lora_A.weight": (2, 6), "lora_B.weight": (10, 2)}
  want = {f"layers.{i}.up.{end}": shape for i in range(2) for end, shape in up.items()}
  assert shapes == want | {"embed.lora_embedding_A": (2, 7), "embed.lora_embedding_B": (6, 2)}


def test_what_does_not_fit_is_refused(tmp_path):
  _, lora, adapters = setup(targets="up")
  lowmem_linen.save_peft(lora, adapters, tmp_path)
  with pytest.raises(FileExistsError, match="overwrite=True"):
    lowmem_linen.save_peft(lora, adapters, tmp_path)
  for options, message in (
    ({"targets": "down"}, r"holds `layers.0.up`, which has no adapter in `lora`"),
    ({"targets": "up|down"}, r"must have .* for `layers.0.down`, got none"),
    ({"targets": "up", "rank": 4}, r"for `layers.0.up`, where rank 4 .*`lora` need shape \(4, 6\)"),
    ({"targets": "up", "alpha": 4}, r"has scale 1.5 for `layers.0.up`, `lora` has 2"),
  ):
    with pytest.raises(ValueError, match=message):
      lowmem_linen.load_peft(setup(**options)[1], tmp_path)
  with pytest.raises(ValueError, match="where its layer number belongs is not clear"):
    lowmem_linen.save_peft(lora, adapters, tmp_path / "other", stack="blocks")
  assert not (tmp_path / "other").exists()


class Tables(linen.Module):
  @linen.compact
  def __call__(self, ids):
    x = linen.Embed(7, 6, name="embed_tokens")(ids)
    return linen.Dense(7, use_bias=True, name="lm_head")(x)


def test_base_weights_beside_embedding_adapters_are_checked_and_dropped(tmp_path):
  model = Tables()
  variables = random_like(jax.eval_shape(model.init, jax.random.key(0), IDS))
  layers = lowmem_linen.find_layers(model, variables, IDS)
  lora = lowmem_linen.LoRA(model, layers, rank=2, alpha=3, targets=".*")
  nnx_model: Any = nnx.Dict(
    embed_tokens=nnx.Embed(7, 6, rngs=nnx.Rngs(0)), lm_head=nnx.Linear(6, 7, rngs=nnx.Rngs(0))
  )
  lowmem_nn.add_lora(nnx_model, 2, 3, "embed_tokens|lm_head", rngs=nnx.Rngs(1))
  lowmem_nn.save_peft(nnx_model, tmp_path)
  path = tmp_path / "adapter_model.safetensors"
  tensors = safetensors.load_file(path)
  base = "base_model.model.embed_tokens.base_layer.weight"
  assert tensors[base].shape == (7, 6) and base.replace("embed_tokens", "lm_head") in tensors
  got = lowmem_linen.load_peft(lora, tmp_path)
  for name in ("embed_tokens", "lm_head"):
    np.testing.assert_array_equal(got[name]["lora_a"], nnx_model[name].lora_a[...])
    np.testing.assert_array_equal(got[name]["lora_b"], nnx_model[name].lora_b[...])
  bias = {"base_model.model.lm_head.base_layer.bias": np.ones(7, np.float32)}
  for change, words in (
    ({base: tensors[base].T.copy()}, r"base weight `embed_tokens.weight` of shape \(6, 7\)"),
    (bias, r"`lm_head.bias`, which was trained beside"),
  ):
    safetensors.save_file(tensors | change, path)
    with pytest.raises(ValueError, match=words):
      lowmem_linen.load_peft(lora, tmp_path)
