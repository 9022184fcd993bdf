"""Random bits by position: a hash of seed, step and index, the same however an array is cut."""

from __future__ import annotations

import contextlib
import contextvars
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


def position_noise(index: jax.Array, bits: int, *words: jax.Array | int) -> jax.Array:
  """Integers from 0 to 2^`bits` - 1, of which each element has its own, in int32.

  Args:
    index: of each element, `indices`. Beyond 2^32 elements they share their noise with the first.
    bits: at most 31.
    *words: what else they depend on: a seed, the number of an array, a step.
  """
  key = jnp.uint32(0)
  for word in words:
    key = mixed(key + jnp.asarray(word).astype(jnp.uint32) + jnp.uint32(0x9E3779B9))
  index = jax.lax.bitcast_convert_type(index, jnp.uint32)
  return (mixed(mixed(index + key) ^ key) >> (32 - bits)).astype(jnp.int32)
