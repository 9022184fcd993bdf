"""Models whose linear layers are of other classes: found by what they compute, not by name."""

import importlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from optax_lowmem import nn
from optax_lowmem.nn._proofs.product import NotAProduct, prove
from optax_lowmem.nn._proofs.reading import read


def normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def param(*shape, seed=0, **metadata):
  with nnx.use_eager_sharding(False):
    return nnx.Param(normal(*shape, seed=seed) / shape[-2] ** 0.5, **metadata)


class Einsum(nnx.Module):
  """As packages of language models write it: the equation in an attribute, the weight in `w`."""

  def __init__(self, equation, shape, dtype=None, seed=0):
    self.equation, self.shape, self.dtype = equation, shape, dtype
    self.w = param(*shape, seed=seed, out_sharding=("data",) + (None,) * (len(shape) - 1))

  @jax.named_scope("einsum")
  def __call__(self, x):
    w = self.w[...]
    if self.dtype is not None:
      x, w = x.astype(self.dtype), w.astype(self.dtype)
    return jnp.einsum(self.equation, x, w)


class Dense(nnx.Module):
  """x W + b, with names of its own."""

  def __init__(self, inputs, outputs, seed=0):
    self.matrix, self.offset = param(inputs, outputs, seed=seed), nnx.Param(normal(outputs))

  def __call__(self, x):
    return self.product(x) + self.offset

  def product(self, x):
    return x @ self.matrix


class Transposed(Dense):
  """W is (out, in), as in PyTorch; computed in bfloat16 under `jax.checkpoint`."""

  def __init__(self, inputs, outputs, seed=0):
    self.matrix = param(outputs, inputs, seed=seed)

  def __call__(self, x):
    f = jax.checkpoint(lambda x, w: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16).T)
    return f(x, self.matrix[...]).astype(x.dtype)


class Reshaped(Dense):
  """A projection to heads by way of a plain matrix product."""

  def __init__(self, inputs, heads, size):
    self.matrix = param(inputs, heads, size)

  def __call__(self, x):
    inputs, heads, size = self.matrix.shape
    return (x @ self.matrix[...].reshape(inputs, heads * size)).reshape(*x.shape[:-1], heads, size)


LINEAR = {
  "q": (Einsum("BTD,NDH->BTNH", (4, 64, 16)), (2, 5, 64), (64, 64)),
  "kv": (Einsum("BSD,CKDH->CBSKH", (2, 1, 64, 16)), (2, 5, 64), (32, 64)),
  "o": (Einsum("BTNH,NHD->BTD", (4, 16, 64)), (2, 5, 4, 16), (64, 64)),
  "ellipsis": (Einsum("...D,DF->...F", (64, 32)), (3, 2, 5, 64), (32, 64)),
  "square": (Einsum("TBD,DF->BTF", (64, 64)), (5, 2, 64), (64, 64)),
  "experts": (Einsum("BTED,EDF->BTEF", (3, 64, 32)), (2, 5, 3, 64), (3, 32, 64)),
  "bfloat16": (Einsum("BTD,DF->BTF", (64, 32), jnp.bfloat16), (2, 5, 64), (32, 64)),
  "dense": (Dense(64, 32), (5, 64), (32, 64)),
  "transposed": (Transposed(64, 32), (2, 5, 64), (32, 64)),
  "reshaped": (Reshaped(64, 4, 8), (2, 5, 64), (32, 64)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_layer_of_any_class_is_seen_as_its_matrix(name):
  module, shape, matrix = LINEAR[name]
  x = normal(*shape, seed=1)
  y = module(x)
  layer = nn.LoRALinear(nnx.clone(module), 4, 8, rngs=nnx.Rngs(1))
  assert (layer.lora_b.shape[-1], layer.lora_a.shape[-2]) == matrix[-2:]
  assert layer(x).dtype == y.dtype and bool((layer(x) == y).all())

  # Against jnp.einsum itself: what the module computes with its weight changed by A B.
  layer.lora_b[...] = normal(*layer.lora_b.shape, seed=2) / 8
  merged = layer.merge()
  assert type(merged) is type(module)
  tolerance = 2e-2 if name in ("bfloat16", "transposed") else 1e-5
  np.testing.assert_allclose(merged(x), layer(x), rtol=tolerance, atol=tolerance)
  assert float(jnp.abs(merged(x) - y).max()) > 0.1

  # A module with the decoded weight computes what the packed one does.
  packed = nn.QuantizedModule(nnx.clone(module))
  assert packed.weight.get_value().shape == matrix
  decoded = nn.LoRALinear(packed, 4, 8, rngs=nnx.Rngs(1)).merge()
  z = packed(x)
  assert (z.dtype, z.shape) == (y.dtype, y.shape)
  np.testing.assert_allclose(z, decoded(x), rtol=tolerance, atol=tolerance)
  assert 0 < float(jnp.abs(z - y).max()) < 0.5 * float(jnp.abs(y).max())


class Scaled(Dense):
  def __call__(self, x):
    return 2 * self.product(x) + self.offset


class Gated(Dense):
  def __call__(self, x):
    return jax.nn.sigmoid(self.product(x) + self.offset)


class Residual(Dense):
  def __call__(self, x):
    return x + self.product(x) + self.offset


class Twice(Dense):
  def __call__(self, x):
    return self.product(self.product(x)) + self.offset


class Swapped(Dense):
  """The weight follows the input."""

  def __call__(self, x):
    return x @ (self.matrix * jnp.mean(x)) + self.offset


class Clipped(Dense):
  def __call__(self, x):
    return x @ jnp.clip(self.matrix[...], -0.1, 0.1) + self.offset


class Diagonal(Dense):
  def __call__(self, x):
    return x * jnp.diagonal(self.matrix[...]) + self.offset


class Summed(Dense):
  def __call__(self, x):
    return jnp.einsum("...i,io->...", x, self.matrix)[..., None] + self.offset


class Stopped(Dense):
  """The input gets no gradient, which a packed layer would give it."""

  def __call__(self, x):
    return jax.lax.stop_gradient(x) @ self.matrix + self.offset


class Counted(Dense):
  def __call__(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return self.product(x) + self.offset


class Moody(Dense):
  """Linear in evaluation only: packed in that mode, it would stay linear in training."""

  deterministic = True

  def __init__(self, *args):
    super().__init__(*args)
    self.deterministic = True

  def __call__(self, x):
    y = self.product(x) + self.offset
    return y if self.deterministic else jnp.tanh(y)


class WrongBias(Dense):
  def __call__(self, x):
    return self.product(x) + self.offset[::-1]


OTHER = (
  Scaled, Gated, Residual, Twice, Swapped, Clipped, Diagonal, Summed, Stopped, Counted, Moody,
  WrongBias,
)  # fmt: skip


@pytest.mark.parametrize("kind", OTHER)
def test_what_computes_something_else_is_refused(kind):
  module = kind(64, 64)
  with pytest.raises(TypeError, match=kind.__name__):
    nn.QuantizedModule(module)
  with pytest.raises(TypeError, match=kind.__name__):
    nn.LoRALinear(module, 4, 8, rngs=nnx.Rngs(0))
  assert read(module).reason


class Sharded(Dense):
  """Must be told how its output is to lie."""

  def __call__(self, x, *, out_sharding):  # pyright: ignore[reportIncompatibleMethodOverride]
    return jnp.einsum("...i,io->...o", x, self.matrix[...], out_sharding=out_sharding) + self.offset


class ShardedInOrder(Dense):
  def __call__(self, x, out_sharding):  # pyright: ignore[reportIncompatibleMethodOverride]
    return jnp.einsum("...i,io->...o", x, self.matrix[...], out_sharding=out_sharding) + self.offset


class Noted(Dense):
  """Holds arrays that are no Variables, of more axes than its weight, and does not use them."""

  def __init__(self, *args):
    super().__init__(*args)
    self.statistics, self.seed = np.arange(24.0).reshape(2, 3, 4), jax.random.key(0)

  def __call__(self, x, out_sharding=None):
    return self.product(x) + self.offset


@pytest.mark.parametrize("kind", [Sharded, ShardedInOrder, Noted])
def test_a_sharding_that_must_be_given_and_constants_are_no_hindrance(kind):
  model, x = nnx.Dict(a=kind(64, 32)), normal(2, 5, 64)

  def call(layer, place):
    return layer(x, place) if kind is ShardedInOrder else layer(x, out_sharding=place)

  y = call(model.a, None)
  assert bool((call(nn.LoRALinear(nnx.clone(model.a), 4, 8, rngs=nnx.Rngs(1)), None) == y).all())
  nn.quantize_model(model)
  packed = call(model.a, None)
  assert isinstance(model.a, nn.QuantizedModule) and packed.shape == y.shape
  assert 0 < float(jnp.abs(packed - y).max()) < 0.5 * float(jnp.abs(y).max())
  nn.add_lora(model, 4, 8, rngs=nnx.Rngs(1))
  model = nnx.clone(model)
  assert bool((nnx.jit(call, static_argnums=1)(model.a, None) == packed).all())
  with jax.set_mesh(jax.make_mesh((1,), ("data",))):
    np.testing.assert_array_equal(call(model.a, jax.P("data")), packed)
  model.a.lora_b[...] = normal(*model.a.lora_b.shape, seed=2) / 8
  adapted, merged = call(model.a, None), nn.merge_lora(model).a
  assert type(merged) is kind
  np.testing.assert_allclose(call(merged, None), adapted, rtol=1e-5, atol=1e-5)
  if kind is Noted:
    np.testing.assert_array_equal(merged.statistics, np.arange(24.0).reshape(2, 3, 4))
    assert merged.seed == jax.random.key(0)


class NotedAndUsed(Noted):
  def __call__(self, x):  # pyright: ignore[reportIncompatibleMethodOverride]
    return self.product(x) * self.statistics[0, 1, 2] + self.offset


class Training(Dense):
  def __call__(self, x, *, train):  # pyright: ignore[reportIncompatibleMethodOverride]
    return self.product(x) + self.offset


@pytest.mark.parametrize(
  ("kind", "reason"),
  [(NotedAndUsed, "`mul` with a constant"), (Training, "its `__call__` needs `train`")],
)
def test_a_constant_in_the_product_and_other_arguments_are(kind, reason):
  with pytest.raises(TypeError, match=reason):
    nn.QuantizedModule(kind(64, 32))
  with pytest.warns(UserWarning, match=reason):
    nn.quantize_model(nnx.Dict(a=kind(64, 32), b=Dense(64, 32)))


class ByRank(Dense):
  """A product for matrices; for other inputs, something else."""

  def __call__(self, x):
    return x @ self.matrix + self.offset if x.ndim == 3 else 2 * x @ self.matrix + self.offset


def test_is_proved_again_for_the_input_that_comes():
  for wrap in (nn.QuantizedModule, lambda m: nn.LoRALinear(m, 4, 8, rngs=nnx.Rngs(0))):
    layer = wrap(ByRank(64, 64))
    assert layer(normal(2, 3, 64)).shape == (2, 3, 64)
    with pytest.raises(ValueError, match=r"was proved .* `mul` with a constant"):
      layer(normal(3, 64))


class Turned(Dense):
  """A product for all inputs, in which the square matrix changes sides."""

  def __call__(self, x):
    return x @ (self.matrix if x.ndim == 3 else self.matrix.T) + self.offset


@pytest.mark.parametrize("codebook", [None, "int8"])
def test_a_weight_that_changes_sides_is_refused(codebook):
  model = nnx.Dict(a=Turned(64, 64))
  x = normal(2, 3, 64)
  want = model.a(x)
  if codebook:
    nn.quantize_model(model, codebook=codebook)
  nn.add_lora(model, 4, 8, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(model.a(x), want, rtol=0, atol=0.01 * float(jnp.abs(want).max()))
  with pytest.raises(ValueError, match=r"was proved .* other axes of its weight"):
    model.a(x[0])


def test_multiplies_in_the_precision_of_the_moment():
  layer = nn.QuantizedModule(Dense(64, 64))
  x, text = normal(3, 64), []
  for precision in ("float32", None):
    with jax.default_matmul_precision(precision):
      text.append(str(jax.make_jaxpr(lambda x: layer(x))(x)))
  assert "HIGHEST" in text[0] and "HIGHEST" not in text[1]


class Attention(nnx.Module):
  """In the pattern of Gemma, which asks its layers for shapes."""

  def __init__(self, width=64, heads=4, size=16):
    self.q_einsum = Einsum("BTD,NDH->BTNH", (heads, width, size), seed=1)
    self.kv_einsum = Einsum("BSD,CKDH->CBSKH", (2, 1, width, size), seed=2)
    self.attn_vec_einsum = Einsum("BTNH,NHD->BTD", (heads, size, width), seed=3)

  def __call__(self, x):
    size, _ = self.attn_vec_einsum.shape[1], self.q_einsum.w.shape
    assert self.q_einsum.w.shape == self.q_einsum.shape
    q = self.q_einsum(x)
    k, v = self.kv_einsum(x)
    p = jax.nn.softmax(jnp.einsum("BTNH,BSKH->BTNS", q, k) / size**0.5)
    return self.attn_vec_einsum(jnp.einsum("BTNS,BSKH->BTNH", p, v))


class Model(nnx.Module):
  """A table with `encode` and `decode`, attention by Einsum, an MLP by Dense and nnx.Linear."""

  def __init__(self):
    self.table = nnx.Param(normal(32, 64))
    self.layers = nnx.List([nnx.Dict(attn=Attention(), up=Dense(64, 128)) for _ in range(2)])
    for layer in self.layers:
      layer["down"] = nnx.Linear(128, 64, rngs=nnx.Rngs(0))

  def __call__(self, ids):
    x = self.table[ids]
    for layer in self.layers:
      x = x + layer["attn"](x)
      x = x + layer["down"](jax.nn.gelu(layer["up"](x)))
    return x @ self.table[...].T


IDS = jax.random.randint(jax.random.key(5), (2, 6), 0, 32)


def loss(model, ids):
  y = optax.softmax_cross_entropy_with_integer_labels(model(ids), jnp.roll(ids, -1, 1))
  return y.mean()


def others(model):
  """The arrays that no optimizer of adapters may touch."""
  state = nnx.state(model, nnx.Not(nnx.LoRAParam))
  return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def test_trains_a_model_of_such_layers():
  model: Any = Model()
  logits = model(IDS)
  float_adapted = nn.add_lora(Model(), 4, 8, rngs=nnx.Rngs(1))
  assert bool((float_adapted(IDS) == logits).all())
  assert len([m for _, m in nnx.iter_modules(float_adapted) if isinstance(m, nn.LoRALinear)]) == 10

  nn.quantize_model(model)
  packed = [m for _, m in nnx.iter_modules(model) if hasattr(m, "dequantize")]
  assert len(packed) == 10 and isinstance(model.layers[1]["attn"].q_einsum, nn.QuantizedModule)
  quantized = model(IDS)
  # Attention by weights that are 4-bit; far logits would mean axes in the wrong order.
  assert np.corrcoef(quantized.ravel(), logits.ravel())[0, 1] > 0.97
  nn.add_lora(model, 4, 8, rngs=nnx.Rngs(1))
  assert bool((model(IDS) == quantized).all())

  before = others(model)
  optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

  @nnx.jit
  def step(model, optimizer):
    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, IDS)
    optimizer.update(model, grads)
    return value

  losses = [float(step(model, optimizer)) for _ in range(5)]
  assert losses[-1] < losses[0] - 0.5
  assert all(np.array_equal(a, b) for a, b in zip(before, others(model), strict=True))
  model = nnx.clone(model)
  adapted = model(IDS)
  merged = nn.merge_lora(model)
  assert type(merged.layers[0]["attn"].q_einsum) is Einsum
  assert merged.layers[0]["attn"].q_einsum.w.get_metadata()["out_sharding"][0] == "data"
  np.testing.assert_allclose(merged(IDS), adapted, atol=1e-4 * float(jnp.abs(adapted).max()))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init": "pissa"}, {"init": "loftq"}])
def test_options_of_adapters_hold_for_such_layers(options):
  for name in ("kv", "experts", "dense"):
    module, shape, _ = LINEAR[name]
    x = normal(*shape, seed=1)
    layer = nn.LoRALinear(nnx.clone(module), 4, 8, rngs=nnx.Rngs(1), **options)
    if "loftq" not in options.values():
      np.testing.assert_allclose(layer(x), module(x), rtol=1e-4, atol=1e-4)
    layer.lora_b[...] = layer.lora_b[...] + normal(*layer.lora_b.shape, seed=2) / 8
    np.testing.assert_allclose(layer.merge()(x), layer(x), rtol=1e-4, atol=1e-4)


def test_a_bias_of_another_name_is_trained_and_the_adapters_own_refused():
  model: Any = nnx.Dict(a=Dense(64, 32))
  nn.add_lora(model, 4, 8, bias="lora_only", rngs=nnx.Rngs(0))
  assert isinstance(model["a"].base.offset, nnx.LoRAParam)
  assert model["a"](normal(3, 64)).shape == (3, 32)
  with pytest.raises(ValueError, match="`lora_bias` needs a `bias` in the base"):
    nn.LoRALinear(Dense(64, 32), 4, 8, lora_bias=True, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("packed", [False, True])
def test_such_layers_are_written_merged(tmp_path, packed):
  model: Any = nnx.Dict(q=LINEAR["q"][0], dense=Dense(64, 32), out=Transposed(32, 64))
  model = nnx.clone(model)
  if packed:
    nn.quantize_model(model)
  nn.add_lora(model, 4, 8, rngs=nnx.Rngs(1))
  for layer in model.values():
    layer.lora_b[...] = normal(*layer.lora_b.shape, seed=2) / 8
  nn.save_merged(model, tmp_path / "out")
  written = load_file(tmp_path / "out/model.safetensors")
  assert set(written) == {"q.weight", "dense.weight", "dense.bias", "out.weight"}
  for name, layer in model.items():
    want = layer.merged_matrix()
    np.testing.assert_allclose(written[f"{name}.weight"], want, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(written["dense.bias"], normal(32))


def test_works_in_a_stack_under_scan():
  seeds = jnp.arange(3)
  layers = nnx.vmap(lambda _: Dense(64, 64), in_axes=0)(seeds)
  layers.matrix[...] = normal(3, 64, 64, seed=3) / 8
  x = normal(2, 5, 64, seed=1)

  def run(layers):
    body = nnx.remat(lambda layer, x: jnp.tanh(layer(x)))
    return nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(layers, x)

  y = run(layers)
  model: Any = nn.add_lora(nnx.Dict(layers=nnx.clone(layers)), 4, 8, rngs=nnx.Rngs(0))
  assert model["layers"].lora_a.shape == (3, 64, 4)
  assert bool((run(model["layers"]) == y).all())
  model = nn.quantize_model(nnx.Dict(layers=nnx.clone(layers)))
  assert model["layers"].weight.get_value().shape == (3, 64, 64)
  z = run(model["layers"])
  assert 0 < float(jnp.abs(z - y).max()) < 0.5
  with pytest.raises(ValueError, match="stack of layers"):
    model["layers"](x)


def test_surgery_works_on_shapes_alone():
  def make():
    return nn.add_lora(nn.quantize_model(Model()), 4, 8, rngs=nnx.Rngs(1))

  shapes = [(v.shape, v.dtype) for v in jax.tree.leaves(nnx.state(nnx.eval_shape(make)))]
  assert shapes == [(v.shape, v.dtype) for v in jax.tree.leaves(nnx.state(make()))]


# What a model asks of its layers.


def test_settings_and_shapes_are_handed_on_but_no_arrays_and_no_methods():
  dense, einsum = Dense(64, 32), LINEAR["q"][0]
  linear = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
  wrapper: Any
  for module, name in ((dense, "matrix"), (einsum, "w"), (linear, "kernel")):
    shape = getattr(module, name).shape
    packed = nn.quantize_model(nnx.Dict(a=nnx.clone(module)))["a"]
    for wrapper in (
      packed,
      nn.LoRALinear(nnx.clone(module), 4, 8, rngs=nnx.Rngs(0)),
      nn.LoRALinear(packed, 4, 8, rngs=nnx.Rngs(0)),
    ):
      assert getattr(wrapper, name).shape == shape
      with pytest.raises(TypeError):  # who multiplies past the adapter learns of it
        _ = normal(3, 64) @ getattr(wrapper, name)
      with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = wrapper.nothing
      if module is dense:
        with pytest.raises(AttributeError, match="no attribute 'product'"):
          _ = wrapper.product
      if module is einsum:
        assert wrapper.equation == "BTD,NDH->BTNH"


def test_multi_head_attention_of_flax_and_its_out_sharding():
  def make():
    return nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(0))

  x = normal(2, 5, 64)
  y = make()(x)
  assert bool((nn.add_lora(nnx.Dict(a=make()), 4, 8, rngs=nnx.Rngs(0))["a"](x) == y).all())
  model = nn.add_lora(nn.quantize_model(nnx.Dict(a=make())), 4, 8, rngs=nnx.Rngs(0))
  assert float(jnp.abs(model["a"](x) - y).max()) < 0.5
  for axes in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
    with jax.set_mesh(jax.make_mesh((1,), ("data",), (axes,))):
      z = jax.jit(lambda x: model["a"](x, out_sharding=jax.P("data")))(x)
    np.testing.assert_allclose(z, model["a"](x), atol=1e-5)


# What is not found is said.


class Experts(nnx.Module):
  """All experts in one array each, multiplied by in `__call__`."""

  def __init__(self):
    self.router = nnx.Linear(64, 3, rngs=nnx.Rngs(0))
    self.up, self.down = param(3, 64, 128), param(3, 128, 64)

  def __call__(self, x):
    h = jax.nn.gelu(jnp.einsum("btd,edf->btef", x, self.up))
    y = jnp.einsum("btef,efd->bted", h, self.down)
    return jnp.einsum("bted,bte->btd", y, jax.nn.softmax(self.router(x)))


def test_weights_that_no_layer_was_found_for_are_named():
  def model():
    return nnx.Dict(layers=nnx.List([nnx.Dict(mlp=Experts(), gate=Gated(64, 64))] * 2))

  with pytest.warns(UserWarning, match=r"`layers.\*.mlp` \(Experts: it holds .*`up`") as caught:
    nn.quantize_model(model())
  assert "`layers.*.gate` (Gated: it does more than multiply: `logistic`" in str(caught[0].message)
  with pytest.warns(UserWarning, match="no adapter on some weights"):
    nn.add_lora(model(), 4, 8, rngs=nnx.Rngs(0))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    nn.add_lora(nn.quantize_model(model(), targets="router"), 4, 8, "router", rngs=nnx.Rngs(0))


def test_a_model_with_no_linear_layer_raises_and_says_what_it_holds():
  model = nnx.Dict(a=Gated(64, 64))
  with pytest.raises(ValueError, match=r"no linear layer .*`a` \(Gated: it does more"):
    nn.quantize_model(model)
  with pytest.raises(ValueError, match=r"no linear layer .*`a` \(Gated: it does more"):
    nn.add_lora(model, 4, 8, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"`a` is a Gated, no linear layer: it does more"):
    nn.add_lora(model, 4, 8, "a", rngs=nnx.Rngs(0))


def test_a_model_of_flax_layers_alone_gives_no_warning():
  class Vision(nnx.Module):
    def __init__(self):
      self.patches = nnx.Conv(3, 64, (4, 4), rngs=nnx.Rngs(0))
      self.position, self.token = param(16, 64), nnx.Param(normal(1, 1, 64))
      self.attention = nnx.MultiHeadAttention(4, 64, rngs=nnx.Rngs(0))
      self.embed = nnx.Embed(8, 64, rngs=nnx.Rngs(0))

  with warnings.catch_warnings():
    warnings.simplefilter("error")
    nn.add_lora(nn.quantize_model(Vision()), 4, 8, rngs=nnx.Rngs(0))


# Models of packages, where they are installed. `benchmarks/foreign_models.py` has more.


@pytest.mark.slow
@pytest.mark.parametrize("package", ["tunix", "dantinox", "mamba2_jax", "vitax"])
def test_packages(package):
  pytest.importorskip(package)
  table = importlib.import_module("benchmarks.foreign_models")
  for name, (_, build) in table.MODELS.items():
    if not name.startswith(package):
      continue
    result = table.measure(build)
    assert result.linears == result.packed == result.adapters > 0, name
    assert result.exact and result.frozen, name
    assert result.losses[1] < result.losses[0] and result.merged_error < 1e-4, name


class Mixed(nnx.Module):
  """Multiplies in bfloat16, and adds a float32 bias in float32."""

  def __init__(self):
    self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (64, 64)).astype(jnp.bfloat16))
    self.shift = nnx.Param(100 + jax.random.normal(jax.random.key(1), (64,)))

  def __call__(self, x):
    return (x.astype(jnp.bfloat16) @ self.kernel).astype(jnp.float32) + self.shift


def test_a_bias_keeps_its_dtype():
  layer, x = Mixed(), jnp.zeros((2, 64))
  packed = nn.quantize_model(nnx.Dict(a=nnx.clone(layer)))["a"]
  np.testing.assert_array_equal(packed(x), layer(x))


def test_settings_are_not_hidden_by_those_of_the_packed_layer():
  layer: Any = Mixed()
  layer.dtype, layer.precision = jnp.float32, "highest"
  packed = nn.quantize_model(nnx.Dict(a=nnx.clone(layer)))["a"]
  assert (packed.dtype, packed.precision) == (jnp.float32, "highest")
  assert not hasattr(nn.quantize_model(nnx.Dict(a=Mixed()))["a"], "dtype")


@jax.custom_jvp
def scaled_gradient(x, w):
  return x @ w


scaled_gradient.defjvp(lambda primals, tangents: (scaled_gradient(*primals), 2 * primals[0]))


def with_callback(x, w):
  jax.debug.callback(lambda w: None, w)
  return x @ w


@pytest.mark.parametrize(
  ("fn", "name"), [(scaled_gradient, "custom_jvp_call"), (with_callback, "debug_callback")]
)
def test_a_product_with_more_to_it_is_none(fn, name):
  """With a derivative of its own it is not opened, and what returns nothing is no way around."""
  with pytest.raises(NotAProduct, match=f"more than multiply: `{name}`"):
    prove(jax.make_jaxpr(fn)(normal(2, 3), normal(3, 4)), "xw")
