"""The tile loop."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_lowmem as lowmem
from optax_lowmem._quantization.array import QuantizedArray, encode
from optax_lowmem._quantization.codebooks import get_codebook
from optax_lowmem._quantization.storage import block_shape
from optax_lowmem._update import tile_views
from optax_lowmem._update.tile_loop import map_tiles
from programs import temporaries_of


def step(reads, writes):
  """A little optimizer: a quantized average of the gradient, and its product with a parameter."""
  (p,), (g, m) = reads, writes
  new = 0.9 * m.dequantize() + g
  return [new * p, encode(new, m.codebook, m.block)]


@pytest.mark.parametrize(
  ("shape", "codebook"),
  [
    ((64, 128), "power8"),  # one flat run, tiles that divide it
    ((67, 64), "power8"),  # one flat run, a remainder
    ((8192,), "nf4"),
    ((100, 40), "power8"),  # blocks of several rows
    ((3, 7, 70), "power8"),
    ((33, 131), "power8"),  # rows with a short last block, several to a tile
    ((33, 131), "nf4"),  # and an odd number of 4-bit codes
    ((3, 1931), "power8"),  # rows longer than a tile, with a short last block
    ((5, 1931), "nf4"),
    ((1, 1), "power8"),
  ],
)
@pytest.mark.parametrize("indexed", ["by position", "by row"])
def test_tiles_give_what_the_whole_array_gives(shape, codebook, indexed, monkeypatch):
  if indexed == "by row":  # as are arrays whose positions do not fit an int32
    monkeypatch.setattr(tile_views, "_FLAT", 0)
  keys = jax.random.split(jax.random.key(0), 3)
  p, g, m = (jax.random.normal(k, shape) for k in keys)
  m = encode(m, get_codebook(codebook), block_shape(shape, 64))
  whole = jax.jit(step)([p], [g, m])
  tiled = jax.jit(lambda p, g, m: map_tiles(step, [p], [g, m], tile=1024))(p, g, m)
  chex.assert_trees_all_equal_structs(tiled, whole)
  chex.assert_trees_all_close(tiled[0], whole[0], rtol=1e-6)
  # XLA may contract a product and a sum in one of the two programs: an ulp, seldom a code.
  np.testing.assert_array_less(np.mean(tiled[1].codes != whole[1].codes), 2e-3)
  np.testing.assert_allclose(tiled[1].scales, whole[1].scales, rtol=1e-6)


def test_blocks_of_two_sizes_in_one_loop():
  x = jax.random.normal(jax.random.key(0), (64, 192))
  a = encode(x, get_codebook("power8"), (64,))
  b = encode(jnp.abs(x), get_codebook("power8_unsigned"), (96,))

  def swap(_, writes):
    return [encode(-q.dequantize(), q.codebook, q.block) for q in writes[:1]] + writes[1:]

  c, d = jax.jit(lambda a, b: map_tiles(swap, [], [a, b], tile=1024))(a, b)
  np.testing.assert_array_equal(c.dequantize(), -a.dequantize())
  chex.assert_trees_all_equal(d, b)


def test_only_a_tile_is_ever_dense():
  """Also where the last axis does not divide and is longer than a tile."""
  for shape in ((4096, 1024), (4_194_304,), (64, 65_537), (4_000_037,)):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    m = jax.eval_shape(lambda x, s=shape: encode(x, get_codebook("power8"), block_shape(s, 64)), x)
    run = jax.jit(lambda p, g, m: map_tiles(step, [p], [g, m]), donate_argnums=(1, 2))
    temporaries = temporaries_of(run.lower(x, x, m).compile())
    assert temporaries < 0.2 * x.size, (shape, temporaries / x.size)
    assert isinstance(m, QuantizedArray)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA's CPU backend")
@pytest.mark.parametrize("rule", [lowmem.adamw, lowmem.lion])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_loop_runs_on_all_cores(rule, bits):
  """XLA marks what it runs as one kernel, on one core (jax 0.12); of a loop of tiles, a third of
  the speed on two cores."""
  tx, like = rule(1e-3, bits=bits), jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
  state = jax.eval_shape(tx.init, like)
  update = jax.jit(tx.update, donate_argnums=(0, 1)).lower(like, state, like).compile()
  program = update.as_text() or ""
  loops = [line for line in program.splitlines() if "/while" in line]
  assert any(" while(" in line for line in loops)
  assert not [line for line in loops if 'xla_cpu_small_call="true"' in line]
