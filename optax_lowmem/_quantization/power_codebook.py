"""Codes that are a root of what they stand for: of the optimizers' moments, and of sums."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from optax_lowmem._quantization.codebook import GOLDEN, ONE, SIGN, TINY, Arithmetic, fixed

# What a scale is divided by: with a power of two the quotient is the same however XLA divides; with
# 1, that of the largest floats would be flushed to zero.
_UNIT = 64.0
# A stored value that is decoded and encoded again comes back within 3e-5 of a code: what is this
# close to a code is not rounded at random.
_MARGIN = 2.0**-13


@dataclasses.dataclass(frozen=True)
class Power(Arithmetic):
  r"""Codes that are a root of what they stand for.

  Code :math:`k` of :math:`n` stands for

  .. math::
    q_k = (1 - w) t^2 + w t^4, \quad t = k / n, \quad k = 0, 1, \dots, n, \quad
    n = 2^\text{bits} - 1 \quad (2^{\text{bits} - 1} - 1 \text{ beside a sign}).

  So codes are dense near the largest of a block, where most of an update is, and grow apart slowly
  below: the smallest of :math:`t^4` in 8 bits is 2e-10. To encode takes two roots and some
  products, to decode four products.

  A moment that moves by less than half a code a step would stand still if it were rounded to the
  nearest, and one that is rounded at random wherever it goes carries noise that it need not. So a
  value is rounded at random, with the probability that makes its mean right, where it has moved by
  less than `still` of the code that it is in, and to the nearest elsewhere. The random number is a
  hash of the bits of the value and of its scale: no key, no counter, the same on any device, and
  the same for equal blocks. What is represented exactly is between no two codes and stays what it
  is.

  Unsigned, zero stands for zero alone: what is positive is raised to the smallest code.

  Attributes:
    fourth: w, the weight of the fourth power beside the second.
    still: see above, in codes.
  """

  fourth: float
  still: float = 0.5

  @property
  def _smallest(self) -> float:
    """The value of code 1."""
    return ((1 - self.fourth) * self.top**2 + self.fourth) / self.top**4

  @property
  def smallest_scale(self) -> float:
    # Every code must stand for a normal number: a code that is flushed to zero would be lost.
    return TINY * 2.0 ** math.ceil(-math.log2(self._smallest))

  def encode_blocks(
    self, blocks: jax.Array, scales: jax.Array, old: jax.Array | None = None
  ) -> jax.Array:
    magnitude = self.magnitude_bits(blocks)
    unit = _UNIT / jnp.maximum(scales, self.smallest_scale)
    x = jax.lax.bitcast_convert_type(magnitude, jnp.float32) * unit
    # x = a k^2 + b k^4
    a, b = ((1 - self.fourth) * _UNIT) / self.top**2, (self.fourth * _UNIT) / self.top**4

    def value(k):
      square = k * k
      return square * b * square if a == 0 else square * (a + b * square)

    square = x / a if b == 0 else (jnp.sqrt(a * a + 4 * b * x) - a) * (0.5 / b)
    below = jnp.sqrt(jnp.maximum(square, 0.0)).astype(jnp.int32)
    k = below.astype(jnp.float32)
    low = value(k)
    gap = value(k + 1.0) - low
    moved = None if old is None else jnp.abs(blocks - old) * unit
    threshold = self._threshold(moved, gap, x, scales)
    codes = below + (x - low > threshold * gap).astype(jnp.int32)
    codes = jnp.minimum(codes, self.top)
    if not self.signed:
      codes = jnp.maximum(codes, jnp.minimum(magnitude, 1))
    return self.with_sign(codes, blocks)

  def _threshold(
    self, moved: jax.Array | None, gap: jax.Array, x: jax.Array, scales: jax.Array
  ) -> jax.Array:
    """From which part of the way to the next code a value is rounded up.

    Args:
      moved: how far values have moved, None for new ones.
      gap: between the two codes next to each.
      x: their magnitudes, in the same unit.
      scales: those of their blocks.
    """
    half = jnp.float32(0.5)
    return half if moved is None else jnp.where(moved < self.still * gap, _noise(x, scales), half)

  def decode_blocks(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
    codes = codes.astype(jnp.int32)
    magnitude = codes & self.top if self.signed else codes
    t = magnitude.astype(jnp.float32) * (1.0 / self.top)  # of the top code, exactly 1
    t = fixed(t)  # or XLA moves the constant to the scales, and the top code is an ulp off
    square = t * t
    value = square if self.fourth == 0 else square * ((1 - self.fourth) + self.fourth * square)
    return self.signed_product(codes, value, scales)


@dataclasses.dataclass(frozen=True)
class Sum(Power):
  """Codes of a sum that is not yet complete: those of `Power`, rounded at random always.

  What is added to a sum is lost for good where it is rounded to the nearest, and more so the longer
  the sum; rounded with the probability that makes its mean right, errors cancel. The random number
  is that of `Power`, a hash of the bits of the value and of its scale.

  Code 0 with a sign stands for -0.0, and is that of no other value: negative values that are
  rounded to zero have code 0. So -0.0 can mean something else, as it does in `multi_steps`.

  Attributes:
    dithered: whether to round at random.
  """

  dithered: bool = True

  def _threshold(
    self, moved: jax.Array | None, gap: jax.Array, x: jax.Array, scales: jax.Array
  ) -> jax.Array:
    del moved, gap
    return _noise(x, scales) if self.dithered else jnp.float32(0.5)

  def with_sign(self, magnitudes: jax.Array, blocks: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(blocks, jnp.int32)
    signed = (magnitudes > 0) | (bits == SIGN)
    sign = (bits >> (32 - self.bits)) & (self.top + 1)
    return (magnitudes | jnp.where(signed, sign, 0)).astype(jnp.uint8)


def _noise(x: jax.Array, scales: jax.Array) -> jax.Array:
  """A number in (0, 1), by the bits of `x` and the digits of its scale.

  In a slow average, a value visits a few hundred floats before it has moved: too few to be rounded
  up once in a thousand steps. Scales visit as many. The last four bits are not hashed: an ulp, as
  between two compilations, seldom turns a code. Nor is the exponent of the scale: a power of two
  turns none.
  """
  value = jax.lax.bitcast_convert_type(x, jnp.int32) >> 4
  digits = (jax.lax.bitcast_convert_type(scales, jnp.int32) & 0x7FFFFF) >> 4
  hashed = (value ^ (digits * GOLDEN)) * GOLDEN
  bits = jax.lax.shift_right_logical(hashed, jnp.int32(9)) | ONE
  unit = jax.lax.bitcast_convert_type(bits, jnp.float32) - 1.0
  return unit * (1.0 - 2.0 * _MARGIN) + _MARGIN
