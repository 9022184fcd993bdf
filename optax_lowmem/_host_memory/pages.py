"""An array that is stored in host memory, and the way there and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from optax_lowmem._host_memory.placement import DEVICE, PINNED_HOST, Placement, placement_of
from optax_lowmem._meshes.explicit_axes import explicit_names, is_explicit

# Where no shardings are named, JAX pairs a donated argument with the first result of its shape and
# dtype, in whatever memory: a donated moment with the new parameter, upon which the runtime aborts
# the process (jax 0.10 to 0.12). Pages therefore have a shape that nothing else has: two leading
# axes are too few, for a dense layer's page is then shaped as a 1x1 convolution's kernel is.
_AXES = 6
# An axis is dealt out to two lanes if its length is a multiple of this: then each of up to 64
# devices that hold a part of it can do so by itself.
_EVEN = 128
# Rows are dealt out as wholes, so a row is the least that can be fetched.
_ROW = 1 << 18


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Paged:
  """An array that is stored in host memory, in one array or in two, its lanes.

  With two lanes, one can be fetched while what was made of the other is stored: XLA's GPU backend
  copies a whole array on the host if two parts of it are under way at once.

  Invariants: lane `i` of n holds the indices `i::n` along `axis`, and its shape is that with six
  axes of 1 before it, so that JAX never gives the memory of a donated page to a parameter or an
  update. If it is `last_first`, there is one lane, which holds the first axis in reverse. It has
  seven such axes: a checkpoint knows the order by them.

  Attributes:
    lanes: arrays of one shape and dtype.
    axis: the axis that is dealt out to the lanes.
    last_first: whether it is of stacked layers, the last of which comes first, as in
      `update_in_backward`.
  """

  lanes: tuple[Any, ...]
  axis: int = dataclasses.field(default=0, metadata={"static": True})
  last_first: bool = dataclasses.field(default=False, metadata={"static": True})

  def __post_init__(self):
    if isinstance(self.lanes, tuple):  # JAX and others put placeholders there
      object.__setattr__(self, "lanes", tuple(map(_truly_typed, self.lanes)))

  @property
  def shape(self) -> tuple[int, ...]:
    shape = list(self.lanes[0].shape[_AXES + self.last_first :])
    shape[self.axis] *= len(self.lanes)
    return tuple(shape)

  @property
  def dtype(self) -> Any:
    return self.lanes[0].dtype

  def __repr__(self) -> str:
    lanes = self.lanes if isinstance(self.lanes, tuple) else ()
    ranks = [len(lane.shape) if hasattr(lane, "dtype") else 0 for lane in lanes]
    if min(ranks, default=0) <= _AXES + self.axis:  # a tree of something else, such as shardings
      return f"Paged(lanes={self.lanes}, axis={self.axis})"
    order = ", last first" if self.last_first else ""
    return f"Paged({self.dtype}[{','.join(map(str, self.shape))}], lanes={len(lanes)}{order})"


def is_paged(x: Any) -> bool:
  return isinstance(x, Paged)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ToPage:
  """An array of a new state of one layer that is to be stored in host memory with the others."""

  array: Any


def is_to_page(x: Any) -> bool:
  return isinstance(x, ToPage)


def _truly_typed(lane: Any) -> Any:
  """`lane`, its type naming the memory that it is in: while tracing, only types are known.

  There are those whose types do not: arrays that `out_shardings` of one device placed, and shapes
  with such a sharding (jax 0.10 to 0.12); what Orbax restored to host memory (0.11).
  """
  if isinstance(lane, jax.ShapeDtypeStruct):
    sharding = lane.sharding
    if not isinstance(sharding, SingleDeviceSharding) or not PINNED_HOST.is_of(sharding):
      return lane
    return jax.ShapeDtypeStruct(lane.shape, lane.dtype, sharding=host_of(*sharding.device_set))
  if not isinstance(lane, jax.Array) or isinstance(lane, Tracer):
    return lane
  if PINNED_HOST.holds(lane) == PINNED_HOST.is_of(lane.sharding) or lane.is_deleted():
    return lane
  parts = [shard.data for shard in lane.addressable_shards]
  return jax.make_array_from_single_device_arrays(lane.shape, lane.sharding, parts)


def host_of(device: Any) -> NamedSharding:
  """The host memory of a device, in words that the types of shapes repeat."""
  mesh = jax.make_mesh((1,), ("device",), axis_types=(AxisType.Auto,), devices=[device])
  return NamedSharding(mesh, PartitionSpec(), memory_kind=PINNED_HOST.kind)


def without_page_axes(shape: Any) -> tuple[Any, ...]:
  """The shape of what a lane of that shape holds, or how it lies."""
  return tuple(shape)[_AXES:]


def as_page(spec: PartitionSpec) -> PartitionSpec:
  """How a lane lies whose array lies so."""
  return PartitionSpec(*(None,) * _AXES, *spec)


def lane_axis(shape: tuple[int, ...], blocks: int = 0) -> int | None:
  """The axis by which an array is dealt out to two lanes; None if it is to have one.

  Args:
    shape: of the array.
    blocks: along how many of its last axes the blocks of a quantized array lie.
  """
  for axis in reversed(range(min(len(shape) - 1, len(shape) - blocks))):
    if shape[axis] % _EVEN == 0 and math.prod(shape[axis + 1 :]) <= _ROW:
      return axis
  return None


def store(x: jax.Array, axis: int | None = None, placement: Placement = PINNED_HOST) -> Paged:
  """`x`, moved to host memory with its sharding, along `axis` in two lanes."""
  if axis is not None and not _divides(x, axis):
    axis = None
  lanes = [x.reshape((1,) * _AXES + x.shape)] if axis is None else split(x, axis)
  return Paged(tuple(map(placement.put, lanes)), axis or 0)


def store_stack(x: jax.Array, placement: Placement = PINNED_HOST) -> Paged:
  """`x`, arrays of stacked layers, moved to host memory with its sharding, the last layer first."""
  page = store(jax.lax.expand_dims(jax.lax.rev(x, (0,)), (0,)), None, placement)
  return dataclasses.replace(page, last_first=True)


def store_as(x: jax.Array, page: Paged) -> Paged:
  """`x` in a page's place."""
  first, *others = page.lanes
  if page.last_first:
    return store_stack(x, placement_of(first))
  return store(x, page.axis if others else None, placement_of(first))


def known_on_host(lane: Any) -> Any:
  """A lane, of which JAX is told where it is: shapes in `jax.eval_shape` may not know."""
  return PINNED_HOST.put(lane) if DEVICE.holds(lane) else lane


def as_typed(page: Paged, like: Paged) -> Paged:
  """A page, in the memories that the types of `like` name."""
  pairs = zip(page.lanes, like.lanes, strict=True)
  return dataclasses.replace(page, lanes=tuple(placement_of(y).put(x) for x, y in pairs))


def fetch(paged: Paged) -> jax.Array:
  """The array, on the device."""
  x = joined([*map(DEVICE.put, paged.lanes)], paged.axis)
  return jax.lax.rev(jax.lax.squeeze(x, (0,)), (0,)) if paged.last_first else x


def split(x: jax.Array, axis: int) -> tuple[jax.Array, ...]:
  """`x` in two lanes on the device."""

  def local(x):
    shape = x.shape
    pairs = x.reshape(*shape[:axis], shape[axis] // 2, 2, *shape[axis + 1 :])
    lane = (1,) * _AXES + shape[:axis] + (shape[axis] // 2,) + shape[axis + 1 :]
    at = (slice(None),) * (axis + 1)
    return tuple(pairs[(*at, k)].reshape(lane) for k in range(2))

  mesh, spec = _explicit(x)
  return _by_shards(local, mesh, (spec,), as_page(spec))(x)


def joined(lanes: list[jax.Array], axis: int) -> jax.Array:
  """The array of these lanes on the device."""

  def local(*lanes):
    parts = [lane.reshape(lane.shape[_AXES:]) for lane in lanes]
    if len(parts) == 1:
      return parts[0]
    shape = list(parts[0].shape)
    shape[axis] *= 2
    return jax.numpy.stack(parts, axis + 1).reshape(shape)

  mesh, spec = _explicit(lanes[0])
  return _by_shards(local, mesh, (spec,) * len(lanes), PartitionSpec(*without_page_axes(spec)))(
    *lanes
  )


def _explicit(x: Any) -> tuple[Any, PartitionSpec]:
  """The mesh of explicit axes that `x` lies on, if any, and how."""
  sharding = jax.typeof(x).sharding
  return (sharding.mesh if is_explicit(sharding.mesh) else None), sharding.spec


def _by_shards(local: Callable[..., Any], mesh: Any, before: Any, after: Any) -> Callable[..., Any]:
  """Under explicit axes, a reshape that takes a sharded axis apart is each device's own."""
  if mesh is None:
    return local
  names = explicit_names(mesh)
  return jax.jit(
    jax.shard_map(
      local, mesh=mesh, in_specs=before, out_specs=after, axis_names=names, check_vma=False
    )
  )


def _divides(x: Any, axis: int) -> bool:
  """Whether each device's part of `axis` is even, as far as it is known how `x` lies."""
  return part_of(x)[axis] % 2 == 0


def part_of(x: jax.Array) -> tuple[int, ...]:
  """The shape of the part of `x` that one device has, as far as it is known how `x` lies."""
  if not isinstance(x, Tracer):
    return x.sharding.shard_shape(x.shape)
  # Not asked of the sharding, which refuses within `jax.shard_map`: there `x` is a part already.
  sharding = jax.typeof(x).sharding
  parts = cuts(sharding.spec, sharding.mesh)
  return tuple(n // cut for n, cut in zip(x.shape, parts, strict=True))


def cuts(spec: PartitionSpec, mesh: Any) -> list[int]:
  """Into how many parts each axis is cut."""
  names = [(n,) if isinstance(n, str) else n or () for n in spec]
  return [math.prod(mesh.shape[name] for name in axis) for axis in names]


def nbytes(x: Any) -> int:
  return math.prod(x.shape) * x.dtype.itemsize  # which random keys have too
