"""Codebooks: what the bits of a code mean.

A codebook maps normalised values in [-1, 1] (or [0, 1] if unsigned) to integer codes and back. It
knows nothing of blocks, scales or packing. Every codebook is a frozen, hashable value, so it can be
a static field of a pytree.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

_ONE = 0x3F800000  # bits of the float32 1.0
_SIGN = -(2**31)  # sign bit of a float32, as int32
_GOLDEN = 0x9E3779B1 - 2**32  # 2^32 / golden ratio, as int32: Fibonacci hashing
# Below the smallest normal number XLA's CPU backend flushes to zero, and a reciprocal overflows.
_TINY = float(jnp.finfo(jnp.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Codebook(abc.ABC):
  """A map between normalised values and codes.

  Attributes:
    name: the name under which `get_codebook` knows it.
    bits: bits per code, 8 or 4. Codes are always handed around as uint8.
    signed: whether negative values can be represented.
  """

  name: str
  bits: int
  signed: bool

  @abc.abstractmethod
  def encode(self, r: jax.Array) -> jax.Array:
    """Returns the uint8 codes of finite float32 values with `abs(r) <= 1`."""

  @abc.abstractmethod
  def decode(self, codes: jax.Array) -> jax.Array:
    """Returns the float32 values of uint8 codes below `2**bits`."""

  @property
  def pairs_neighbours(self) -> bool:
    """Of 4-bit codes: whether a byte holds two neighbours, or elements half a block apart."""
    return True

  @property
  def may_vanish(self) -> bool:
    """Whether a second moment may be stored as zero, and updates must not be made of it."""
    return True

  @property
  def smallest_scale(self) -> float:
    """The smallest scale but zero; that of a block is raised to it."""
    return _TINY

  def encode_blocks(self, blocks: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns the uint8 codes of finite values, each at most its scale in magnitude.

    Negative values are zero to an unsigned codebook.
    """
    if not self.signed:
      blocks = jnp.maximum(blocks, 0.0)
    return self.encode(jnp.where(scales > 0.0, blocks / scales, 0.0))

  def decode_blocks(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns the float32 values of uint8 codes under `scales`, which broadcast."""
    return self.decode(codes) * scales

  @property
  def values(self) -> np.ndarray:
    """The value of every code, in code order: float32 of shape (2**bits,)."""
    with jax.ensure_compile_time_eval():
      return np.asarray(self.decode(jnp.arange(2**self.bits, dtype=jnp.uint8)))


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
    return _TINY * 2.0 ** math.ceil(max(below, self._top / self.fine))

  def encode(self, r: jax.Array) -> jax.Array:
    return self.encode_blocks(r, jnp.float32(1.0))

  def encode_blocks(self, blocks: jax.Array, scales: jax.Array) -> jax.Array:
    # Nothing but its bits is asked of a block, for its scale as for its codes, so that XLA does not
    # hold the values of a tile in memory (0.12 B/param) because they are used twice.
    bits = jax.lax.bitcast_convert_type(blocks, jnp.int32)
    magnitude = bits & ~_SIGN if self.signed else jnp.maximum(bits, 0)
    r = jax.lax.bitcast_convert_type(magnitude, jnp.float32) * (1.0 / jnp.maximum(scales, _TINY))
    pattern = jax.lax.bitcast_convert_type(r, jnp.int32)
    # The last four bits are not hashed: an ulp, as between two compilations, seldom turns a code.
    noise = (pattern >> 4) * _GOLDEN

    def code(shift, top):
      # top - round((_ONE - pattern) / 2^shift), in an addition and a shift.
      if not self.dithered:
        return (pattern + ((top << shift) - _ONE + (1 << (shift - 1)) - 1)) >> shift
      # Down by 2^5 to 2^shift - 2^5, so that nothing moves a represented value which multiplication
      # by the scale and back has left an ulp off.
      down = jax.lax.shift_right_logical(noise, 32 - shift) | 64
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


@dataclasses.dataclass(frozen=True)
class Linear(Codebook):
  """Evenly spaced values: -1, -126/127, …, 0, …, 1, stored with an offset of 128."""

  def encode(self, r: jax.Array) -> jax.Array:
    return (jnp.round(r * 127.0) + 128.0).astype(jnp.uint8)

  def decode(self, codes: jax.Array) -> jax.Array:
    # A table, because XLA may turn the division into a product that misses 1.0 by an ulp.
    table = (np.arange(256) - 128).astype(np.float32) / np.float32(127)
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True)
class Table(Codebook):
  """Codes that stand for the entries of a short table; a value takes the nearest one.

  Exactly between two entries the lower wins, as in bitsandbytes.

  Attributes:
    table: the value of every code, in code order. Where a value stands twice (fp4 has two zeros),
      encoding gives the first code.
  """

  table: tuple[float, ...]

  @functools.cached_property
  def _nearest(self) -> tuple[np.ndarray, np.ndarray]:
    values, codes = np.unique(np.asarray(self.table, np.float32), return_index=True)
    return _thresholds(values), codes.astype(np.uint8)

  def encode(self, r: jax.Array) -> jax.Array:
    thresholds, codes = self._nearest
    index = sum((r > t).astype(jnp.uint8) for t in thresholds)
    return jnp.asarray(codes).at[index].get(mode="promise_in_bounds")

  def decode(self, codes: jax.Array) -> jax.Array:
    table = jnp.asarray(np.asarray(self.table, np.float32))
    return table.at[codes].get(mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True)
class Dynamic(Codebook):
  r"""The dynamic map of bitsandbytes, code for code.

  Seven decades :math:`10^{i-6}`, :math:`i = 0 \dots 6`; decade :math:`i` holds the midpoints of
  :math:`2^i` (unsigned: :math:`2^{i+1}`) equal steps from 0.1 to 1; then 0 and 1. Signed, the
  values are mirrored, except that -1 is missing: a block whose extreme is negative shrinks by
  0.7 % each time it is stored. Use it for parity; the optimizers' own default has no such trap.

  References:
    Dettmers et al, `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021
  """

  @functools.cached_property
  def _map(self) -> np.ndarray:
    positive = []
    for i in range(7):
      steps = 2**i if self.signed else 2 ** (i + 1)
      edges = _linspace(steps)
      positive.append(np.float32(10.0 ** (i - 6)) * ((edges[1:] + edges[:-1]) / np.float32(2)))
    positive = np.concatenate(positive).astype(np.float32)
    negative = -positive[::-1] if self.signed else positive[:0]
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    return np.concatenate([negative, zero, positive, one])

  def encode(self, r: jax.Array) -> jax.Array:
    # Closed form first, right to within one code; then one look at the two neighbouring
    # thresholds, so that not even a value one ulp from a midpoint differs from nearest-value
    # search. (searchsorted gives the same codes at 20 times the cost.)
    a = jnp.abs(r)
    decade = sum((a >= 10.0 ** (i - 7)).astype(jnp.int32) for i in range(1, 7))
    steps = jnp.left_shift(1 if self.signed else 2, decade)
    power = jnp.asarray(10.0 ** np.arange(6, -1, -1), jnp.float32)
    fraction = (a * power.at[decade].get(mode="promise_in_bounds") - 0.1) / 0.9
    j = jnp.clip((fraction * steps.astype(jnp.float32)).astype(jnp.int32), 0, steps - 1)
    if self.signed:
      guess = 127 + jnp.where(r < 0, -(steps + j), steps + j)
    else:
      guess = steps - 1 + j
    bounds = jnp.asarray(np.concatenate([[-np.inf], _thresholds(self._map), [np.inf]]), jnp.float32)
    lower = bounds.at[guess].get(mode="promise_in_bounds")
    upper = bounds.at[guess + 1].get(mode="promise_in_bounds")
    return (guess + (r > upper) - (r <= lower)).astype(jnp.uint8)

  def decode(self, codes: jax.Array) -> jax.Array:
    return jnp.asarray(self._map).at[codes].get(mode="promise_in_bounds")


def _linspace(steps: int) -> np.ndarray:
  """0.1 to 1 in float32 as torch rounds it: from both ends, one rounding a point.

  numpy's linspace differs by an ulp in 26 of the 254 values of the unsigned map.
  """
  start, k = np.float32(0.1), np.arange(steps + 1)
  step = np.float64((np.float32(1) - start) / np.float32(steps))
  rising, falling = np.float64(start) + step * k, 1.0 - step * (steps - k)
  return np.where(k < (steps + 1) // 2, rising, falling).astype(np.float32)


def _thresholds(values: np.ndarray) -> np.ndarray:
  """The largest float32 at or below each midpoint of `values`: `r > t` decides exactly."""
  middle = (values[1:].astype(np.float64) + values[:-1].astype(np.float64)) / 2
  t = middle.astype(np.float32)
  return np.where(t > middle, np.nextafter(t, np.float32(-np.inf)), t)


# Quantiles of the normal distribution, with an exact zero and exact ends (Dettmers et al, 2023,
# https://arxiv.org/abs/2305.14314, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two exponent bits, one mantissa bit, in bitsandbytes' code order.
_FP4_POSITIVE = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
_FP4 = _FP4_POSITIVE + tuple(-v for v in _FP4_POSITIVE)

_CODEBOOKS: dict[str, Codebook] = {
  book.name: book
  for book in (
    # Reach 9.9 octaves: |m| down to 1e-3 of its block's largest, then zero.
    Log("log8", 8, True, fine=32, octaves=2, coarse=8),
    # Reach 21.7 octaves of v: sqrt(v) down to 5e-4 of its block's largest.
    Log("log8_unsigned", 8, False, fine=32, octaves=6, coarse=4, dithered=True),
    # Reach 4 octaves of m and 11 of v.
    Log("log4", 4, True, fine=2, octaves=2, coarse=1),
    Log("log4_unsigned", 4, False, fine=2, octaves=4, coarse=1, dithered=True),
    Dynamic("dynamic", 8, True),
    Dynamic("dynamic_unsigned", 8, False),
    Linear("linear", 8, True),
    Table("nf4", 4, True, _NF4),
    Table("fp4", 4, True, _FP4),
  )
}


def get_codebook(codebook: str | Codebook) -> Codebook:
  """Returns the codebook of that name; a `Codebook` is returned as it is."""
  if isinstance(codebook, Codebook):
    return codebook
  if codebook not in _CODEBOOKS:
    near = difflib.get_close_matches(str(codebook), _CODEBOOKS, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(
      f"`codebook` {codebook!r} is unknown. {hint}Known: {', '.join(sorted(_CODEBOOKS))}."
    )
  return _CODEBOOKS[codebook]
