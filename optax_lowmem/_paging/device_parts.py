"""A function of pages and arrays, run by each device on its own part of them.

As the first page is cut, all are, or as the first of those that cut no block. A loop over rows of a
sharded array would gather it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_lowmem._host_memory.pages import Paged, as_page, cuts, without_page_axes
from optax_lowmem._host_memory.placement import DEVICE, placement_of
from optax_lowmem._meshes.explicit_axes import explicit_mesh, explicit_names

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

  if (mesh := explicit_mesh(flat)) is not None:
    results = _with_shard_map(run, flat, padded, out_padded, out_lanes, mesh)
  else:
    results = run(*flat)
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


def _with_shard_map(
  run: Any, flat: Flat, padded: Flat, out_padded: Flat, out_lanes: Flat, mesh: Any
) -> Flat:
  spec = _common_spec(flat, padded, mesh)
  scalars = [PartitionSpec()] * (len(flat) - len(padded))
  specs = [_spec(spec, pad) for pad in padded] + scalars
  results = jax.shard_map(
    run,
    mesh=mesh,
    in_specs=tuple(specs),
    out_specs=[_spec(spec, pad) for pad in out_padded],
    axis_names=explicit_names(mesh),
    check_vma=False,
  )(*(_laid_out(x, s, mesh) for x, s in zip(flat, specs, strict=True)))
  old = [jax.typeof(x).sharding.spec for x in out_lanes]
  pages = [_laid_out(x, s, mesh) for x, s in zip(results[: len(old)], old, strict=True)]
  return [*pages, *results[len(old) :]]


def _common_spec(flat: Flat, padded: Flat, mesh: Any) -> PartitionSpec:
  """How the first page lies of whose layout each device has an even part of all.

  A page of masters may be cut within the blocks of moments, which therefore lie otherwise. Blocks
  fill the axis that they lie along (`Rows`), so an even part of their scales is of whole blocks.
  """
  pages, arrays = flat[: sum(padded)], flat[sum(padded) : len(padded)]
  shapes = [without_page_axes(x.shape) for x in pages] + [x.shape for x in arrays]

  def is_even(spec):
    return all(
      n % cut == 0 for shape in shapes for n, cut in zip(shape, cuts(spec, mesh), strict=False)
    )

  specs = (PartitionSpec(*without_page_axes(jax.typeof(x).sharding.spec)) for x in pages)
  return next(filter(is_even, specs), PartitionSpec())


def _laid_out(x: Any, spec: PartitionSpec, mesh: Any) -> Any:
  """`x`, lying so, in the memory where it is."""
  if jax.typeof(x).sharding.spec == spec:
    return x
  here = placement_of(x)
  return here.put(jax.sharding.reshard(DEVICE.put(x), NamedSharding(mesh, spec)))
