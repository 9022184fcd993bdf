"""How the kernel for TPUs cuts arrays, and how a part of a tile is loaded and stored."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem._quantization.lane_tiles import VectorTile, pack_vectors, unpack_vectors

LANES = 128
# Rows that are computed at once: those of a register of bytes. 32 x 128 elements are 4 of the 64
# registers, so that a rule's values seldom need memory.
ROWS = 32
# On-chip memory for a tile of every array. It is needed twice, to move one tile while another is
# computed; a kernel may have 16 MiB.
_BYTES = 5 << 20
_MOST_ROWS = 1024  # of a tile, or scales of few columns would take more than all else

Tile = Any  # a jax.Array, or a QuantizedArray with a single level of scales, or their forms


class Grid(NamedTuple):
  """How arrays of one logical shape are cut, seen as `lead` matrices.

  Attributes:
    lead, height, columns: the shape.
    rows, width: of a tile; one at the edge may reach past it.
    unit: columns that are computed at once, but for what is left of a row.
    length: elements of a block.
    upright: whether scales lie as the elements do. If not, their transpose does: XLA lays an array
      out along the axis that fills the lanes, which of (4096, 64) is the first.
  """

  lead: int
  height: int
  columns: int
  rows: int
  width: int
  unit: int
  length: int
  upright: bool

  @property
  def steps(self) -> tuple[int, int, int]:
    """How many tiles there are along each axis."""
    return self.lead, -(-self.height // self.rows), -(-self.columns // self.width)

  @property
  def widths(self) -> list[int]:
    """Columns of the parts of a tile."""
    return [w for w in (self.unit * (self.width >= self.unit), self.width % self.unit) if w]


def unit_of(arrays: Sequence[Tile]) -> int:
  """Fewest columns of whole blocks of which codes, too, fill whole registers."""
  quantized = [a for a in arrays if isinstance(a, QuantizedArray)]
  return math.lcm(*(math.lcm(q.block[0], LANES * 8 // q.codebook.bits) for q in quantized))


def grid_of(reads: Sequence[Tile], writes: Sequence[Tile], fresh: Sequence[Tile]) -> Grid:
  """The grid of arrays that the kernel supports."""
  shape, unit = (1, *writes[0].shape)[-max(2, writes[0].ndim) :], unit_of([*reads, *writes])
  *lead, height, columns = shape
  length = next(a.block[0] for a in writes if isinstance(a, QuantizedArray))
  count = columns // length
  upright = _up(height, 8) * _up(count, LANES) <= _up(count, 8) * _up(height, LANES)
  each = sum(map(_bytes, [*reads, *writes, *writes, *fresh]))
  fit = int(_BYTES / each)  # elements
  # A tile of scales has whole registers, or all columns there are.
  tall, wide = (ROWS, LANES * length) if upright else (LANES, 8 * length)
  width = _width(columns, math.lcm(wide, unit), fit // tall)
  rows = min(fit // width, _MOST_ROWS, _up(height, tall)) // tall * tall
  return Grid(math.prod(lead), height, columns, max(rows, tall), width, unit, length, upright)


def _width(columns: int, step: int, most: int) -> int:
  """All columns, or as many at a time as leave the least past the edge."""
  if columns <= max(most, step):
    return columns
  return min(range(step, max(most, step) + 1, step), key=lambda w: (-columns % w, -w))


def _bytes(a: Tile) -> float:
  """Bytes an element."""
  if not isinstance(a, QuantizedArray):
    return a.dtype.itemsize
  return a.codebook.bits / 8 + 4 / a.block[0]


def _up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def view(a: Tile, grid: Grid) -> list[Any]:
  """The arrays of `a` as stacks of matrices: its own, or its codes and its scales."""
  leaves = [a.codes, a.scales] if isinstance(a, QuantizedArray) else [a]
  views = [jnp.reshape(x, (grid.lead, grid.height, -1)) for x in leaves]
  return [views[0], *(x if grid.upright else x.swapaxes(1, 2) for x in views[1:])]


def restored(views: Sequence[jax.Array], like: Tile, grid: Grid) -> Tile:
  """The inverse of `view`, in the form of `like`."""
  leaves, tree = jax.tree.flatten(like)
  views = [views[0], *(x if grid.upright else x.swapaxes(1, 2) for x in views[1:])]
  return tree.unflatten(x.reshape(y.shape) for x, y in zip(views, leaves, strict=True))


def view_specs(a: Tile, grid: Grid) -> list[pl.BlockSpec]:
  """Which tile of each array of `view(a, grid)` a step of the grid works on."""

  def spec(columns, upright=True):
    shape = (grid.rows, columns) if upright else (columns, grid.rows)
    return pl.BlockSpec((None, *shape), lambda k, i, j: (k, i, j) if upright else (k, j, i))

  if not isinstance(a, QuantizedArray):
    return [spec(grid.width)]
  codes = grid.width * a.codebook.bits // 8
  return [spec(codes), spec(grid.width // grid.length, grid.upright)]


def form(a: Tile, width: int, codes: Any = jnp.int32) -> Any:
  """The form in which a body is given a part of so many columns; it returns codes of uint8."""
  if not isinstance(a, QuantizedArray):
    return jax.ShapeDtypeStruct((ROWS, width), a.dtype)
  scales = (jax.ShapeDtypeStruct((ROWS, 1), jnp.float32),) * (width // a.block[0])
  return VectorTile(jax.ShapeDtypeStruct((ROWS, width), codes), scales, a.codebook, a.block[0])


class Part(NamedTuple):
  """A part of a tile.

  Attributes:
    row: its first row.
    column: given n, its first column, divided by n.
    block: the number of its first block in a row.
    width: its columns.
  """

  row: Any
  column: Callable[[int], Any]
  block: Any
  width: int


def for_parts(grid: Grid, fn: Callable[[Part], None]) -> None:
  """Calls `fn` for every part of a tile, in loops of the kernel."""
  whole, rest = divmod(grid.width, grid.unit)
  blocks = grid.unit // grid.length

  def row(i, carry):
    at = pl.multiple_of(i * ROWS, ROWS)

    def column(j, carry):
      start = functools.partial(_aligned, j, grid.unit)
      fn(Part(at, start, j * blocks, grid.unit))
      return carry

    jax.lax.fori_loop(0, whole, column, 0)
    if rest:
      fn(Part(at, lambda n: whole * grid.unit // n, whole * blocks, rest))
    return carry

  jax.lax.fori_loop(0, grid.rows // ROWS, row, 0)


def _aligned(index: Any, unit: int, n: int) -> Any:
  return pl.multiple_of(index * (unit // n), LANES)


class Refs:
  """The tile of one array, in on-chip memory."""

  def __init__(self, like: Tile, refs: Sequence[Any], scratch: Iterator[Any], grid: Grid):
    """Takes the tile's refs, and, if scales are not upright, a scratch for them."""
    self._like, self._grid = like, grid
    self._values, *self._stored = refs
    self._scales = next(scratch) if self._stored and not grid.upright else None

  def open(self) -> None:
    """Turns scales as elements lie."""
    if self._scales is not None:
      self._scales[...] = self._stored[0][...].T

  def close(self) -> None:
    """Turns scales back."""
    if self._scales is not None:
      self._stored[0][...] = self._scales[...].T

  def load(self, part: Part) -> Any:
    """What a body is given of a part."""
    if not self._stored:
      return self._values[self._at(part, 1)]
    q = self._like
    codes = self._values[self._at(part, 8 // q.codebook.bits)].astype(jnp.int32)
    if q.codebook.bits == 4:
      codes = unpack_vectors(codes, self._grid.length)
    scales = self._rows_of_scales()[pl.ds(part.row, ROWS), :]
    # A column whose number is not known yet can only be told from others by a mask.
    columns = (jnp.where(mask, scales, 0.0) for mask in self._columns(part, scales))
    return VectorTile(
      codes, tuple(x.max(-1, keepdims=True) for x in columns), q.codebook, self._grid.length
    )

  def store(self, part: Part, new: Any) -> None:
    """Puts what a body returns in its place."""
    if not self._stored:
      self._values[self._at(part, 1)] = new
      return
    bits, codes = self._like.codebook.bits, new.codes
    if bits == 4:
      codes = pack_vectors(codes.astype(jnp.int32), self._grid.length).astype(jnp.uint8)
    self._values[self._at(part, 8 // bits)] = codes
    refs, rows = self._rows_of_scales(), pl.ds(part.row, ROWS)
    scales = refs[rows, :]
    for mask, column in zip(self._columns(part, scales), new.scales, strict=True):
      scales = jnp.where(mask, column, scales)
    refs[rows, :] = scales

  def _rows_of_scales(self) -> Any:
    return self._stored[0] if self._scales is None else self._scales

  def _at(self, part: Part, each: int) -> tuple[Any, Any]:
    """Where the elements of a part lie, of which `each` are in a column."""
    return pl.ds(part.row, ROWS), pl.ds(part.column(each), part.width // each)

  def _columns(self, part: Part, scales: jax.Array) -> list[jax.Array]:
    """For each block of a part's rows, where its scale is."""
    lane = jax.lax.broadcasted_iota(jnp.int32, scales.shape, 1)
    count = part.width // self._grid.length
    return [lane == part.block + k for k in range(count)]
