"""Storages, and how they lay their blocks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_lowmem as lowmem
from optax_lowmem._quantization.codebooks import _CODEBOOKS
from optax_lowmem._quantization.storage import block_shape

shapes = st.lists(st.integers(1, 5000), min_size=1, max_size=4).map(tuple)


@given(shapes, st.sampled_from([2, 32, 64, 128, 256]))
def test_there_is_never_more_than_one_scale_for_block_size_elements(shape, block_size):
  block = block_shape(shape, block_size)
  k = len(block)
  assert 1 <= k <= len(shape)
  assert block[1:] == shape[len(shape) - k + 1 :]
  lead, extent = shape[: len(shape) - k], shape[len(shape) - k :]
  scales = np.prod(lead, dtype=int) * -(-extent[0] // block[0])
  # An array that is smaller than a block is one block.
  assert scales == 1 or scales * block_size <= np.prod(shape, dtype=int)
  assert np.prod(block, dtype=int) < 2 * block_size + np.prod(block[1:], dtype=int)


@pytest.mark.parametrize(
  ("shape", "block"),
  [
    ((4096, 4096), (64,)),
    ((576, 1536), (64,)),
    ((4096, 16), (4, 16)),
    ((10, 1000), (100,)),  # a divisor under 128: no short block
    ((10, 131), (66,)),  # a prime: a short last block
    ((512, 3, 3), (8, 3, 3)),
    ((5,), (5,)),
  ],
)
def test_block_shapes(shape, block):
  assert block_shape(shape, 64) == block


@settings(max_examples=25, deadline=None)
@given(
  st.sampled_from([(96,), (7, 70), (33, 5), (2, 3, 40)]),
  st.sampled_from([n for n in _CODEBOOKS if n != "dynamic"]),
  st.integers(0, 2**31 - 1),
  st.floats(-30, 30),
)
def test_storing_is_idempotent(shape, codebook, seed, exponent):
  storage = lowmem.Blockwise(codebook, 32, min_size=0)
  x = jax.random.t(jax.random.key(seed), 2.0, shape) * 10.0**exponent
  if "unsigned" in codebook:
    x = jnp.abs(x)
  once = storage.store(x)
  chex.assert_trees_all_equal(storage.store(storage.load(once)), once)


@pytest.mark.parametrize(
  ("codebook", "bytes_per_element", "median", "mean"),
  [
    # Golden errors: what a format costs, and what a change of it must not make worse.
    ("power8", 1.0625, 0.0095, 0.0104),
    ("power8_unsigned", 1.0625, 0.0056, 0.0060),
    ("power4", 0.5625, 0.1385, 0.1805),
    ("power4_unsigned", 0.5625, 0.0801, 0.0874),
    ("log8", 1.0625, 0.0086, 0.0156),
    ("log8_unsigned", 1.0625, 0.0065, 0.0090),
    ("log4", 0.5625, 0.1215, 0.207),
    ("log4_unsigned", 0.5625, 0.1074, 0.1312),
    ("dynamic", 1.0625, 0.0103, 0.0142),
    ("dynamic_unsigned", 1.0625, 0.0051, 0.0071),
    ("linear", 1.0625, 0.0069, 0.0272),
    ("nf4", 0.5625, 0.103, 0.203),
  ],
)
def test_the_error_of_each_format(codebook, bytes_per_element, median, mean):
  x = jax.random.normal(jax.random.key(0), (512, 512))
  x = jnp.abs(x) if "unsigned" in codebook else x
  storage = lowmem.Blockwise(codebook, 64)
  stored = storage.store(x)
  assert stored.nbytes / x.size == bytes_per_element
  error = np.abs(np.asarray(storage.load(stored)) / np.asarray(x) - 1)
  assert np.median(error) == pytest.approx(median, rel=0.06)
  assert np.minimum(error, 1).mean() == pytest.approx(mean, rel=0.06)


def test_small_arrays_stay_in_float32():
  storage = lowmem.Blockwise("log8", min_size=100)
  for x in (jnp.ones(99, jnp.bfloat16), jnp.float32(2), jnp.ones((0, 3))):
    assert storage.store(x).dtype == jnp.float32
    np.testing.assert_array_equal(storage.load(storage.store(x)), x)
  assert isinstance(storage.store(jnp.ones(100)), lowmem.QuantizedArray)


def test_dense():
  x = jnp.float32([1, 1 + 2**-12])
  assert lowmem.Dense(jnp.bfloat16).store(x).dtype == jnp.bfloat16
  assert lowmem.Dense(jnp.bfloat16).load(lowmem.Dense(jnp.bfloat16).store(x)).dtype == jnp.float32
  np.testing.assert_array_equal(lowmem.Dense().load(lowmem.Dense().store(x)), x)


def test_storages_are_values():
  assert lowmem.Blockwise("log8", 64) == lowmem.Blockwise("log8", 64)
  assert hash(lowmem.Blockwise("log8", 64)) != hash(lowmem.Blockwise("log8", 128))


def test_bad_storages_are_refused():
  with pytest.raises(ValueError, match="`codebook` 'log9' is unknown"):
    lowmem.Blockwise("log9")  # pyright: ignore[reportArgumentType]
  with pytest.raises(ValueError, match="`block_size` must be a positive multiple of 2, got 63"):
    lowmem.Blockwise("log8", 63)
  with pytest.raises(ValueError, match="`min_size` must not be negative"):
    lowmem.Blockwise("log8", min_size=-5)
