"""Two 4-bit codes a byte: neighbours, or elements half a block apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pack(codes: jax.Array) -> jax.Array:
  """Two 4-bit codes a byte along the last axis, the first in the high half."""
  if codes.shape[-1] % 2:
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
  pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
  return (pairs[..., 0] << 4) | pairs[..., 1]


def unpack(packed: jax.Array) -> jax.Array:
  """(…, bytes) -> (…, 2 * bytes)."""
  pairs = jnp.stack([packed >> 4, packed & 15], axis=-1)
  return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def pack_halves(codes: jax.Array) -> jax.Array:
  """(…, length) -> (…, ceil(length / 2)): two 4-bit codes a byte, half a block apart."""
  if codes.shape[-1] % 2:
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
  half = codes.shape[-1] // 2
  high, low = jax.lax.split(codes, (half, half), axis=codes.ndim - 1)  # Triton has no slices
  return (high << 4) | low


def unpack_halves(packed: jax.Array) -> jax.Array:
  """(…, half) -> (…, 2 * half)."""
  # As a broadcast, because XLA would emit a branch for every element of a concatenation.
  # In 32 bits, because no processor shifts the bytes of a vector by different amounts.
  # docs/xla_notes.md#nibbles
  shifts = 4 - 4 * jax.lax.broadcasted_iota(jnp.int32, (2, 1), 0)  # a kernel has no constants
  shifts = jax.lax.expand_dims(shifts, range(packed.ndim - 1))  # ranks may not be left to promotion
  halves = (packed[..., None, :].astype(jnp.int32) >> shifts) & 15
  return halves.reshape(*packed.shape[:-1], 2 * packed.shape[-1])
