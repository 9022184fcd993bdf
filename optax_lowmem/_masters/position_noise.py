"""Random bits by position: a hash of seed, step and index, the same however an array is cut."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

_first: contextvars.ContextVar[Any] = contextvars.ContextVar("first", default=0)


@contextlib.contextmanager
def numbered_from(first: jax.Array | int) -> Iterator[None]:
  """Within, the first array of a tree has this number in `number_of`.

  For trees that are parts of a larger one, such as one layer's: their arrays are not to share the
  noise of those of the other parts.
  """
  token = _first.set(first)
  try:
    yield
  finally:
    _first.reset(token)


def number_of(k: int) -> jax.Array | int:
  """The number of array `k` of a tree: a word for `position_noise`."""
  return k + _first.get()


def mixed(x: jax.Array) -> jax.Array:
  """A permutation of uint32 that turns half of the bits for one that is turned.

  Wellons' `lowbias32`, <https://github.com/skeeto/hash-prospector>.
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def position_noise(shape: tuple[int, ...], bits: int, *words: jax.Array | int) -> jax.Array:
  """Integers from 0 to 2^`bits` - 1, of which each element has its own, in int32.

  Args:
    shape: of the array.
    bits: at most 31.
    *words: what else they depend on: a seed, the number of an array, a step.
  """
  key = jnp.uint32(0)
  for word in words:
    key = mixed(key + jnp.asarray(word).astype(jnp.uint32) + jnp.uint32(0x9E3779B9))
  # Positions of more than 2^32 elements share their noise with those of the first. An index is
  # made of whole iotas: XLA would write one along an axis to memory, and what reads the same from
  # there it fuses, so that no parameter would be updated before the last gradient is there (3.5
  # B/param of temporaries on an H100).
  index = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = math.prod(shape[axis + 1 :]) % 2**32
    index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
  return (mixed(mixed(index + key) ^ key) >> (32 - bits)).astype(jnp.int32)
