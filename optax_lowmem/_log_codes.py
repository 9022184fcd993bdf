"""Codes that are even in the logarithm: those of the optimizers' moments."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from optax_lowmem._codes import TINY, Codebook

_ONE = 0x3F800000  # bits of the float32 1.0
_SIGN = -(2**31)  # sign bit of a float32, as int32
_GOLDEN = 0x9E3779B1 - 2**32  # 2^32 / golden ratio, as int32: Fibonacci hashing


@dataclasses.dataclass(frozen=True)
class Log(Codebook):
  r"""Codes that are even in the logarithm, read off the bits of a float32.

  The bit pattern of a positive float32 is already a piecewise-linear logarithm: adding
  :math:`2^{23}` to it doubles the value. Code :math:`\mathrm{top} - k` stands for the float32 whose
  pattern lies :math:`d_k` below that of 1.0, where

  .. math::
    d_k = 2^{23} \max(k / a, \; n + (k - an) / b)

  with :math:`a` codes a factor of two for the first :math:`n` factors of two, and :math:`b` below.
  So 1.0 is represented exactly, and the relative error is at most :math:`1/2a`, or :math:`1/2b` far
  below the largest of a block, where reach matters more (twice that if dithered). Both ways are a
  few integer additions and shifts.

  Unsigned books have no zero: a positive value never becomes zero, it is raised to the smallest
  code. Signed books hold sign and magnitude; magnitude 0 is zero.

  A second moment moves by 0.1 % a step, far less than half a code: rounded to the nearest, an
  element would stand still and only the scale of its block would move. *Dithered*, :math:`k` is
  rounded up or down with the probability that makes its mean right. The random number is a hash of
  the value's own bits: no key, no counter, the same on any device. What is represented exactly is
  between no two codes and stays what it is.

  Attributes:
    fine: a, codes per factor of two near 1; a power of two.
    octaves: n, how many factors of two down they reach.
    coarse: b, codes per factor of two below; a power of two.
    dithered: whether to round at random.
  """

  fine: int
  octaves: int
  coarse: int
  dithered: bool = False

  @property
  def _top(self) -> int:
    return 2 ** (self.bits - self.signed) - 1

  @property
  def _steps(self) -> tuple[int, int, int]:
    """The two steps as powers of two of the pattern, and what makes both meet."""
    fine, coarse = (24 - n.bit_length() for n in (self.fine, self.coarse))
    return fine, coarse, self.octaves * (self.fine - self.coarse)

  @property
  def pairs_neighbours(self) -> bool:
    return False  # runs of bytes that become runs of elements: a third of the time on a CPU

  @property
  def may_vanish(self) -> bool:
    return False  # the signed ones are for first moments

  @property
  def smallest_scale(self) -> float:
    # Every code must stand for a normal number: a code that is flushed to zero would be lost.
    below = (self._top - self.octaves * self.fine) / self.coarse + self.octaves
    return TINY * 2.0 ** math.ceil(max(below, self._top / self.fine))

  def encode(self, r: jax.Array) -> jax.Array:
    return self.encode_blocks(r, jnp.float32(1.0))

  def encode_blocks(self, blocks: jax.Array, scales: jax.Array) -> jax.Array:
    # Nothing but its bits is asked of a block, for its scale as for its codes, so that XLA does not
    # hold the values of a tile in memory (0.12 B/param) because they are used twice.
    bits = jax.lax.bitcast_convert_type(blocks, jnp.int32)
    magnitude = bits & ~_SIGN if self.signed else jnp.maximum(bits, 0)
    r = jax.lax.bitcast_convert_type(magnitude, jnp.float32) * (1.0 / jnp.maximum(scales, TINY))
    pattern = jax.lax.bitcast_convert_type(r, jnp.int32)
    # The last four bits are not hashed: an ulp, as between two compilations, seldom turns a code.
    noise = (pattern >> 4) * _GOLDEN

    def code(shift, top):
      # top - round((_ONE - pattern) / 2^shift), in an addition and a shift.
      if not self.dithered:
        return (pattern + ((top << shift) - _ONE + (1 << (shift - 1)) - 1)) >> shift
      # Down by 2^5 to 2^shift - 2^5, so that nothing moves a represented value which multiplication
      # by the scale and back has left an ulp off.
      down = jax.lax.shift_right_logical(noise, jnp.int32(32 - shift)) | 64
      return (pattern - down + ((top << shift) - _ONE + (1 << shift) + 31)) >> shift

    fine, coarse, gap = self._steps
    codes = code(fine, self._top)
    if coarse != fine:
      codes = jnp.maximum(codes, code(coarse, self._top - gap))
    codes = jnp.maximum(codes, 0)
    if self.signed:  # by the sign bit, so that -0.0 keeps its code
      codes = codes | ((bits >> (32 - self.bits)) & (self._top + 1))
    return codes.astype(jnp.uint8)

  def decode(self, codes: jax.Array) -> jax.Array:
    return self.decode_blocks(codes, jnp.float32(1.0))

  def decode_blocks(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
    # Arithmetic, not a table: a handful of integer instructions that vectorize everywhere.
    codes = codes.astype(jnp.int32)
    magnitude = codes & self._top if self.signed else codes
    fine, coarse, gap = self._steps
    pattern = (magnitude << fine) + (_ONE - (self._top << fine))
    if coarse != fine:
      below = (magnitude << coarse) + (_ONE - ((self._top - gap) << coarse))
      pattern = jnp.minimum(pattern, below)
    if self.signed:
      pattern = jnp.where(magnitude == 0, 0, pattern)
    values = jax.lax.bitcast_convert_type(pattern, jnp.float32) * scales
    # Something must follow the product, or XLA moves a constant that multiplies it to the scales,
    # and holds these products in memory (0.06 B/param a moment). Of integers, because a maximum of
    # floats takes three instructions to pass NaN on.
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    if self.signed:
      bits = bits | ((codes << (32 - self.bits)) & _SIGN)
    else:
      bits = jnp.maximum(bits, 0)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
