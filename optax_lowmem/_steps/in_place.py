"""Arrays replaced by an elementwise function of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType

from optax_lowmem._quantization.positions import Positions, indices
from optax_lowmem._update.tile_loop import map_tiles

# Elements that one position is held for. Rows of one element would be laid out anew.
_ROW = 64


def in_place(
  fn: Callable[[Sequence[jax.Array], jax.Array], list[jax.Array]], arrays: Sequence[jax.Array]
) -> list[jax.Array]:
  """`fn(arrays, positions)`, which takes the place of the arrays where nobody else needs them.

  On GPUs one pass, which XLA lays out on a mesh. On a CPU, XLA would make each result by itself,
  and keep what they are made of: 10 B/param of two arrays. So there it is a loop over tiles.

  Args:
    fn: an elementwise function of arrays and the `indices` of their elements, which are not made
      where it has no need of them. It returns an array in the place and dtype of each.
    arrays: of one shape.
  """

  def whole(*arrays):
    return fn(arrays, indices(arrays[0].shape))

  def tiles(*arrays):
    shape, size = arrays[0].shape, (arrays[0].size,)
    index = Positions(indices(size, (_ROW,)), (_ROW,), size, size)
    flat = [x.reshape(-1) for x in arrays]
    new = map_tiles(lambda reads, tiles: fn(tiles, reads[0].decode()), [index], flat)
    return [x.reshape(shape) for x in new]

  meshes = [jax.typeof(x).sharding.mesh for x in arrays]
  explicit = any(AxisType.Explicit in mesh.axis_types for mesh in meshes)
  if explicit or jax.device_count() > 1:  # a flat view of what is sharded would gather it
    return whole(*arrays)
  return jax.lax.platform_dependent(*arrays, cpu=tiles, default=whole)
