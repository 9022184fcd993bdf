"""A function of pages and arrays, run by each device on its own part of them.

Pages are not laid out otherwise: as the first of them is cut, all are. A loop over rows of a
sharded array would gather it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_lowmem._host_memory.pages import Paged, as_page, without_page_axes

Flat = Sequence[Any]


def on_parts(
  fn: Callable[[list[Paged], list[Any], list[Any]], tuple[list[Paged], list[Any]]],
  pages: Sequence[Paged],
  arrays: Flat,
  scalars: Flat,
  stores: Sequence[int],
  shapes: Flat,
) -> tuple[list[Paged], list[Any]]:
  """`fn(pages, arrays, scalars)`, of the parts that a device has.

  Args:
    fn: returns new pages, and arrays.
    pages: arrays in host memory, at least one.
    arrays: arrays on the device, each axis of which is cut as that axis of the pages is.
    scalars: scalars, and what they are.
    stores: which of the pages are returned anew.
    shapes: of the arrays that are returned.
  """
  lanes, tree = jax.tree.flatten(list(pages))
  flat = [*lanes, *arrays, *scalars]
  padded = [True] * len(lanes) + [False] * len(arrays)
  out_lanes, out_tree = jax.tree.flatten([pages[k] for k in stores])
  out_padded = [True] * len(out_lanes) + [False] * len(shapes)

  def run(*flat):
    here = jax.tree.unflatten(tree, flat[: len(lanes)])
    rest = flat[len(lanes) :]
    new, made = fn(here, list(rest[: len(arrays)]), list(rest[len(arrays) :]))
    return [*jax.tree.leaves(new), *made]

  meshes = [jax.typeof(x).sharding.mesh for x in flat]
  explicit = [mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types]
  results = _with_shard_map(run, flat, padded, out_padded, explicit[0]) if explicit else run(*flat)
  count = len(out_lanes)
  return jax.tree.unflatten(out_tree, results[:count]), list(results[count:])


def lies_unknown(pages: Sequence[Paged]) -> bool:
  """Whether pages may be parts of arrays, of which only the compiler knows how they are cut.

  So it is on meshes of automatic axes. It could be asked (`custom_partitioning`), but of arguments
  in host memory XLA's GPU backend then aborts the process (jax 0.10.2).
  """
  lanes = [lane for page in pages for lane in page.lanes]
  kinds = {kind for x in lanes for kind in jax.typeof(x).sharding.mesh.axis_types}
  known = kinds & {AxisType.Explicit, AxisType.Manual}
  return jax.device_count() > 1 and not known and any(isinstance(x, Tracer) for x in lanes)


def _spec(spec: PartitionSpec, padded: bool) -> PartitionSpec:
  return as_page(spec) if padded else spec


def _with_shard_map(run: Any, flat: Flat, padded: Flat, out_padded: Flat, mesh: Any) -> Flat:
  spec = PartitionSpec(*without_page_axes(jax.typeof(flat[0]).sharding.spec))
  scalars = [PartitionSpec()] * (len(flat) - len(padded))
  kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
  specs = [_spec(spec, pad) for pad in padded] + scalars
  laid_out = [
    x if jax.typeof(x).sharding.spec == s else jax.sharding.reshard(x, NamedSharding(mesh, s))
    for x, s in zip(flat, specs, strict=True)
  ]
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=tuple(specs),
    out_specs=[_spec(spec, pad) for pad in out_padded],
    axis_names={name for name, kind in kinds if kind == AxisType.Explicit},
    check_vma=False,
  )(*laid_out)
