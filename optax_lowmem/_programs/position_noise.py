"""Random bits by position: a hash of seed, step and index, the same however an array is cut."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


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
  return noise_at(positions(shape), bits, *words)


def positions(shape: tuple[int, ...]) -> jax.Array:
  """The position of each element of an array in row-major order, modulo 2^32, as uint32.

  It is made of whole iotas: XLA would write one along an axis to memory, and what reads the same
  from there it fuses, so that no parameter would be updated before the last gradient is there (3.5
  B/param of temporaries on an H100).
  """
  index = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = math.prod(shape[axis + 1 :]) % 2**32
    index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
  return index


def noise_at(index: jax.Array, bits: int, *words: jax.Array | int) -> jax.Array:
  """`position_noise` of the elements at these positions.

  Args:
    index: of `positions`. Those of more than 2^32 elements share their noise with the first.
    bits: at most 31.
    *words: those of `position_noise`.
  """
  key = jnp.uint32(0)
  for word in words:
    key = mixed(key + jnp.asarray(word).astype(jnp.uint32) + jnp.uint32(0x9E3779B9))
  return (mixed(mixed(index + key) ^ key) >> (32 - bits)).astype(jnp.int32)
