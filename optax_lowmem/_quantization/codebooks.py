"""The codebooks by their names, and those that are tables."""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowmem._arguments.spelling import did_you_mean
from optax_lowmem._meshes.explicit_axes import explicit_sharding
from optax_lowmem._quantization.codebook import Codebook
from optax_lowmem._quantization.log_codebook import Log
from optax_lowmem._quantization.power_codebook import Power, Sum

CodebookName = Literal[
  "dynamic",
  "dynamic_unsigned",
  "fp4",
  "linear",
  "log4",
  "log4_unsigned",
  "log8",
  "log8_unsigned",
  "nf4",
  "power4",
  "power4_unsigned",
  "power8",
  "power8_unsigned",
  "sum8",
]


def _looked_up(table: Any, index: Any) -> jax.Array:
  """Entries of a short table, which lie as `index` does: on explicit axes JAX has to be told."""
  where = explicit_sharding(index)
  return jnp.asarray(table).at[index].get(mode="promise_in_bounds", out_sharding=where)


@dataclasses.dataclass(frozen=True)
class Linear(Codebook):
  """Evenly spaced values: -1, -126/127, …, 0, …, 1, stored with an offset of 128."""

  def encode(self, r: jax.Array) -> jax.Array:
    return (jnp.round(r * 127.0) + 128.0).astype(jnp.uint8)

  def decode(self, codes: jax.Array) -> jax.Array:
    # A table, because XLA may turn the division into a product that misses 1.0 by an ulp.
    table = (np.arange(256) - 128).astype(np.float32) / np.float32(127)
    return _looked_up(table, codes)


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
    return _looked_up(codes, index)

  def decode(self, codes: jax.Array) -> jax.Array:
    return _looked_up(np.asarray(self.table, np.float32), codes)


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
    fraction = (a * _looked_up(power, decade) - 0.1) / 0.9
    j = jnp.clip((fraction * steps.astype(jnp.float32)).astype(jnp.int32), 0, steps - 1)
    if self.signed:
      guess = 127 + jnp.where(r < 0, -(steps + j), steps + j)
    else:
      guess = steps - 1 + j
    bounds = jnp.asarray(np.concatenate([[-np.inf], _thresholds(self._map), [np.inf]]), jnp.float32)
    lower = _looked_up(bounds, guess)
    upper = _looked_up(bounds, guess + 1)
    moved = (r > upper).astype(jnp.int32) - (r <= lower).astype(jnp.int32)
    return (guess + moved).astype(jnp.uint8)

  def decode(self, codes: jax.Array) -> jax.Array:
    return _looked_up(self._map, codes)


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
    # Compared with others in benchmarks/accuracy.py and codebooks.py: docs/codebooks.md.
    Power("power8", 8, True, fourth=0.75),
    Power("power8_unsigned", 8, False, fourth=1.0),
    Power("power4", 4, True, fourth=0.0, still=0.25),
    Power("power4_unsigned", 4, False, fourth=0.75),
    # Compared with others in benchmarks/accumulation.py: docs/mixed_precision.md.
    Sum("sum8", 8, True, fourth=0.5),
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
  """Returns the codebook of that name; a `Codebook` is returned as it is.

  Args:
    codebook: a name known to `quantize`, or a codebook of one's own.

  Returns:
    The codebook.

  Raises:
    ValueError: for an unknown name; for a codebook of one's own that has neither 8 nor 4 bits, or a
      name that is another's or does not fit into a key path.
    TypeError: for a codebook of one's own that cannot be hashed.

  Examples:
    >>> import optax_lowmem as lowmem
    >>> print(lowmem.get_codebook("nf4").values[:3].round(2))
    [-1.   -0.7  -0.53]
  """
  if isinstance(codebook, Codebook):
    _check_own(codebook)
    return codebook
  if codebook not in _CODEBOOKS:
    hint = did_you_mean(str(codebook), _CODEBOOKS, count=3, cutoff=0.4)
    raise ValueError(
      f"`codebook` {codebook!r} is unknown.{hint} Known: {', '.join(sorted(_CODEBOOKS))}."
    )
  return _CODEBOOKS[codebook]


def _check_own(book: Codebook) -> None:
  """Refuses a codebook that no state could be held in."""
  try:
    hash(book)
  except TypeError as error:
    raise TypeError(
      f"`codebook` must be hashable, got {book!r}: {error}. Make its class a "
      "`dataclasses.dataclass(frozen=True)`, and sequences in it tuples."
    ) from error
  if book.bits not in (8, 4):
    raise ValueError(f"`codebook` {book.name!r} must have 8 or 4 bits, got {book.bits!r}.")
  if not isinstance(book.name, str) or not re.fullmatch(r"[\w-]+", book.name):
    raise ValueError(
      f"`codebook` must have a name of letters, digits, '_' and '-', got {book.name!r}: it stands "
      "in the key paths of saved states."
    )
  if _CODEBOOKS.get(book.name, book) != book:
    raise ValueError(
      f"`codebook` {book.name!r} has the name of another, and what is saved of it would be read as "
      "that one's. Give it a name of its own."
    )


def _reduced(book: Codebook) -> Any:
  """What a pickle holds of a codebook: if it is known by its name, not where its class is."""
  if _CODEBOOKS.get(book.name) == book:
    return get_codebook, (book.name,)
  return object.__reduce_ex__(book, 2)


for _kind in {type(book) for book in _CODEBOOKS.values()}:
  copyreg.pickle(_kind, _reduced)  # type: ignore[arg-type]
