"""Layers found by a call that the model makes, where guesses cannot prove them."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optax_lowmem import nn

SHAPE = jax.ShapeDtypeStruct((2, 6, 64), jnp.float32)


def normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


class Plain(nnx.Module):
  """x W, of a class of its own."""

  def __init__(self, inputs, outputs, seed=0):
    self.w = nnx.Param(normal(inputs, outputs, seed=seed) / inputs**0.5)

  def __call__(self, x):
    return x @ self.w[...]


class Pooled(Plain):
  """Takes inputs of one length only, which is in none of its arrays."""

  def __call__(self, x):
    if x.shape[-2] != 6:
      raise ValueError(f"six tokens, got {x.shape}")
    return x @ self.w[...]


class Stack(nnx.Module):
  """Square matrices under scan: by its weight it might as well be one layer of experts."""

  def __init__(self, count=3, kind=Plain):
    seeds = jnp.arange(count)
    self.layers: Any = nnx.vmap(lambda _: nnx.Dict(proj=kind(64, 64)), in_axes=0)(seeds)
    self.layers["proj"].w[...] = normal(count, 64, 64, seed=3) / 8

  def __call__(self, x):
    body = nnx.remat(lambda layer, x: jnp.tanh(layer["proj"](x)))
    return nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


class Model(nnx.Module):
  def __init__(self):
    self.first: Any = Pooled(64, 64)
    self.stack = Stack()
    self.unused = Plain(64, 32)
    self.extra = nnx.Linear(64, 32, rngs=nnx.Rngs(0))

  def __call__(self, x, short=False):
    y = self.stack(self.first(x))
    return y if short else self.extra(y)


def test_finds_what_guesses_cannot_prove():
  model = Model()
  before = jax.tree.leaves(nnx.split(model))
  layers = nn.find_layers(model, SHAPE)
  assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.split(model)), strict=True))
  assert layers.names == ["first", "stack.layers.proj", "extra"]
  first, stacked, extra = layers.layers
  assert (first.kind, first.weight_shape, first.inputs[0][0]) == ("Pooled", (64, 64), (2, 6, 64))
  assert (stacked.stack, stacked.weight_shape) == ((3,), (3, 64, 64))
  assert stacked.contraction.equation == "abc,cd->abd" and stacked.matrix_shape == (64, 64)
  assert extra.matrix_shape == (32, 64)
  assert layers.others == (("unused", "Plain: the call does not come to it"),)

  with pytest.warns(UserWarning, match=r"first.*no input that could be guessed.*stack.*not clear"):
    guessed = nn.add_lora(Model(), 4, 8, rngs=nnx.Rngs(0))
  assert type(guessed.first) is Pooled and type(guessed.unused) is nn.LoRALinear


@pytest.mark.parametrize("codebook", [None, "int8"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init": "pissa"}])
def test_adapts_and_packs_them(codebook, options):
  model, x = Model(), normal(2, 6, 64, seed=1)
  want = model(x)
  layers = nn.find_layers(model, x)
  if codebook:
    with pytest.warns(UserWarning, match="`unused` .Plain: the call does not come to it"):
      nn.quantize_model(model, codebook=codebook, layers=layers)
    assert model.stack.layers["proj"].weight.get_value().shape == (3, 64, 64)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    nn.add_lora(model, 4, 8, layers=layers, rngs=nnx.Rngs(0), **options)
  np.testing.assert_allclose(model(x), want, rtol=0, atol=0.1 if codebook else 1e-4)
  stacked = model.stack.layers["proj"]
  assert stacked.lora_a.shape == (3, 64, 4) and type(model.unused) is Plain

  @nnx.jit
  def gradients(model):
    return nnx.grad(lambda m: (m(x) ** 2).mean(), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)

  assert all(
    bool(jnp.abs(g).max() > 0) for g in jax.tree.leaves(gradients(model)["first"]["lora_b"])
  )
  for layer in (model.first, stacked):
    layer.lora_b[...] = layer.lora_b[...] + normal(*layer.lora_b.shape, seed=2) / 8
  adapted = nnx.clone(model)(x)
  merged = nn.merge_lora(model)
  np.testing.assert_allclose(merged(x), adapted, rtol=0, atol=1e-4)
  assert type(merged.first) is Pooled and set(vars(merged.first)) == set(vars(Pooled(64, 64)))


def test_leaves_no_note_behind():
  model = Model()
  layers = nn.find_layers(model, SHAPE)
  before = nnx.graphdef(model)
  with pytest.raises(ValueError, match="matches no module"):
    nn.add_lora(model, 4, 8, "unused", layers=layers, rngs=nnx.Rngs(0))
  assert nnx.graphdef(model) == before


def test_sees_another_method_and_flags():
  model = Model()
  assert nn.find_layers(model, SHAPE, short=True).names == ["first", "stack.layers.proj"]
  found = nn.find_layers(model, SHAPE, method=lambda model, x: model.unused(x))
  assert found.names == ["unused"]
  assert [path for path, _ in found.others] == ["first", "stack.layers.proj", "extra"]


class Scaled(Plain):
  def __call__(self, x, scale=None):
    return x @ self.w[...] if scale is None else scale * (x @ self.w[...])


class Caller(nnx.Module):
  def __init__(self):
    self.a = Scaled(64, 64)

  def __call__(self, x, scale):
    return self.a(x, scale=scale)


def test_a_layer_that_is_given_more_than_an_input_is_none():
  layers = nn.find_layers(Caller(), SHAPE, 2.0)
  assert layers.others == (("a", "Scaled: it is called with more than an input: scale"),)
  assert nn.find_layers(Caller(), SHAPE, None).names == ["a"]


class Picky(nnx.Module):
  """Asks of what class a layer is, and calls it in ways of its own."""

  def __init__(self):
    self.linear = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    self.a, self.b = Scaled(64, 64), Scaled(64, 64)

  def __call__(self, x, way):
    assert isinstance(self.linear, nnx.Linear) and type(self.a).__name__ == "Scaled"
    return self.linear(way(self, x))


@pytest.mark.parametrize(
  ("way", "names", "others"),
  [
    (lambda m, x: m.a(x=x, scale=None), ["a", "linear"], {}),
    (lambda m, x: m.a(scale=2.0, x=x), ["linear"], {"a": "more than an input: scale"}),
    (lambda m, x: m.a(x, 2.0), ["linear"], {"a": "more than an input: scale"}),
    (lambda m, x: m.b(m.a(x)[:, :3]), ["a", "b", "linear"], {}),
  ],
)
def test_calls_are_read_by_the_names_of_parameters(way, names, others):
  found = nn.find_layers(Picky(), SHAPE, way)
  assert found.names == names
  reasons = dict(found.others)
  assert all(reasons[name].endswith(why) for name, why in others.items())


def test_a_sharding_is_no_second_input():
  class Placed(Plain):
    def __call__(self, x, out_sharding=None):
      return x @ self.w[...]

  model, place = nnx.Dict(a=Placed(64, 64)), jax.sharding.PartitionSpec()
  for way in (
    lambda m, x: m.a(x, place),
    lambda m, x: m.a(out_sharding=place, x=x),
  ):
    assert nn.find_layers(model, SHAPE, method=way).names == ["a"]


@pytest.mark.parametrize("pytree", [True, False])
def test_layers_that_are_no_pytrees_go_through_jit(pytree):
  class Own(nnx.Module, pytree=pytree):
    def __init__(self):
      self.w = nnx.Param(normal(64, 64))

    def __call__(self, x):
      return x @ self.w[...]

  run = nnx.jit(lambda layer, x: layer(x))
  found = nn.find_layers(nnx.Dict(a=Own()), SHAPE, method=lambda m, x: run(m.a, x))
  assert found.names == ["a"]


def test_a_method_of_the_model_itself_is_refused():
  model = Model()
  with pytest.raises(TypeError, match=r"`method` must be .*`Model.__call__`, got <bound method"):
    nn.find_layers(model, SHAPE, method=model.__call__)
  assert nn.find_layers(model, SHAPE, method=Model.__call__) == nn.find_layers(model, SHAPE)


def test_sees_packed_layers_and_adapters():
  model = Model()
  layers = nn.find_layers(model, SHAPE)
  for change in (nn.quantize_model, lambda m, **k: nn.add_lora(m, 4, 8, rngs=nnx.Rngs(0), **k)):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      change(model, layers=layers)
    again = nn.find_layers(model, SHAPE)
    assert [(layer.name, layer.weight_shape) for layer in again.layers] == [
      (layer.name, layer.weight_shape) for layer in layers.layers
    ]


def test_loads_an_adapter_into_them(tmp_path):
  model, x = Model(), normal(2, 6, 64, seed=1)
  layers = nn.find_layers(model, SHAPE)
  nn.add_lora(model, 4, 8, "first|proj", layers=layers, rngs=nnx.Rngs(0))
  for layer in (model.first, model.stack.layers["proj"]):
    layer.lora_b[...] = normal(*layer.lora_b.shape, seed=2) / 8
  nn.save_peft(model, tmp_path)
  loaded = nn.load_peft(Model(), tmp_path, layers=layers)
  np.testing.assert_array_equal(loaded(x), model(x))
  with pytest.raises(ValueError, match="which `model` does not have"):
    nn.load_peft(Model(), tmp_path)


def test_names_what_no_call_can_be_seen_of():
  model: Any = nnx.Dict(b=nnx.Dict(c=Plain(64, 32)))
  model.both = nnx.data((Plain(64, 64), model.b))
  found = nn.find_layers(model, SHAPE, method=lambda model, x: model.both[0](x))
  assert [path for path, _ in found.others] == ["b.c", "both.0"]
  assert "does not come" in found.others[0][1] and "held in a tuple" in found.others[1][1]


def test_layers_of_another_model_are_refused():
  layers = nn.find_layers(Model(), SHAPE)
  other = nnx.Dict(firs=Plain(64, 64))
  with pytest.raises(ValueError, match=r"`layers` has `first`.*no such layer.*Nearest: firs"):
    nn.quantize_model(other, layers=layers)
  model = Model()
  model.first = Pooled(64, 32)
  with pytest.raises(ValueError, match=r"`first` with a weight of shape \(64, 64\).*\(64, 32\)"):
    nn.add_lora(model, 4, 8, layers=layers, rngs=nnx.Rngs(0))
  with pytest.raises(TypeError, match="`layers` must be what `find_layers` returns, got tuple"):
    nn.quantize_model(other, layers=tuple(layers.layers))  # pyright: ignore[reportArgumentType]
  with pytest.raises(TypeError, match=r"must be an nnx.Module"):
    nn.find_layers(dataclasses, SHAPE)  # pyright: ignore[reportArgumentType]
  assert repr(layers) == "Layers(3 found: first, stack.layers.proj, extra; others: 1)"
