"""Sharded arrays: every device works on its own shard, and nothing is exchanged.

A tile loop over a sharded array would gather it, so the loop is run by every device on the shard
that it holds. Where the mesh's axes are explicit, the shardings are known while tracing, and that
is a `jax.shard_map`. Where they are automatic, the compiler knows them, later, and asks: that is
`custom_partitioning`.

Shards must hold whole blocks. An array that is cut through its blocks is laid out along another of
its axes; state made here lies so from the start, so only gradients and updates have to move.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_lowmem._meshes.explicit_axes import explicit_mesh, explicit_names
from optax_lowmem._programs.phases import in_a_phase
from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem._quantization.tangents import derivative
from optax_lowmem._sharding.layout import Tile, divide, laid_out, shard_of, sharding_of, units_of


def on_shards(
  fn: Callable[[dict[int, Tile], dict[int, jax.Array]], Mapping[int, Tile]],
  values: dict[int, Tile],
  shared: dict[int, jax.Array],
  results: Mapping[int, Tile],
) -> dict[int, Tile]:
  """Returns `fn(values, shared)`, computed by every device on its own shard.

  All are cut as the first quantized array is, or else the first array; what lies otherwise is laid
  out again. A result comes back laid out as the value of the same key.

  Args:
    fn: may make an element of its results of the elements of its block only.
    values: arrays of one logical shape, by key.
    shared: scalars that every shard needs, which `fn` must not close over.
    results: the form of what `fn` returns, of that same shape: anything with shapes and dtypes.
  """
  if in_a_phase():  # with reductions over all devices beside it: XLA is to lay out all of it
    return dict(fn(values, shared))
  task = _Task(fn, values, shared, results)
  if (mesh := explicit_mesh(task.arrays)) is not None:
    return task.results(_with_shard_map(task, mesh))
  # What is not traced is computed now, where it lies; in a `shard_map` of the user's, arrays are
  # shards already.
  traced = any(isinstance(x, Tracer) for x in task.arrays)
  manual = any(AxisType.Manual in jax.typeof(x).sharding.mesh.axis_types for x in task.arrays)
  if jax.device_count() == 1 or manual or not traced:
    return dict(fn(values, shared))
  return task.results(_with_custom_partitioning(task))


def full_on_shards(leaf: Any, form: Tile, scalars: Sequence[jax.Array]) -> Tile:
  """A tile of that form and `leaf`'s shape, each array filled with its scalar, cut as `leaf` is."""
  arrays, tree = jax.tree.flatten(form)
  known = sharding_of(leaf)
  if known is None and isinstance(leaf, Tracer) and jax.device_count() > 1:

    def fill(values, shared):
      part = values[0].shape

      def shape(x):
        sizes = zip(x.shape, part, leaf.shape, strict=True)
        return tuple(n if cut == whole else n * cut // whole for n, cut, whole in sizes)

      filled = [jnp.full(shape(x), shared[k], x.dtype) for k, x in enumerate(arrays)]
      return {1: tree.unflatten(filled)}

    return on_shards(fill, {0: leaf}, dict(enumerate(scalars)), {1: form})[1]
  where = None
  if known is not None:
    where = laid_out(known.mesh, divide(units_of(form), known.spec, known.mesh.shape))
  return tree.unflatten(
    jnp.full_like(leaf, v, dtype=x.dtype, shape=x.shape, device=where)
    for x, v in zip(arrays, scalars, strict=True)
  )


def with_automatic_sharding(run: Callable[..., Any], args: Any, like: Any) -> Any:
  """Calls `run`; under a mesh of explicit axes, lets the compiler lay out what is inside.

  A flat view of a sharded array has no explicit sharding. The results are sharded as `like`.
  """
  if (mesh := explicit_mesh(jax.tree.leaves(like))) is None:
    return run(*args)

  def sharding(x):  # scalars are on no mesh yet
    return NamedSharding(mesh, jax.typeof(x).sharding.spec)

  return jax.sharding.auto_axes(run, out_sharding=jax.tree.map(sharding, like))(*args)


def on_mesh_of(leaves: Sequence[Any], x: jax.Array) -> jax.Array:
  """`x` on every device of the leaves' mesh, where updates will leave it, if there is just one."""
  meshes = {s.mesh for s in map(sharding_of, leaves) if s is not None}
  traced = any(isinstance(y, Tracer) for y in (x, *leaves))
  if len(meshes) != 1 or traced or jnp.issubdtype(x.dtype, jax.dtypes.extended):
    return x
  host, mesh = np.asarray(x), meshes.pop()
  where = laid_out(mesh, [None] * x.ndim)
  return jax.make_array_from_callback(x.shape, where, lambda index: host[index])


class _Task:
  """A function of tiles, as one of flat arrays that may be shards. All have the tiles' rank.

  Attributes:
    units: for each axis, the number of pieces that every tile can be cut into.
    shape: of the tiles.
    arrays: those of the values.
    tiles: for each of them, the key of its tile.
    shared: the scalars.
    guide: the position of the one that says how all are cut.
    places: for each array of the results, the position of the one that it replaces, if any.
  """

  def __init__(
    self,
    fn: Callable[..., Mapping[int, Tile]],
    values: dict[int, Tile],
    shared: dict[int, jax.Array],
    results: Mapping[int, Tile],
  ):
    tiles = [*values.values(), *results.values()]
    units = zip(*map(units_of, tiles), strict=True)
    self.units = [functools.reduce(math.gcd, sizes) for sizes in units]
    self.shape = tiles[0].shape
    self._fn = fn
    self.arrays, self._values = jax.tree.flatten(values)
    self.shared, self._shared = jax.tree.flatten(shared)
    self._results = jax.tree.structure(results)
    keys = {k: jax.tree.map(lambda _, k=k: k, tile) for k, tile in values.items()}
    self.tiles = jax.tree.leaves(keys)
    states = [k for k, tile in values.items() if isinstance(tile, QuantizedArray)]
    self.guide = self.tiles.index(states[0]) if states else 0
    self.places: list[int | None] = []
    for k, tile in sorted(results.items()):
      count = len(jax.tree.leaves(tile))
      start = self.tiles.index(k) if k in values else None
      self.places += [None if start is None else start + i for i in range(count)]

  def run(self, *flat: jax.Array) -> list[jax.Array]:
    """The arrays of the results, from arrays like `(*arrays, *shared)`, or from their shards."""
    arrays, shared = flat[: len(self.arrays)], flat[len(self.arrays) :]
    tiles = {k: shard_of(tile) for k, tile in self._values.unflatten(arrays).items()}
    return jax.tree.leaves(self._fn(tiles, self._shared.unflatten(shared)))

  def results(self, flat: Sequence[jax.Array]) -> dict[int, Tile]:
    """The results that consist of these arrays."""
    return self._results.unflatten(flat)


def _with_shard_map(task: _Task, mesh: Any) -> list[jax.Array]:
  before = [jax.typeof(x).sharding.spec for x in task.arrays]
  spec, whole = divide(task.units, before[task.guide], mesh.shape), PartitionSpec()

  def lay_out(x, spec):
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))

  run = jax.shard_map(
    task.run,
    mesh=mesh,
    in_specs=(*[spec] * len(task.arrays), *[whole] * len(task.shared)),
    out_specs=spec,
    axis_names=explicit_names(mesh),
    check_vma=False,  # it would ask of every loop that its constants be marked as varying
  )
  new = run(*(lay_out(x, spec) for x in task.arrays), *(lay_out(x, whole) for x in task.shared))
  return [x if k is None else lay_out(x, before[k]) for x, k in zip(new, task.places, strict=True)]


def _with_custom_partitioning(task: _Task) -> list[jax.Array]:
  count = len(task.places)

  def infer(mesh, args, _):
    spec = divide(task.units, args[task.guide].sharding.spec, mesh.shape)
    return [NamedSharding(mesh, spec)] * count

  def partition(mesh, args, results):
    cut, whole = infer(mesh, args, results)[0], NamedSharding(mesh, PartitionSpec())
    asked = (*[cut] * len(task.arrays), *[whole] * len(task.shared))
    return mesh, task.run, [cut] * count, asked

  def rule(mesh, *_):
    # Named alike, the axes of one array take the sharding of another's. Not where state may lie
    # otherwise than gradients: then each is to stay as it is.
    cuts = zip(task.units, task.shape, strict=True)
    apart = any(units != n and units % mesh.size for units, n in cuts)

    def axes(tile):
      name = f"tile{task.tiles.index(tile)}" if apart else "axis"
      return " ".join(f"{name}_{axis}" for axis in range(len(task.shape)))

    arguments = [*map(axes, task.tiles), *("" for _ in task.shared)]
    results = [axes(task.tiles[0 if k is None else k]) for k in task.places]
    return f"{', '.join(arguments)} -> {', '.join(results)}"

  # The tables of a codebook are constants, which a `jit` may have and `custom_partitioning` not.
  partitioned = custom_partitioning(jax.jit(task.run))
  partitioned.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)

  # It can be neither batched nor differentiated. What it stands for can.
  @jax.custom_batching.custom_vmap
  def run(*flat):
    return partitioned(*flat)

  @run.def_vmap
  def _(size, batched, *flat):
    del size
    axes = [0 if b else None for b in batched]
    return jax.vmap(task.run, in_axes=axes)(*flat), [True] * count

  @jax.custom_jvp
  def differentiable(*flat):
    return run(*flat)

  def differentiable_jvp(primals, tangents):
    return derivative(task.run, primals, tangents)

  differentiable.defjvp(differentiable_jvp, symbolic_zeros=True)
  return differentiable(*task.arrays, *task.shared)
