"""The tile loop: arrays of one shape, dense or quantized, updated in place a tile at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_lowmem._quantization.array import QuantizedArray, has_halves
from optax_lowmem._quantization.positions import Positions
from optax_lowmem._update.tile_views import (
  Tile,
  bits_in_step,
  cut_tile,
  from_bits,
  paste_tile,
  restored,
  view,
  written_view,
)

# An array of more elements than this is walked in tiles. Below it, the temporaries of a whole array
# are a few hundred KiB, and a loop for each of 300 leaves would take longer to compile.
WHOLE = 1 << 18
# Each tile costs some ten launches, so there are as few as the promise of 0.1 B/param of
# temporaries allows: a tile of `writes` is held once, and is to cost no more than this.
_BUDGET = 0.07
_SMALLEST = 1 << 15


def map_tiles(
  fn: Callable[[list[Any], list[Any]], Sequence[Any]],
  reads: Sequence[Tile],
  writes: Sequence[Tile],
  tile: int | None = None,
) -> list[Any]:
  """Returns `fn(reads, writes)`, computed a tile at a time.

  Only one tile is ever dense. The results take the place of `writes`, so a buffer that nobody
  else needs is reused.

  Args:
    fn: takes a tile of each array and returns the new tiles of `writes`, in the same form. Every
      element of a result may depend on the elements of its block only. Where 4-bit codes lie half a
      block apart (`has_halves`), a tile of a dense array is a pair, the halves of every row.
    reads: arrays that are only read; all arrays have one logical shape.
    writes: arrays that are read and replaced.
    tile: elements a tile; by default, what keeps the temporaries below 0.1 bytes an element.

  Returns:
    The replaced `writes`.
  """
  arrays = [*reads, *writes]
  shape = arrays[0].shape
  grid = _grid(shape, [a for a in arrays if isinstance(a, QuantizedArray | Positions)])
  size = math.prod(shape)
  if tile is None:
    tile = WHOLE if size <= WHOLE else _tile_size(writes, size)
  if grid is None or not size:
    return list(fn(list(reads), list(writes)))
  rows, columns, unit = grid
  sources = [view(a, rows, columns) for a in reads]
  state = [written_view(a, rows, columns) for a in writes]

  halved = any(isinstance(a, QuantizedArray) and has_halves(a) for a in sources + state)

  def cut(arrays, segment, i):
    return [cut_tile(a, segment.start(i), segment.extent, halved) for a in arrays]

  def cut_sources(segment, i):
    tiles = cut([bits_in_step(a, i) for a in sources], segment, i)
    return [from_bits(t, a) for t, a in zip(tiles, sources, strict=True)]

  def cut_state(state, segment, i):
    return [from_bits(t, a) for t, a in zip(cut(state, segment, i), writes, strict=True)]

  def paste(state, new, segment, i):
    return [paste_tile(a, t, segment.start(i)) for a, t in zip(state, new, strict=True)]

  if size <= tile:
    whole = _Segment(1, lambda _: (0, 0), (rows, columns))
    state = paste(state, fn(cut_sources(whole, 0), cut_state(state, whole, 0)), whole, 0)
    return [restored(a, like) for a, like in zip(state, writes, strict=True)]

  # What a step makes is carried, and pasted by the next before it cuts, so that all that reads a
  # tile comes before what replaces it. Cut, made and pasted in one step, XLA could not order them,
  # and would copy all of `writes` each time (4 B/param of temporaries, 20 times the time); and
  # what is made where it is pasted is made by one core only. The last step of the loop makes a
  # tile in vain: pasted after the loop, the state would be copied once. docs/xla_notes.md#tiles
  for segment in _segments(rows, columns, unit, tile):

    def step(i, carry, segment=segment):
      i = jnp.asarray(i)  # a Python integer under `jax.disable_jit`
      state, made = carry
      state = paste(state, made, segment, jnp.maximum(i - 1, 0))
      i = _smaller(i, segment.tiles - 1)
      return state, fn(cut_sources(segment, i), cut_state(state, segment, i))

    carry = state, cut_state(state, segment, 0)
    state, _ = jax.lax.fori_loop(0, segment.tiles + 1, step, carry)
  return [restored(a, like) for a, like in zip(state, writes, strict=True)]


def _smaller(i: jax.Array, j: int) -> jax.Array:
  """min(i, j). On a CPU by a sort, which keeps a loop on all cores.

  XLA (of jax 0.12) runs loops that call no library as one kernel: 79 ms, not 23, for 2^24 elements.
  """
  return jax.lax.platform_dependent(
    i,
    cpu=lambda i: jax.lax.sort(jnp.stack([i, jnp.asarray(j, i.dtype)]))[0],
    default=lambda i: jnp.minimum(i, j),
  )


def _tile_size(writes: Sequence[Tile], size: int) -> int:
  """Elements a tile: 1/32 of the array for two moments in 8 bits, 1/128 with a float32 update."""
  # A CPU computes bfloat16 in float32, and holds the tile so.
  widths = [4 if x.dtype == jnp.bfloat16 else x.dtype.itemsize for x in jax.tree.leaves(writes)]
  held = sum(x.size * w for x, w in zip(jax.tree.leaves(writes), widths, strict=True)) / size
  return max(_SMALLEST, size >> max(0, math.ceil(math.log2(held / _BUDGET))))


def _grid(
  shape: tuple[int, ...], arrays: Sequence[QuantizedArray | Positions]
) -> tuple[int, int, int] | None:
  """How to see the arrays as matrices: rows, columns, and the column step that splits no block.

  Blocks are contiguous, so where they fill what they run along, a block is a row: XLA then emits
  loops over whole blocks, without divisions of indices. Elsewhere a row is what the blocks run
  along. None if two arrays disagree about that.
  """
  size, ragged = math.prod(shape), set()
  lengths = [1]
  for q in arrays:
    n, length = math.prod(q.extent), math.prod(q.block)
    pairs = isinstance(q, QuantizedArray) and q.codebook.bits == 4 and q.codebook.pairs_neighbours
    lengths.append(math.lcm(length, 2) if pairs else length)
    if n % lengths[-1]:
      ragged.add(n)
  unit = math.lcm(*lengths)
  if not ragged:
    return (size // unit, unit, unit) if size % unit == 0 else (1, size, unit)
  if len(ragged | {math.prod(q.extent) for q in arrays}) > 1:
    return None
  n = ragged.pop()
  return size // n, n, unit


class _Segment(NamedTuple):
  """A part of a matrix, cut into `tiles` parts of one extent, part i at `start(i)`."""

  tiles: int
  start: Callable[[Any], tuple[Any, Any]]
  extent: tuple[int, int]


def _segments(rows: int, columns: int, unit: int, tile: int) -> list[_Segment]:
  """Covers a matrix by tiles: one segment, or two where a remainder is left."""
  if columns <= tile:
    height = _width(rows, 1, tile // columns)
    full = rows // height
    found = [
      _Segment(full, lambda i: (i * height, 0), (height, columns)),
      _Segment(1, lambda i: (full * height, 0), (rows % height, columns)),
    ]
  else:
    width = _width(columns, unit, tile)
    full = columns // width
    found = [
      _Segment(rows * full, lambda i: (i // full, i % full * width), (1, width)),
      _Segment(rows, lambda i: (i, full * width), (1, columns % width)),
    ]
  return [segment for segment in found if segment.tiles and min(segment.extent)]


def _width(columns: int, unit: int, tile: int) -> int:
  """The widest tile that leaves no remainder, unless that would be far narrower than asked."""
  most = max(1, tile // unit)
  even = (n for n in range(most, most // 4, -1) if columns % (n * unit) == 0)
  return next(even, most) * unit
