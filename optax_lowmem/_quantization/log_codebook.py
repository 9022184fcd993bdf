"""Codes that are even in the logarithm."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from optax_lowmem._quantization.codebook import GOLDEN, ONE, TINY, Arithmetic


@dataclasses.dataclass(frozen=True)
class Log(Arithmetic):
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
  def _steps(self) -> tuple[int, int, int]:
    """The two steps as powers of two of the pattern, and what makes both meet."""
    fine, coarse = (24 - n.bit_length() for n in (self.fine, self.coarse))
    return fine, coarse, self.octaves * (self.fine - self.coarse)

  @property
  def smallest_scale(self) -> float:
    # Every code must stand for a normal number: a code that is flushed to zero would be lost.
    below = (self.top - self.octaves * self.fine) / self.coarse + self.octaves
    return TINY * 2.0 ** math.ceil(max(below, self.top / self.fine))

  def encode_blocks(
    self, blocks: jax.Array, scales: jax.Array, old: jax.Array | None = None
  ) -> jax.Array:
    del old  # rounded as its bits say
    r = jax.lax.bitcast_convert_type(self.magnitude_bits(blocks), jnp.float32)
    # 64 times as large, as of the largest floats the inverse would be flushed to zero.
    r = r * (64.0 / jnp.maximum(scales, self.smallest_scale))
    pattern = jax.lax.bitcast_convert_type(r, jnp.int32) - (6 << 23)
    # The last four bits are not hashed: an ulp, as between two compilations, seldom turns a code.
    noise = (pattern >> 4) * GOLDEN

    def code(shift, top):
      # top - round((ONE - pattern) / 2^shift), in an addition and a shift.
      if not self.dithered:
        return (pattern + ((top << shift) - ONE + (1 << (shift - 1)) - 1)) >> shift
      # Down by 2^5 to 2^shift - 2^5, so that nothing moves a represented value which multiplication
      # by the scale and back has left an ulp off.
      down = jax.lax.shift_right_logical(noise, jnp.int32(32 - shift)) | 64
      return (pattern - down + ((top << shift) - ONE + (1 << shift) + 31)) >> shift

    fine, coarse, gap = self._steps
    codes = code(fine, self.top)
    if coarse != fine:
      codes = jnp.maximum(codes, code(coarse, self.top - gap))
    return self.with_sign(jnp.maximum(codes, 0), blocks)

  def decode_blocks(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
    codes = codes.astype(jnp.int32)
    magnitude = codes & self.top if self.signed else codes
    fine, coarse, gap = self._steps
    pattern = (magnitude << fine) + (ONE - (self.top << fine))
    if coarse != fine:
      below = (magnitude << coarse) + (ONE - ((self.top - gap) << coarse))
      pattern = jnp.minimum(pattern, below)
    if self.signed:
      pattern = jnp.where(magnitude == 0, 0, pattern)
    values = jax.lax.bitcast_convert_type(pattern, jnp.float32)
    return self.signed_product(codes, values, scales)
