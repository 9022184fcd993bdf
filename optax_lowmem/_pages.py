"""What rests in host memory: pages, and the way between a state and its pages."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

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
@dataclasses.dataclass(frozen=True)
class Paged:
  """An array that rests in host memory, in one array or in two, its lanes.

  With two lanes, one can be fetched while what was made of the other is stored: XLA's GPU backend
  copies a whole array on the host if two parts of it are under way at once.

  Invariants: lane `i` of n holds the indices `i::n` along `axis`, and its shape is that with six
  axes of 1 before it, so that JAX never gives the memory of a donated page to a parameter or an
  update.

  Attributes:
    lanes: arrays of one shape and dtype.
    axis: the axis that is dealt out to the lanes.
  """

  lanes: tuple[Any, ...]
  axis: int = dataclasses.field(default=0, metadata={"static": True})

  def __post_init__(self):
    if isinstance(self.lanes, tuple):  # JAX and others put placeholders there
      object.__setattr__(self, "lanes", tuple(map(_truly_typed, self.lanes)))

  @property
  def shape(self) -> tuple[int, ...]:
    shape = list(self.lanes[0].shape[_AXES:])
    shape[self.axis] *= len(self.lanes)
    return tuple(shape)

  @property
  def dtype(self) -> Any:
    return self.lanes[0].dtype


def is_paged(x: Any) -> bool:
  return isinstance(x, Paged)


def _truly_typed(lane: Any) -> Any:
  """`lane`, its type naming the memory that it is in: while tracing, only types are known.

  There are those whose types do not: arrays that `out_shardings` of one device placed, and shapes
  with such a sharding (jax 0.10 to 0.12); what Orbax restored to host memory (0.11).
  """
  if isinstance(lane, jax.ShapeDtypeStruct):
    sharding = lane.sharding
    if not isinstance(sharding, SingleDeviceSharding) or sharding.memory_kind != "pinned_host":
      return lane
    return jax.ShapeDtypeStruct(lane.shape, lane.dtype, sharding=_host_of(*sharding.device_set))
  if not isinstance(lane, jax.Array) or isinstance(lane, Tracer):
    return lane
  if on_host(lane) == (lane.sharding.memory_kind == "pinned_host") or lane.is_deleted():
    return lane
  parts = [shard.data for shard in lane.addressable_shards]
  return jax.make_array_from_single_device_arrays(lane.shape, lane.sharding, parts)


def _host_of(device: Any) -> NamedSharding:
  """The host memory of a device, in words that the types of shapes repeat."""
  mesh = jax.make_mesh((1,), ("device",), axis_types=(AxisType.Auto,), devices=[device])
  return NamedSharding(mesh, PartitionSpec(), memory_kind="pinned_host")


def on_host(lane: Any) -> bool:
  """Whether a lane is in host memory, by its type: all that is known while tracing."""
  return jax.typeof(lane).memory_space == jax.memory.Space.Host


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


def store(x: jax.Array, axis: int | None = None) -> Paged:
  """`x`, moved to host memory with its sharding, along `axis` in two lanes."""
  if axis is not None and not _divides(x, axis):
    axis = None
  lanes = (x.reshape((1,) * _AXES + x.shape),) if axis is None else split(x, axis)
  lanes = tuple(jax.device_put(lane, jax.memory.Space.Host) for lane in lanes)
  return Paged(lanes, axis or 0)


def known_on_host(lane: Any) -> Any:
  """A lane, of which JAX is told where it is: shapes in `jax.eval_shape` may not know."""
  return lane if on_host(lane) else jax.device_put(lane, jax.memory.Space.Host)


def as_typed(page: Paged, like: Paged) -> Paged:
  """A page, in the memories that the types of `like` name."""
  pairs = zip(page.lanes, like.lanes, strict=True)
  lanes = [jax.device_put(x, jax.typeof(y).memory_space) for x, y in pairs]
  return Paged(tuple(lanes), page.axis)


def fetch(paged: Paged) -> jax.Array:
  """The array, on the device."""
  lanes = [jax.device_put(lane, jax.memory.Space.Device) for lane in paged.lanes]
  return joined(lanes, paged.axis)


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
  explicit = AxisType.Explicit in sharding.mesh.axis_types
  return (sharding.mesh if explicit else None), sharding.spec


def _by_shards(local: Callable[..., Any], mesh: Any, before: Any, after: Any) -> Callable[..., Any]:
  """Under explicit axes, a reshape that takes a sharded axis apart is each device's own."""
  if mesh is None:
    return local
  names = {
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Explicit
  }
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
  mesh, spec = jax.typeof(x).sharding.mesh, jax.typeof(x).sharding.spec
  names = [(n,) if isinstance(n, str) else n or () for n in spec]
  cuts = [math.prod(mesh.shape[name] for name in axis) for axis in names]
  return tuple(n // cut for n, cut in zip(x.shape, cuts, strict=True))


def nbytes(x: Any) -> int:
  return math.prod(x.shape) * x.dtype.itemsize  # which random keys have too


def unpaged(state: Any) -> Any:
  """The state as the transformation within `offloaded` has it: no `Paged`, all on the device.

  Abstract pages (`jax.ShapeDtypeStruct`) become abstract arrays in the same memory: a template by
  which a checkpoint of a run without `offloaded` can be restored straight into host memory.

  Args:
    state: a state of `offloaded`, or any tree that holds one.

  Returns:
    The same tree with arrays in the place of `Paged`.

  Examples:
    >>> import jax.numpy as jnp, optax_lowmem as lowmem
    >>> state = lowmem.offloaded(lowmem.adam(1e-3)).init(jnp.zeros((64, 64)))
    >>> lowmem.unpaged(state)[0].mu.codes.shape
    (64, 64)
  """

  def one(x):
    if not is_paged(x):
      return x
    if not isinstance(x.lanes[0], jax.ShapeDtypeStruct):
      return fetch(x)
    sharding = x.lanes[0].sharding
    if isinstance(sharding, NamedSharding):
      spec = PartitionSpec(*tuple(sharding.spec)[_AXES:])
      sharding = sharding.update(spec=spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(one, state, is_leaf=is_paged)


def paged(state: Any, like: Any = None) -> Any:
  """Puts a state into host memory: one that was there, or, by `like`, one that never was.

  Pages lose their place in host memory by `out_shardings` that do not name it, by pickle and most
  checkpoint libraries, by `jax.device_put`. `update` refuses them then, and ``paged(state)`` puts
  them back, each with its sharding. Call it outside of `jax.jit`: from a page that is on the device
  and donated, JAX would make one on the host, and abort.

  With `like`, it is the reverse of `unpaged`: a state of the inner transformation, paged as `like`
  is.

  Args:
    state: a state of `offloaded`, its pages anywhere, numpy's arrays among them; with `like`, also
      the state of a run without `offloaded`. Of shapes (`jax.ShapeDtypeStruct`) without `like`, the
      shardings name host memory.
    like: a state of `offloaded` of the same run, from `init`.

  Returns:
    The state, its pages in host memory; with the structure, shapes, shardings and memories of
    `like`, if that is given.

  Raises:
    ValueError: if an array has another shape or dtype than that in `like`; without `like`, if there
      are no pages; within `jax.jit`, if a page is on the device.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_lowmem as lowmem
    >>> params = jnp.zeros((64, 64))
    >>> tx = lowmem.adam(1e-3)
    >>> like = lowmem.offloaded(tx).init(params)
    >>> state = lowmem.paged(tx.init(params), like)
    >>> lowmem.state_bytes(state)["pinned_host"]
    8192
    >>> moved = jax.device_put(state, jax.memory.Space.Device)
    >>> lowmem.state_bytes(moved)["pinned_host"]
    0
    >>> lowmem.state_bytes(lowmem.paged(moved))["pinned_host"]
    8192
  """
  if like is None:
    return _put_back(state)

  def one(x, target):
    if x.shape != target.shape or x.dtype != target.dtype:
      raise ValueError(
        f"`state` holds {x.dtype}{list(x.shape)} where `like` has "
        f"{target.dtype}{list(target.shape)}. Both must be of the same parameters and optimizer."
      )
    if not is_paged(target):
      return jax.device_put(x, target.sharding) if isinstance(target, jax.Array) else x
    if is_paged(x) and (len(x.lanes), x.axis) == (len(target.lanes), target.axis):
      lanes = x.lanes
    else:
      lanes = _lanes(fetch(x) if is_paged(x) else x, target)
    pairs = zip(lanes, target.lanes, strict=True)
    lanes = [jax.device_put(lane, like.sharding) for lane, like in pairs]
    return Paged(tuple(jax.device_put(lane, jax.memory.Space.Host) for lane in lanes), target.axis)

  leaves, treedef = jax.tree.flatten(like, is_leaf=is_paged)
  given = jax.tree.leaves(state, is_leaf=is_paged)
  if len(given) != len(leaves):
    raise ValueError(
      f"`state` has {len(given)} arrays and `like` {len(leaves)}. Both must be of the same "
      "parameters and optimizer."
    )
  return treedef.unflatten(map(one, given, leaves))


def _put_back(state: Any) -> Any:
  """`state`, its pages in host memory, wherever they are."""
  if not any(map(is_paged, jax.tree.leaves(state, is_leaf=is_paged))):
    raise ValueError(
      "`state` has no pages. Pass `like=tx.init(params)`, which says what is to be paged, with the "
      "`offloaded` transformation `tx`."
    )

  def put(lane):
    if isinstance(lane, jax.ShapeDtypeStruct):
      where = lane.sharding or _host_of(jax.local_devices()[0])
      where = where.with_memory_kind("pinned_host")
      return jax.ShapeDtypeStruct(lane.shape, lane.dtype, sharding=where)
    if isinstance(lane, Tracer) and not on_host(lane):
      raise ValueError(
        "`paged` has met a page on the device within `jax.jit`: donated, it would abort the "
        "process. Call `paged` before."
      )
    return jax.device_put(lane, jax.memory.Space.Host)

  def one(x):
    return Paged(tuple(map(put, x.lanes)), x.axis) if is_paged(x) else x

  return jax.tree.map(one, state, is_leaf=is_paged)


def _lanes(x: Any, target: Paged) -> list[Any]:
  """The lanes of an array of any memory, numpy's too, where they can be made."""
  count, shape = len(target.lanes), target.lanes[0].shape
  if isinstance(x, jax.Array):
    x = jax.device_put(x, jax.memory.Space.Device)  # XLA reshapes nothing on the host
    return list(split(x, target.axis)) if count > 1 else [x.reshape(shape)]
  at = (slice(None),) * target.axis
  return [x[(*at, slice(k, None, count))].reshape(shape) for k in range(count)]
