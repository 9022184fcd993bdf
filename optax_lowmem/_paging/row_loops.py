"""Loops over the rows of arrays in host memory: a few at a time are fetched, used and stored.

XLA's GPU backend makes asynchronous copies of slices that are taken of host memory in a loop, and
of what is put back, updates host memory in place, and cannot hold more than a trip. Of each lane a
trip moves one tile, and one is fetched while that before it is stored. What did not work: two tiles
of one array a trip, or one that is carried to the next. XLA then copies the array on the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from optax_lowmem._host_memory.pages import Paged, nbytes, without_page_axes
from optax_lowmem._host_memory.placement import DEVICE, placement_of
from optax_lowmem._programs.fences import fence

# Most bytes of pages a trip, old and new. A quarter of it is under way at a time, 0.3 ms at 25
# GB/s, beside which ten launches are little.
_TRIP = 32 << 20

Tiles = list[Any]


class Rows(NamedTuple):
  """How arrays are seen as rows that are dealt out to lanes.

  Attributes:
    lanes: how many.
    lead: how many axes are merged to the first, along which rows lie; 0 if all are.
    unit: if all are, of how many elements of the largest array every part must be a multiple.
  """

  lanes: int
  lead: int
  unit: int = 1

  def pieces(self, shapes: Sequence[tuple[int, ...]]) -> int:
    """The number of pieces that each lane of arrays of these shapes can be cut into."""
    if self.lead:
      return math.prod(shapes[0][: self.lead]) // self.lanes
    return max(map(math.prod, shapes)) // self.unit // self.lanes

  def view(self, x: Any) -> Any:
    """An array on the device as (rows of a lane, lanes, …)."""
    return x.reshape(-1, self.lanes, *x.shape[self.lead or x.ndim :])

  def tiles(self, lane: Any, count: int) -> Any:
    """A lane as (count, rows of a tile, …)."""
    shape = without_page_axes(lane.shape)
    return lane.reshape(count, -1, *shape[self.lead or len(shape) :])


def over_rows(
  fn: Callable[[Tiles, Tiles, Tiles], tuple[Tiles, Tiles]],
  rows: Rows,
  pages: Sequence[Paged],
  reads: Sequence[Any],
  buffers: Sequence[Any],
  stores: Sequence[int],
  max_bytes: int,
) -> tuple[list[Paged], list[Any]]:
  """Runs `fn` over the rows of pages and of arrays on the device.

  Args:
    fn: of tiles of `pages`, `reads` and `buffers`, each of the same rows with all that lies behind
      them; returns new tiles for the pages at `stores`, and for all `buffers`.
    rows: how they are cut.
    pages: arrays in host memory.
    reads: arrays on the device that are read.
    buffers: arrays on the device that are read and replaced.
    stores: which of `pages` are replaced.
    max_bytes: most bytes of tiles of pages, old and new, on the device at a time.

  Returns:
    The new pages, those of `stores`, and the new buffers.
  """
  pieces = rows.pieces([x.shape for x in (*pages, *reads, *buffers)])
  moved = sum(map(nbytes, pages)) + sum(nbytes(pages[k]) for k in stores)
  # Beside tiles there is what is computed of them, up to 8 bytes for each of codes.
  wanted, most = (pieces * n // max(moved, 1) for n in (min(max_bytes // 8, _TRIP), max_bytes))
  size = _divisor(pieces, wanted, most)
  count = pieces // size
  read, given = [*map(rows.view, reads)], [*map(rows.view, buffers)]
  lanes = [[rows.tiles(x, count) for x in page.lanes] for page in pages]

  def place(x, i, lane):  # of a tile in an array on the device
    unit = x.shape[0] // count
    return (i * unit, lane, *(0,) * (x.ndim - 2)), (unit, 1, *x.shape[2:])

  def cut(x, i, lane):
    at, extent = place(x, i, lane)
    return jax.lax.dynamic_slice(x, at, extent).reshape(extent[0], *extent[2:])

  def paste(x, tile, i, lane):
    at, extent = place(x, i, lane)
    return jax.lax.dynamic_update_slice(x, tile.reshape(extent), at)

  # An index into host memory is the number of the trip, and nothing else. XLA works out beforehand
  # where each trip copies from: that of jax 0.10.2 by the number of the trip whatever the index is,
  # and that of 0.12 has a kernel copy where the index is not linear in it. docs/xla_notes.md#trip
  def fetch(x, i):
    return DEVICE.put(jax.lax.dynamic_index_in_dim(x, i, 0, False))

  def store(x, tile, i):
    tile = placement_of(x).put(tile[None])
    return jax.lax.dynamic_update_slice(x, tile, (i, *(0,) * (x.ndim - 1)))

  def trip(i, carry):
    stored, given = carry
    now = [list(lane) for lane in lanes]
    for k, lane in zip(stores, stored, strict=True):
      now[k] = list(lane)
    new: Tiles = []
    for j in range(rows.lanes):
      here = [lane[j] for lane in now]
      if j:
        # XLA would fetch all lanes before it stores one. In a loop it heeds a barrier.
        new, here = fence((new, here))
        for k, tile in zip(stores, new, strict=True):
          now[k][j - 1] = store(now[k][j - 1], tile, i)
      tiles = [fetch(x, i) for x in here]
      new, made = fn(tiles, *([cut(x, i, j) for x in xs] for xs in (read, given)))
      given = [paste(x, tile, i, j) for x, tile in zip(given, made, strict=True)]
      for k in stores:
        now[k][j] = here[k]
    for k, tile in zip(stores, new, strict=True):
      now[k][-1] = store(now[k][-1], tile, i)
    return [now[k] for k in stores], given

  stored, given = jax.lax.fori_loop(0, count, trip, ([lanes[k] for k in stores], given))
  new = []
  for k, lane in zip(stores, stored, strict=True):
    shape = pages[k].lanes[0].shape
    new.append(Paged(tuple(x.reshape(shape) for x in lane), pages[k].axis))
  return new, [x.reshape(like.shape) for x, like in zip(given, buffers, strict=True)]


@functools.lru_cache(maxsize=1024)
def _divisor(n: int, wanted: int, most: int) -> int:
  """The largest divisor of `n` up to `wanted`; if that is small, the next one, up to `most`.

  It is not `n` itself if that can be helped: of one trip XLA would make no loop, and move its
  copies to where they are of no use. If `n` is prime, there is nothing between.

  >>> _divisor(64, 20, 60), _divisor(12 * 32003, 16000, 50000), _divisor(32003, 100, 50000)
  (16, 32003, 32003)
  >>> _divisor(32003, 100, 30000), _divisor(64, 100, 1000)
  (1, 32)
  """
  wanted = max(1, min(wanted, n // 2))
  pairs = ((d, n // d) for d in range(1, math.isqrt(n) + 1) if n % d == 0)
  divisors = sorted({d for pair in pairs for d in pair})
  size = max(d for d in divisors if d <= wanted)
  larger = [d for d in divisors if wanted < d <= most]
  return larger[0] if larger and 16 * size < wanted else size
