"""NF4Linear: its bits are bitsandbytes', its products those of the decoded weight."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optax_lowmem import nn, quantize
from programs import temporaries_of

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "b_4bit.npz")


def normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("name", ["w300x64", "zeros16x64"])
def test_bits_are_those_of_bitsandbytes(name):
  want = {key: GOLDEN[f"nf4/{name}/plain/{key}"] for key in ("packed", "absmax", "deq")}
  layer = nn.NF4Linear.from_weight(GOLDEN[f"x/{name}"], double_quantize=False)
  q = layer.weight.get_value()
  np.testing.assert_array_equal(np.asarray(q.codes).reshape(-1), want["packed"].reshape(-1))
  np.testing.assert_array_equal(np.asarray(q.scales).reshape(-1), want["absmax"])
  np.testing.assert_array_equal(layer.dequantize(), want["deq"])


@pytest.mark.parametrize("name", ["w300x64", "zeros16x64"])
def test_doubly_quantized_bits_are_those_of_bitsandbytes(name):
  keys = ("packed", "qabsmax_exact", "state2_absmax", "offset", "absmax_exact", "deq_exact")
  want = {key: GOLDEN[f"nf4/{name}/dq/{key}"] for key in keys}
  layer = nn.NF4Linear.from_weight(GOLDEN[f"x/{name}"])
  q = layer.weight.get_value()
  np.testing.assert_array_equal(np.asarray(q.codes).reshape(-1), want["packed"].reshape(-1))
  np.testing.assert_array_equal(q.scales.codes, want["qabsmax_exact"])
  # The offset is a mean of 300 numbers, where the order of the sum decides the last bits: torch's
  # own differs by one unit from the correctly rounded mean.
  np.testing.assert_array_max_ulp(np.asarray(q.scales.offset), want["offset"], maxulp=2)
  # All that follows from the offset is equal, bit for bit, once the offset is.
  offset = jnp.asarray(want["offset"])
  nested = quantize(jnp.asarray(GOLDEN[f"nf4/{name}/plain/absmax"]) - offset, "dynamic", 256)
  np.testing.assert_array_equal(nested.codes, want["qabsmax_exact"])
  np.testing.assert_array_equal(nested.scales, want["state2_absmax"])
  scales = dataclasses.replace(nested, offset=offset)
  np.testing.assert_array_equal(scales.dequantize(), want["absmax_exact"])
  exact = nn.NF4Linear(dataclasses.replace(q, scales=scales))
  np.testing.assert_array_equal(exact.dequantize(), want["deq_exact"])
  # Two units of the offset, and one more of rounding, on blocks of which 1 is the largest code.
  bound = 3 * np.spacing(want["offset"])
  np.testing.assert_allclose(layer.dequantize(), want["deq_exact"], rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["w33x50", "odd31x33"])
def test_other_shapes_end_each_row_in_a_shorter_block(name):
  w = GOLDEN[f"x/{name}"]
  table = GOLDEN["code/nf4"]
  scale = np.abs(w).max(axis=1, keepdims=True)  # both rows are shorter than one block
  codes = np.abs(w[..., None] / scale[..., None] - table).argmin(axis=-1)
  layer = nn.NF4Linear.from_weight(w, double_quantize=False)
  np.testing.assert_array_equal(layer.dequantize(), table[codes] * scale)
  assert (layer.out_features, layer.in_features) == w.shape
  x = normal(3, w.shape[1])
  np.testing.assert_allclose(layer(x), x @ layer.dequantize().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_product_and_gradient_are_those_of_the_decoded_weight(dtype, lead):
  weight, bias = normal(96, 128).astype(dtype), normal(96, seed=1).astype(dtype)
  layer: Any = nn.NF4Linear.from_weight(weight, bias=bias)
  x = normal(*lead, 128, seed=2).astype(dtype)
  g = normal(*lead, 96, seed=3).astype(dtype)
  dense, bias = layer.dequantize(dtype), layer.bias[...].astype(dtype)
  y, pull = jax.vjp(layer, x)
  want, want_pull = jax.vjp(lambda x: x @ dense.T + bias, x)
  assert y.dtype == want.dtype == dtype
  rtol, atol = (1e-5, 1e-4) if dtype == jnp.float32 else (2e-2, 1e-1)
  for got, right in ((y, want), (pull(g)[0], want_pull(g)[0])):
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype("f4"), right.astype("f4"), rtol=rtol, atol=atol)


def test_compute_dtype():
  layer = nn.NF4Linear.from_weight(normal(8, 64), dtype=jnp.bfloat16)
  assert layer(normal(2, 64)).dtype == jnp.bfloat16
  assert layer(jnp.ones((2, 64), jnp.int32)).dtype == jnp.bfloat16


@pytest.mark.parametrize("given", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("held", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_dtype_is_that_of_the_float_layer(dtype, held, given):
  options = {"dtype": dtype, "param_dtype": held, "rngs": nnx.Rngs(0)}
  floats = [nnx.Linear(64, 8, **options), nnx.LinearGeneral(64, (2, 4), **options)]
  x = normal(3, 64).astype(given)
  for layer in (*floats, nnx.Linear(64, 8, use_bias=False, **options)):
    packed = nn.quantize_model(nnx.Dict(a=nnx.clone(layer)))
    assert packed.a(x).dtype == layer(x).dtype
    nn.add_lora(packed, 2, 4, "a", init="pissa", rngs=nnx.Rngs(1))  # which packs a float32 weight
    assert packed.a(x).dtype == layer(x).dtype


def test_what_is_kept_for_the_backward_pass_is_the_packed_bits():
  layer = nn.NF4Linear.from_weight(normal(128, 256))
  _, pull = jax.vjp(layer, normal(4, 256))
  kept = [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, "nbytes")]
  packed = layer.weight.get_value().nbytes
  assert any(leaf.dtype == jnp.uint8 and leaf.shape == (128, 128) for leaf in kept)
  assert sum(leaf.nbytes for leaf in kept) <= packed + 64


def test_stack_is_each_layer_quantized_alone():
  weights = normal(3, 32, 128)
  stack = nn.NF4Linear.from_weight(weights).weight.get_value()
  for i in range(3):
    alone = nn.NF4Linear.from_weight(weights[i]).weight.get_value()
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
    assert jax.tree.structure(layer) == jax.tree.structure(alone)
    jax.tree.map(np.testing.assert_array_equal, layer, alone)


def test_stack_runs_under_scan_remat_vmap_and_grad():
  layer: Any = nn.NF4Linear.from_weight(normal(3, 64, 64) / 8, bias=normal(3, 64, seed=1))
  dense = layer.dequantize()
  assert dense.shape == (3, 64, 64)
  x = normal(5, 64, seed=2)

  def scanned(layer, x):
    body = nnx.remat(lambda layer, x: jnp.tanh(layer(x)))
    return nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(layer, x)

  def loop(x):
    for w, b in zip(dense, layer.bias[...], strict=True):
      x = jnp.tanh(x @ w.T + b)
    return x

  np.testing.assert_allclose(nnx.jit(scanned)(layer, x), loop(x), rtol=1e-5, atol=1e-5)
  got = nnx.grad(lambda layer, x: (scanned(layer, x) ** 2).sum(), argnums=1)(layer, x)
  want = jax.grad(lambda x: (loop(x) ** 2).sum())(x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  every = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layer, x)
  want = jnp.einsum("ti,loi->lto", x, dense) + layer.bias[...][:, None]
  np.testing.assert_allclose(every, want, rtol=1e-5, atol=1e-5)


def test_vmap_over_inputs_and_their_gradient():
  layer = nn.NF4Linear.from_weight(normal(32, 64))
  x = normal(4, 64)
  grads = jax.vmap(jax.grad(lambda x: (layer(x) ** 2).sum()))(x)
  dense = layer.dequantize()
  np.testing.assert_allclose(grads, 2 * (x @ dense.T) @ dense, rtol=1e-4, atol=1e-3)


def test_gradient_of_a_gradient():
  layer = nn.NF4Linear.from_weight(normal(32, 64) / 8)
  dense, x, v = layer.dequantize(), normal(3, 64, seed=1), normal(3, 64, seed=2)

  def curvature(multiply, x):
    def slope(x):
      gradient = jax.grad(lambda x: (jnp.tanh(multiply(x)) ** 2).sum())(x)
      return (gradient * v).sum()

    return jax.grad(slope)(x)

  want = curvature(lambda x: x @ dense.T, x)
  for one in (curvature, jax.jit(curvature, static_argnums=0)):
    np.testing.assert_allclose(one(layer, x), want, rtol=1e-5, atol=1e-5)


class Block(nnx.Module):
  """Seven linear layers, with the shapes of a Llama block."""

  def __init__(self, width, inner, rngs):
    def linear(i, o):
      return nnx.Linear(i, o, use_bias=False, rngs=rngs)

    self.q, self.k, self.v, self.o = (linear(width, width) for _ in range(4))
    self.gate, self.up = linear(width, inner), linear(width, inner)
    self.down = linear(inner, width)

  def __call__(self, x):
    x = x + self.o(jax.nn.softmax(self.q(x) @ self.k(x).T / 16) @ self.v(x))
    return x + self.down(jax.nn.silu(self.gate(x)) * self.up(x))


@nnx.split_rngs(splits=16)
@nnx.vmap(in_axes=(0, None), out_axes=0)
def stacked_blocks(rngs, width):
  return Block(width, 3 * width, rngs)


@pytest.mark.parametrize(
  ("unrolled", "remat", "dora"),
  [
    (False, False, False),
    (False, True, False),
    (False, False, True),
    (True, False, False),
    pytest.param(True, True, False, marks=pytest.mark.slow),
    pytest.param(True, False, True, marks=pytest.mark.slow),
  ],
)
def test_gradient_of_16_layers_needs_no_more_than_one_or_two(unrolled, remat, dora):
  width, tokens = 256, 4

  def build():
    if unrolled:
      model = nnx.List([Block(width, 3 * width, nnx.Rngs(0)) for _ in range(16)])
    else:
      model = nnx.List([stacked_blocks(nnx.Rngs(0), width)])
    rngs = nnx.Rngs(1)
    return nn.add_lora(nn.quantize_model(model), 8, 16, "all-linear", use_dora=dora, rngs=rngs)

  def loss(model, x):
    body = nnx.remat(lambda block, x: block(x)) if remat else lambda block, x: block(x)
    if unrolled:
      for block in model:
        x = body(block, x)
    else:
      x = nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(model[0], x)
    return (x**2).mean()

  graph, state = nnx.split(nnx.eval_shape(build))

  @jax.jit
  def gradient(state, x):
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    return nnx.grad(loss, argnums=wrt)(nnx.merge(graph, state), x)

  x = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
  compiled = gradient.lower(state, x).compile()
  layer = (4 + 3 * 3) * width * width * 4
  # 0.6 to 1.4, and 1.2 to 1.7 with DoRA; 16 and more where all weights are decoded first. Most of
  # the rest are activations.
  assert 0 < temporaries_of(compiled) < (1.8 if dora else 1.5) * layer


@pytest.mark.parametrize("x", [0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, 1e-45, 3.4e38])
def test_what_ties_decoding_to_the_input_changes_no_bit(x):
  layer = nn.NF4Linear.from_weight(normal(8, 64))
  x = jnp.zeros((2, 64)).at[0, 0].set(x)
  np.testing.assert_array_equal(jax.jit(layer)(x), jax.jit(lambda x: x @ layer.dequantize().T)(x))
  assert layer(jnp.zeros((0, 64))).shape == (0, 8)


@pytest.mark.parametrize("block_size", [2, 64, 100, None])
@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int8"])
def test_other_codes_and_blocks(codebook, block_size):
  w = normal(48, 130, seed=4)
  layer = nn.QuantizedLinear.from_weight(w, codebook=codebook, block_size=block_size)
  assert (layer.codebook, layer.in_features, layer.out_features) == (codebook, 130, 48)
  blocks = np.asarray(jnp.pad(w, ((0, 0), (0, -130 % (block_size or 130)))))
  largest = np.abs(blocks.reshape(48, -1, block_size or 130)).max(-1)
  step = {"nf4": 0.16, "fp4": 1 / 6, "int8": 0.5 / 127}[codebook]  # half the widest gap
  bound = np.repeat(largest * step, block_size or 130, axis=1)[:, :130]
  slack = 0.1 * np.abs(largest).max() if codebook != "int8" else 1e-6  # of scales in 8 bits
  assert (np.abs(layer.dequantize() - w) <= bound + slack).all()
  x, g = normal(3, 130, seed=2), normal(3, 48, seed=3)
  y, pull = jax.vjp(layer, x)
  np.testing.assert_allclose(y, x @ layer.dequantize().T, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(pull(g)[0], g @ layer.dequantize(), rtol=1e-5, atol=1e-4)


def test_fp4_bits_are_those_of_bitsandbytes():
  w = GOLDEN["x/w300x64"]
  layer = nn.QuantizedLinear.from_weight(w, codebook="fp4", double_quantize=False)
  np.testing.assert_array_equal(layer.dequantize(), GOLDEN["fp4/w300x64/plain/deq"])


def test_state_is_one_frozen_variable():
  layer = nn.NF4Linear.from_weight(normal(64, 64))
  graph, state = nnx.split(layer)
  assert isinstance(state["weight"], nn.QuantizedWeight)
  assert not jax.tree.leaves(nnx.state(layer, nnx.Param))
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == layer.weight.get_value().nbytes
  x = normal(2, 64)
  np.testing.assert_array_equal(nnx.merge(graph, state)(x), layer(x))


def test_abstract_construction_allocates_nothing():
  layer = nnx.eval_shape(lambda: nn.NF4Linear.from_weight(jnp.zeros((2, 32, 128))))
  real = nn.NF4Linear.from_weight(jnp.zeros((2, 32, 128)))
  leaves = jax.tree.leaves(nnx.state(layer))
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
  same = jax.tree.map(lambda a: (a.shape, a.dtype), (leaves, jax.tree.leaves(nnx.state(real))))
  assert same[0] == same[1]
  assert (layer.out_features, layer.in_features) == (32, 128)


def test_from_quantized_keeps_the_bits():
  q = quantize(normal(32, 64), "nf4", 64, True)
  layer = nn.NF4Linear.from_quantized(q, dtype=jnp.bfloat16)
  jax.tree.map(np.testing.assert_array_equal, layer.weight.get_value(), q)
  assert layer.dtype == jnp.bfloat16 and layer.bias is None


@pytest.mark.parametrize(
  ("call", "error", "words"),
  [
    (lambda: nn.NF4Linear.from_weight(jnp.ones((4, 64), jnp.int8)), ValueError, "int8"),
    (lambda: nn.NF4Linear.from_weight(jnp.ones(64)), ValueError, "two axes"),
    (lambda: nn.NF4Linear.from_weight(jnp.ones((4, 64)).at[1, 2].set(jnp.nan)), ValueError, "NaN"),
    (lambda: nn.NF4Linear.from_weight(jnp.ones((4, 64)), block_size=7), ValueError, "block_size"),
    (lambda: nn.NF4Linear.from_weight(jnp.ones((4, 64)), jnp.ones(64)), ValueError, "bias"),
    (
      lambda: nn.NF4Linear(jnp.ones((4, 64))),  # pyright: ignore[reportArgumentType]
      TypeError,
      "from_weight",
    ),
    (lambda: nn.NF4Linear(quantize(jnp.ones((4, 64)), "fp4", 64)), ValueError, "fp4"),
    (lambda: nn.NF4Linear(quantize(jnp.ones(64), "nf4", 64)), ValueError, "two axes"),
    (
      lambda: nn.NF4Linear.from_weight(jnp.ones((4, 64)))(jnp.ones((2, 4))),
      ValueError,
      "64 features",
    ),
    (
      lambda: nn.NF4Linear.from_weight(jnp.ones((4, 64)))(jnp.ones((2, 64), int)),
      TypeError,
      "int32",
    ),
    (
      lambda: nn.NF4Linear.from_weight(jnp.ones((2, 4, 64)))(jnp.ones((2, 64))),
      ValueError,
      "nnx.scan",
    ),
  ],
)
def test_bad_input_is_refused(call, error, words):
  with pytest.raises(error, match=words):
    call()
