"""Weights that are not what a layer multiplies by, are another's too, or lie along another axis."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optax_lowmem import nn


class Normed(nnx.Module):
  def __init__(self, norm):
    self.a = norm(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    self.b = nnx.Linear(64, 64, rngs=nnx.Rngs(1))

  def __call__(self, x):
    return self.b(self.a(x))


@pytest.mark.parametrize("norm", [nnx.WeightNorm, nnx.SpectralNorm])
def test_a_layer_in_a_norm_is_left_alone(norm):
  """The norm finds no weight in a packed layer, and would be passed over."""
  model, x = Normed(norm), jnp.ones((2, 64))
  hidden = Normed(norm).a(x)  # of another one: a call changes the weights
  why = rf"`a.layer_instance` \(Linear: {norm.__name__} changes its weight in each call\)"
  with pytest.warns(UserWarning, match=why):
    nn.quantize_model(model, exclude=None)
  assert isinstance(model.b, nn.NF4Linear)
  np.testing.assert_array_equal(model.a(x), hidden)
  with pytest.warns(UserWarning, match=why):
    nn.add_lora(model, 2, 4, rngs=nnx.Rngs(0))
  assert isinstance(model.b, nn.LoRALinear)
  assert not isinstance(model.a.layer_instance, nn.LoRALinear)
  for change in (
    lambda m: nn.quantize_model(m, targets="layer_instance"),
    lambda m: nn.add_lora(m, 2, 4, "layer_instance", rngs=nnx.Rngs(0)),
  ):
    with pytest.raises(ValueError, match=f"a Linear, no linear layer: {norm.__name__} changes"):
      change(Normed(norm))
  found = nn.find_layers(Normed(norm), x)
  assert found.names == ["b"]
  assert dict(found.others)["a.layer_instance"].startswith(f"Linear: {norm.__name__} changes")


class Head(nnx.Module):
  def __init__(self, table, hold=nnx.List):
    self.tables = nnx.data(hold([table]))  # as a model may hold it

  def __call__(self, x):
    return x @ self.tables[0][...].T


class Tied(nnx.Module):
  def __init__(self, hold: Any = nnx.List):
    self.embed_tokens = nnx.Embed(32, 16, rngs=nnx.Rngs(0))
    self.up_proj = nnx.Linear(16, 16, rngs=nnx.Rngs(1))
    self.lm_head = Head(self.embed_tokens.embedding, hold)

  def __call__(self, tokens):
    return self.lm_head(self.up_proj(self.embed_tokens(tokens)))


def test_a_variable_that_modules_share_stays_shared(tmp_path):
  model, tokens = Tied(), jnp.arange(8)
  nn.add_lora(model, 2, 4, "up_proj", modules_to_save="embed_tokens", rngs=nnx.Rngs(0))
  table = model.embed_tokens.embedding
  assert isinstance(table, nnx.LoRAParam)
  assert model.lm_head.tables[0] is table

  def loss(model):
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens), tokens).mean()

  optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.LoRAParam)
  optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model))
  assert model.lm_head.tables[0] is model.embed_tokens.embedding
  nn.save_peft(model, tmp_path / "adapter", base_model="tied")
  again = Tied()
  nn.load_peft(again, tmp_path / "adapter", rngs=nnx.Rngs(0))
  assert again.lm_head.tables[0] is again.embed_tokens.embedding
  np.testing.assert_array_equal(again(tokens), model(tokens))


def test_a_variable_in_a_tuple_is_refused_before_anything_is_changed(tmp_path):
  model = Tied()
  nn.add_lora(model, 2, 4, "up_proj", modules_to_save="embed_tokens", rngs=nnx.Rngs(0))
  nn.save_peft(model, tmp_path / "adapter", base_model="tied")
  options: Any = {"modules_to_save": "embed_tokens", "rngs": nnx.Rngs(0)}
  for change in (
    lambda m: nn.add_lora(m, 2, 4, "up_proj", **options),
    lambda m: nn.load_peft(m, tmp_path / "adapter", rngs=nnx.Rngs(0)),
  ):
    model = Tied(tuple)
    with pytest.raises(ValueError, match=r"`embed_tokens\.embedding`.*held in a tuple.*nnx\.List"):
      change(model)
    assert isinstance(model.up_proj, nnx.Linear)


class Along1(nnx.Module):
  """Layers stacked along the second axis of their kernels."""

  def __init__(self, use_bias):
    axes = nnx.StateAxes({nnx.PathContains("kernel"): 1, ...: 0})
    self.axes = nnx.static(axes)
    make = nnx.vmap(lambda r: nnx.Linear(64, 32, use_bias=use_bias, rngs=r), out_axes=axes)
    self.layers = nnx.split_rngs(splits=3)(make)(nnx.Rngs(0))


@pytest.mark.parametrize("use_bias", [True, False])
def test_layers_that_are_stacked_along_another_axis_are_refused(use_bias):
  model = Along1(use_bias)
  message = r"the kernel of a Linear has shape \(64, 3, 32\), which does not end in \(64, 32\)"
  for change in (
    lambda: nn.quantize_model(model, exclude=None),
    lambda: nn.add_lora(model, 2, 4, ".*", rngs=nnx.Rngs(0)),
  ):
    with pytest.raises(ValueError, match=message):
      change()
  assert isinstance(model.layers, nnx.Linear)


class Scanned(nnx.Module):
  """Only what `axes` names is cut into layers."""

  def __init__(self, axes):
    make = nnx.vmap(lambda r: nnx.Linear(64, 64, use_bias=True, rngs=r))
    self.layers, self.axes = nnx.split_rngs(splits=3)(make)(nnx.Rngs(0)), nnx.static(axes)

  def __call__(self, x):
    scan = nnx.scan(lambda m, x: m(x), in_axes=(self.axes, nnx.Carry), out_axes=nnx.Carry)
    return scan(self.layers, x)


CHANGES = {
  "packed": lambda m: nn.quantize_model(m, exclude=None),
  "of different ranks": lambda m: nn.add_lora(m, 2, 4, r"layers\.1", rngs=nnx.Rngs(0)),
  "dropout": lambda m: nn.add_lora(m, 2, 4, dropout=0.5, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_state_axes_have_to_name_what_is_stacked(change):
  few, x = nnx.StateAxes({nnx.Param: 0, ...: None}), jnp.ones((2, 64))
  kinds = nnx.Any(nnx.Param, nn.QuantizedWeight, nn.LoRAScale, nnx.RngState)
  model: Any = CHANGES[change](Scanned(few))
  with pytest.raises(ValueError, match=r"holds a stack of layers.*nnx\.StateAxes"):
    model(x)
  model = CHANGES[change](Scanned(nnx.StateAxes({kinds: 0, ...: None})))
  assert model(x).shape == x.shape
  assert jax.tree.leaves(nnx.state(model, nnx.Not(kinds))) == []


@pytest.mark.parametrize("kind", [np.int64, np.float32, jnp.float32], ids=str)
def test_numbers_may_be_of_numpy_or_jax(kind, tmp_path):
  model: Any = nnx.Dict(a=nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
  rank: Any = np.int64(2)
  nn.add_lora(model, rank, kind(4), rngs=nnx.Rngs(0))
  assert (model.a.rank, model.a.alpha) == (2, 4)
  assert (type(model.a.rank), type(model.a.alpha)) == (int, float)
  nn.save_peft(model, tmp_path / "adapter", base_model="a")


def test_a_packed_weight_is_read_as_any_variable():
  model: Any = nn.quantize_model(nnx.Dict(a=nnx.Linear(64, 8, rngs=nnx.Rngs(0))))
  weight = model.a.weight
  assert weight[...].codes is weight.get_value().codes
  with pytest.raises(TypeError, match="cannot be indexed by 0"):
    _ = weight[0]


def test_holders_of_a_shared_variable_compute_in_what_they_did():
  """The table is held in 32 bits then, by all of them."""
  one, other = (nnx.Embed(32, 16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)) for _ in range(2))
  other.embedding = one.embedding
  up = nnx.Linear(16, 16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
  model: Any = nnx.Dict(one=one, other=other, up=up)
  nn.add_lora(model, 2, 4, "up", modules_to_save="one", rngs=nnx.Rngs(0))
  assert model.other.embedding is model.one.embedding
  assert model.one.embedding[...].dtype == jnp.float32
  assert {layer(jnp.arange(3)).dtype for layer in (one, other)} == {jnp.dtype(jnp.bfloat16)}


def test_a_layer_that_only_one_of_its_holders_norms_is_left_alone():
  layer = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
  norm = nnx.SpectralNorm(layer, rngs=nnx.Rngs(0))
  model: Any = nnx.Dict(a=layer, b=norm, c=nnx.Linear(64, 64, rngs=nnx.Rngs(1)))
  with pytest.warns(UserWarning, match="SpectralNorm changes its weight"):
    nn.quantize_model(model, exclude=None)
  assert model.a is layer and isinstance(model.c, nn.NF4Linear)


@pytest.mark.parametrize("rank", [[2.5, 4], [True, 4], [-1, 4], [0, 0], "4"])
def test_ranks_of_a_stack_are_integers(rank):
  make = nnx.vmap(lambda r: nnx.Linear(8, 8, rngs=r))
  base = nnx.split_rngs(splits=2)(make)(nnx.Rngs(0))
  with pytest.raises(ValueError, match="`rank` must be an integer"):
    nn.LoRALinear(base, rank, 4, rngs=nnx.Rngs(0))
