"""Arrays replaced by an elementwise function of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax

from optax_lowmem._meshes.explicit_axes import explicit_mesh
from optax_lowmem._quantization.positions import Positions, indices
from optax_lowmem._update.tile_loop import map_tiles

# Elements that one position is held for. Rows of one element would be laid out anew.
_ROW = 64


def in_place(
  fn: Callable[[Sequence[jax.Array], jax.Array], list[jax.Array]],
  arrays: Sequence[jax.Array],
  reads: Sequence[jax.Array] = (),
) -> list[jax.Array]:
  """`fn([*arrays, *reads], positions)`, in the place of the arrays where nobody else needs them.

  On GPUs one pass, which XLA lays out on a mesh. On a CPU, XLA would make each result by itself,
  and keep what they are made of: 10 B/param of two arrays. So there it is a loop over tiles.

  Args:
    fn: an elementwise function of arrays and the `indices` of their elements, which are not made
      where it has no need of them. It returns an array in the place and dtype of each of `arrays`.
    arrays: of one shape.
    reads: more of that shape, which nothing takes the place of.
  """
  every = [*arrays, *reads]

  def whole(*arrays):
    return fn(arrays, indices(arrays[0].shape))

  def tiles(*every):
    shape, size = every[0].shape, (every[0].size,)
    index = Positions(indices(size, (_ROW,)), (_ROW,), size, size)
    flat = [x.reshape(-1) for x in every]

    def step(reads, tiles):
      return fn([*tiles, *reads[1:]], reads[0].decode())

    new = map_tiles(step, [index, *flat[len(arrays) :]], flat[: len(arrays)])
    return [x.reshape(shape) for x in new]

  explicit = explicit_mesh(every) is not None
  if explicit or jax.device_count() > 1:  # a flat view of what is sharded would gather it
    return whole(*every)
  return jax.lax.platform_dependent(*every, cpu=tiles, default=whole)
