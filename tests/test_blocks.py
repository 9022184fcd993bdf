"""`quantize` and `QuantizedArray`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_lowmem as lowmem
from conftest import GOLDEN
from optax_lowmem._quantization.array import encode
from optax_lowmem._quantization.codebooks import _CODEBOOKS, get_codebook


@pytest.fixture(scope="module")
def blockwise():
  return np.load(GOLDEN / "a_blockwise.npz")


@pytest.mark.parametrize("block_size", [256, 2048])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("values", ["normal", "heavy", "zeros", "wide"])
def test_codes_are_those_of_bitsandbytes(blockwise, values, signed, block_size):
  x = blockwise[f"x/{values}"]
  case = f"{values}/{'signed' if signed else 'unsigned'}/{block_size}"
  if not signed:
    x = np.abs(x)  # as the golden data was made
  name = "dynamic" if signed else "dynamic_unsigned"
  q = lowmem.quantize(x, name, block_size)
  np.testing.assert_array_equal(q.codes, blockwise[f"{case}/codes_exact"])
  np.testing.assert_array_equal(q.scales, blockwise[f"{case}/absmax"])
  np.testing.assert_array_equal(q.dequantize(), blockwise[f"{case}/deq_exact"])
  jitted = jax.jit(lowmem.quantize, static_argnums=(1, 2))(x, name, block_size)
  chex.assert_trees_all_equal(jitted, q)


@pytest.mark.parametrize("shape", ["w300x64", "zeros16x64"])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_packed_bits_are_those_of_bitsandbytes(name, shape):
  golden = np.load(GOLDEN / "b_4bit.npz")
  x, case = golden[f"x/{shape}"], f"{name}/{shape}"
  q = lowmem.quantize(x, name, 64)
  if name == "nf4":  # fp4 has two zeros, and bitsandbytes' CPU build takes now one, now the other
    np.testing.assert_array_equal(q.codes.reshape(-1, 1), golden[f"{case}/plain/packed"])
  np.testing.assert_array_equal(q.dequantize(), golden[f"{case}/plain/deq"])
  d = lowmem.quantize(x, name, 64, double_quantize=True)
  np.testing.assert_array_equal(d.codes, q.codes)
  np.testing.assert_array_equal(d.scales.codes, golden[f"{case}/dq/qabsmax_exact"])
  # The mean of the scales depends on the order of summation: 2 ulp of 0.05 here.
  np.testing.assert_allclose(d.scales.offset, golden[f"{case}/dq/offset"], rtol=3e-7, atol=8e-9)
  np.testing.assert_allclose(
    d.scales.scales, golden[f"{case}/dq/state2_absmax"], rtol=3e-7, atol=8e-9
  )
  np.testing.assert_allclose(d.dequantize(), golden[f"{case}/dq/deq_exact"], rtol=3e-7, atol=2e-8)


@pytest.mark.parametrize("name", _CODEBOOKS)
@pytest.mark.parametrize(
  ("shape", "block"),
  [
    ((4, 128), (64,)),
    ((3, 70), (64,)),
    ((5,), (8,)),
    ((3, 7), (4,)),
    ((6, 5), (2, 5)),
    ((7, 3, 3), (2, 3, 3)),
    ((2, 4, 6), (2, 6)),
    ((0, 4), (4,)),
  ],
)
def test_layout(name, shape, block):
  """The invariants that the docstring of QuantizedArray states."""
  book, k = get_codebook(name), len(block)
  x = np.random.default_rng(0).random(shape, np.float32)
  q = jax.jit(lambda x: encode(x, book, block))(x)
  lead, extent = shape[:-k], shape[-k:]
  n = int(np.prod(extent))
  length = int(np.prod(block))
  count = -(-n // length)
  packed = -(-n // 2) if book.pairs_neighbours else count * -(-length // 2)
  packed = (*lead, packed, *(1,) * (k - 1))
  chex.assert_shape(q.codes, shape if book.bits == 8 else packed)
  chex.assert_shape(q.scales, (*lead, -(-extent[0] // block[0]), *(1,) * (k - 1)))
  chex.assert_type([q.codes, q.scales], [jnp.uint8, jnp.float32])
  assert (q.shape, q.ndim, q.size) == (shape, len(shape), x.size)
  assert q.nbytes == q.codes.size + 4 * q.scales.size
  # The scale of every element, block by block in numpy.
  rows = np.asarray(x).reshape(-1, n)
  scale = np.ones_like(rows)
  for start in range(0, n, length):
    part = slice(start, start + length)
    scale[:, part] = rows[:, part].max(-1, keepdims=True)

  @jax.jit
  def expected(rows, scale):
    return book.decode_blocks(book.encode_blocks(rows, scale), scale)

  # Two programs: one may fuse a product and a sum where the other does not; the last bit differs
  # (power8 on jax 0.12). The nearest other code is a hundred thousand times as far away.
  np.testing.assert_array_max_ulp(
    np.asarray(q.dequantize()), np.asarray(expected(rows, scale)).reshape(shape), maxulp=1
  )


@pytest.mark.parametrize("name", [n for n in _CODEBOOKS if n != "dynamic"])
def test_requantizing_changes_nothing(name):
  book = get_codebook(name)
  x = jax.random.t(jax.random.key(1), 2.0, (64, 96)) * 10.0 ** jnp.arange(-32, 32)[:, None] * 1e-3
  x = x if book.signed else jnp.abs(x)
  once = encode(x, book, (32,))
  chex.assert_trees_all_equal(encode(once.dequantize(), book, (32,)), once)


def test_the_signed_dynamic_map_shrinks_negative_peaks():
  """Known and documented: why `dynamic` is not the default of any optimizer."""
  x = jnp.full((256,), -1.0)
  for _ in range(50):
    x = lowmem.quantize(x, "dynamic").dequantize()
  assert float(x[0]) == pytest.approx(-0.70, abs=0.01)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", _CODEBOOKS)
def test_a_bad_element_does_not_touch_its_neighbours(name, bad):
  book = get_codebook(name)
  x = jax.random.uniform(jax.random.key(2), (4, 64))
  poisoned = encode(x.at[1, 5].set(bad), book, (64,)).dequantize()
  clean = encode(x.at[1, 5].set(0.0), book, (64,)).dequantize()
  np.testing.assert_array_equal(poisoned, clean)
  assert np.isfinite(poisoned).all()


@pytest.mark.parametrize("scale", [2.0**-100, 1e-30, 1e-10, 1.0, 1e10, 1e37])
def test_relative_error_does_not_depend_on_the_scale(scale):
  x = jax.random.normal(jax.random.key(3), (256, 64))

  def errors(x):
    return np.abs(np.asarray(lowmem.quantize(x, "log8", 64).dequantize() / x) - 1)

  ours, reference = errors(x * scale), errors(x)
  np.testing.assert_allclose(ours.mean(), reference.mean(), rtol=0.05)
  np.testing.assert_allclose(ours.max(), reference.max(), rtol=0.05)
  if scale == 2.0**-100:  # patterns only move
    np.testing.assert_array_equal(ours, reference)


def test_vmap_scan_and_indexing_need_no_special_care():
  w = jax.random.normal(jax.random.key(4), (3, 8, 64))

  def one(w):
    return lowmem.quantize(w, "nf4", 64, double_quantize=True)

  stacked = jax.vmap(one)(w)
  chex.assert_shape(stacked.scales.offset, (3,))
  for i in range(3):
    layer = jax.tree.map(lambda a, i=i: a[i], stacked)
    np.testing.assert_array_equal(layer.codes, one(w[i]).codes)
    np.testing.assert_array_equal(layer.scales.codes, one(w[i]).scales.codes)
    np.testing.assert_allclose(layer.dequantize(), one(w[i]).dequantize(), rtol=1e-6)
  _, scanned = jax.lax.scan(lambda c, q: (c, q.dequantize()), None, stacked)
  np.testing.assert_allclose(scanned, jax.vmap(lambda q: q.dequantize())(stacked), rtol=1e-6)


def test_double_quantization_costs_4127_bits_a_parameter():
  q = lowmem.quantize(jnp.ones((512, 1024)), "nf4", 64, double_quantize=True)
  assert q.nbytes * 8 / q.size == pytest.approx(4.127, abs=1e-3)


def test_keeps_the_dtype():
  q = lowmem.quantize(jnp.ones(8, jnp.bfloat16), "linear", 8)
  assert q.dequantize().dtype == jnp.bfloat16
  assert q.dequantize(jnp.float16).dtype == jnp.float16


@pytest.mark.parametrize("block_size", [0, -2, 7, 2.5, None, "64"])
def test_refuses_odd_block_sizes(block_size):
  with pytest.raises(ValueError, match=r"`block_size` must be a positive multiple of 2, got"):
    lowmem.quantize(jnp.ones(8), block_size=block_size)


def test_refuses_what_it_cannot_hold():
  with pytest.raises(TypeError, match="`x` must be a floating array, got int32"):
    lowmem.quantize(jnp.arange(8))
  with pytest.raises(ValueError, match="`x` must have at least one axis"):
    lowmem.quantize(jnp.float32(1))
  with pytest.raises(ValueError, match="`x` has negative elements"):
    lowmem.quantize(-jnp.ones(8), "dynamic_unsigned")


def test_reprs_are_one_line():
  x, cpu = jnp.ones((8, 128)), jax.sharding.SingleDeviceSharding(jax.devices()[0])
  page = lowmem.Paged((x.reshape(1, 1, 1, 1, 1, 1, 8, 128),), 0)
  pair = lowmem.Paged((x.reshape(1, 1, 1, 1, 1, 1, 8, 128),) * 2, 0)
  explained = lowmem.explain(lowmem.adamw(1e-3), {"w": jnp.ones((64, 64)), "b": jnp.ones(4)})
  wanted = {
    "Paged(float32[8,128], lanes=1)": page,
    "Paged(float32[16,128], lanes=2)": pair,
    "Paged(float32[16,128], lanes=2) ": jax.eval_shape(lambda: pair),
    "Paged(lanes=(0, 0), axis=0)": jax.tree.map(lambda _: 0, pair),
    "Paged(lanes=('a',), axis=0)": jax.tree.map(lambda _: "a", page),
    "Blockwise('power8', block_size=64, min_size=4096)": lowmem.Blockwise(),
    "Blockwise('nf4', block_size=128, min_size=0)": lowmem.Blockwise("nf4", 128, 0),
    "Explanation(parameters=2, bytes=8736, optax=1, kernel=1)": explained,
  }
  for text, value in wanted.items():
    assert repr(value) == text.strip()
  assert "\n" not in repr(jax.tree.map(lambda _: cpu, pair))
  assert "\n" in str(explained)


@pytest.mark.parametrize("shape", [(64, 0), (0, 64), (0,), (2, 0, 3)])
@pytest.mark.parametrize("codebook", ["power8", "power4", "nf4"])
@pytest.mark.parametrize("double", [False, True])
def test_an_array_may_have_no_elements(shape, codebook, double):
  q = lowmem.quantize(jnp.zeros(shape), codebook, 64, double)
  assert q.shape == q.dequantize().shape == shape
  assert q.codes.size == 0


@pytest.mark.parametrize("codebook", _CODEBOOKS)
def test_no_dtype_is_left_to_promotion(codebook):
  x = jnp.linspace(0.0, 1.0, 128).reshape(2, 64)
  with jax.numpy_dtype_promotion("strict"):
    q = lowmem.quantize(x, codebook, 64, double_quantize=True)
    assert jnp.isfinite(q.dequantize()).all()
