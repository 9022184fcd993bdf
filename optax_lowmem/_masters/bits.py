"""A float32 as a bfloat16 and the bits that it lacks, and the update that reaches a bfloat16.

All of it is arithmetic on bit patterns, as int32, of float32; a bfloat16 counts as the float32 that
it equals, and may be given as that. XLA may take a float32 for itself rounded to bfloat16 and back
(`xla_allow_excess_precision`); bits it leaves alone. And all of it is elementwise, so that it can
be a part of a kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_HALF = 0x8000
_MOST = 0x7FFF
_UPPER = ~0xFFFF
_NAN = 0x7FC00000
_INFINITE = 0x7F800000


def bits_of(x: jax.Array) -> jax.Array:
  """The pattern of a float32, or of a bfloat16 as float32; in int32."""
  if x.dtype == jnp.bfloat16:
    return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) << 16
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
  return float32_of(bits_of(p) + low)


def upper(pattern: jax.Array) -> jax.Array:
  """The pattern of a float32 rounded to bfloat16: to the nearest, halves away from zero.

  To round halves to even would give two float32 one bfloat16 and one remainder of 16 bits: an even
  bfloat16 stands for 65,537 of them. So there is one in 65,536 that JAX rounds the other way.
  """
  return jnp.where(is_nan(pattern), _NAN, (pattern + _HALF) & _UPPER)


def reach(p: jax.Array, target: jax.Array) -> jax.Array:
  """The update that brings `p` to the bfloat16 `target`; both may be float32 that equal one.

  `optax.apply_updates` makes `(p + update).astype(bfloat16)` of it, the sum in float32. It lands on
  the target unless that is smaller than `p` by a factor of more than 2^15, a negative zero, or a
  number that follows an infinite one.
  """
  now, then = bits_of(p), bits_of(target)
  update = float32_of(then) - float32_of(now)
  # What is to stay does so with -0.0: 0.0 would turn a negative zero, inf - inf is NaN.
  return jnp.where(then == now, jnp.float32(-0.0), update)


def landing(p: jax.Array, target: jax.Array) -> jax.Array:
  """The pattern of where `apply_updates` takes `p` by that update: rounded to even."""
  pattern = bits_of(float32_of(bits_of(p)) + reach(p, target))
  odd = (pattern >> 16) & 1
  return jnp.where(is_nan(pattern), _NAN, (pattern + _MOST + odd) & _UPPER)


def remainder_of(pattern: jax.Array, landed: jax.Array) -> jax.Array:
  """What a float32 has more than the bfloat16 `landed`, in 16 bits; the most of it that they hold.

  Both are patterns. It is less than all only where `landed` is not its `upper`.
  """
  most = jnp.clip(pattern - landed, -_HALF, _MOST)
  # On the other side of zero the nearest is what is closest to it.
  nearest_zero = jnp.where((landed & 0x7FFFFFFF) == 0, 0, -_HALF)
  low = jnp.where((pattern ^ landed) < 0, nearest_zero, most)
  return jnp.where(is_nan(pattern) | is_nan(landed), 0, low)
