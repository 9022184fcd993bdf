"""A float32 as a bfloat16 and the bits that it lacks, and the update that reaches a bfloat16.

All of it is arithmetic on bit patterns, as int32. XLA may take a float32 for itself rounded to
bfloat16 and back (`xla_allow_excess_precision`); bits it leaves alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_HALF = 0x8000
_MOST = 0x7FFF
_NAN = 0x7FC0
_INFINITE = 0x7F800000


def bits_of(x: jax.Array) -> jax.Array:
  """The pattern of a float32, or that of a bfloat16 as 0 to 65535; in int32."""
  if x.dtype == jnp.bfloat16:
    return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32)
  return jax.lax.bitcast_convert_type(x, jnp.int32)


def float32_of(pattern: jax.Array) -> jax.Array:
  """The float32 of that pattern."""
  return jax.lax.bitcast_convert_type(pattern, jnp.float32)


def is_nan(pattern: jax.Array) -> jax.Array:
  """Whether a float32's pattern is that of a NaN."""
  return (pattern & 0x7FFFFFFF) > _INFINITE


def is_finite(pattern: jax.Array) -> jax.Array:
  """Whether a float32's pattern is that of a finite number."""
  return (pattern & 0x7FFFFFFF) < _INFINITE


def join(p: jax.Array, remainder: jax.Array) -> jax.Array:
  """The float32 that a bfloat16 and a remainder of 16 or 8 bits (int16, int8) stand for."""
  low = remainder.astype(jnp.int32)
  if remainder.dtype == jnp.int8:
    low = low << 8
  return float32_of((bits_of(p) << 16) + low)


def upper(pattern: jax.Array) -> jax.Array:
  """The pattern of a float32 rounded to bfloat16: to the nearest, halves away from zero.

  To round halves to even would give two float32 one bfloat16 and one remainder of 16 bits: an even
  bfloat16 stands for 65,537 of them. So there is one in 65,536 that JAX rounds the other way.
  """
  rounded = jax.lax.shift_right_logical(pattern + _HALF, 16)
  return jnp.where(is_nan(pattern), _NAN, rounded)


def reach(p: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The update that brings `p` to the bfloat16 of pattern `target`, and where it lands.

  `optax.apply_updates` makes `(p + update).astype(bfloat16)` of it, the sum in float32. It lands on
  the target unless that is smaller than `p` by a factor of more than 2^15, a negative zero, or a
  number that follows an infinite one.
  """
  now = bits_of(p)
  update = float32_of(target << 16) - float32_of(now << 16)
  # What is to stay does so with -0.0: 0.0 would turn a negative zero, inf - inf is NaN.
  update = jnp.where(target == now, jnp.float32(-0.0), update)
  return update, bits_of((p.astype(jnp.float32) + update).astype(jnp.bfloat16))


def remainder_of(pattern: jax.Array, landed: jax.Array) -> jax.Array:
  """What a float32 has more than the bfloat16 `landed`, in 16 bits; the most of it that they hold.

  It is less than all only where `landed` is not its `upper`.
  """
  base = landed << 16
  most = jnp.clip(pattern - base, -_HALF, _MOST)
  # On the other side of zero the nearest is what is closest to it.
  nearest_zero = jnp.where((base & 0x7FFFFFFF) == 0, 0, -_HALF)
  low = jnp.where((pattern ^ base) < 0, nearest_zero, most)
  return jnp.where(is_nan(pattern) | is_nan(base), 0, low)
