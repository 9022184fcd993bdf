"""All local devices: each takes some rows of a batch, and holds the whole model or a part of it.

The numbers are those of one device, up to rounding: JAX partitions the program, and adds up what
the devices found.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from optax_lowmem.qlora.data.batches import Batch

T = TypeVar("T")
Devices = Mesh | AbstractMesh | None  # None for one


def devices_in_a_row(count: int, batch_size: int) -> Mesh | None:
  """The devices to train on, `count` of them or all; None for a single one.

  Raises:
    ValueError: where there are fewer, or the rows of a batch cannot be dealt out evenly.
  """
  there = jax.local_devices()
  if count > len(there):
    raise ValueError(f"--devices {count}: there are only {len(there)} here.")
  count = count or len(there)
  if batch_size % count:
    raise ValueError(
      f"--batch-size {batch_size} is not a multiple of the {count} devices, over which its rows "
      f"are spread. Choose another one, or fewer --devices."
    )
  if count == 1:
    return None
  return Mesh(np.array(there[:count]), ("data",), axis_types=(AxisType.Auto,))


@contextmanager
def in_host_memory() -> Iterator[None]:
  """Makes new arrays on the CPU, for a model that no one device could hold.

  Raises:
    ValueError: where JAX was told to do without its CPU backend.
  """
  try:
    cpu = jax.local_devices(backend="cpu")[0]
  except RuntimeError as error:
    raise ValueError(
      "--fsdp reads the model into host memory first, for which JAX needs its CPU backend too. "
      "Unset JAX_PLATFORMS, or add ,cpu to it."
    ) from error
  with jax.default_device(cpu):
    yield


def everywhere(tree: T, mesh: Mesh | None) -> T:
  """A copy of each array on every device, in the kind of memory in which it is.

  What lies on the mesh already stays as it is.
  """

  if mesh is None:
    # Fixed to the device it is on, as the results of a step are: to `jax.jit` an array that may
    # still move is another argument, and held-out loss and samples would be compiled twice.
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding), tree)

  def put(x: jax.Array) -> jax.Array:
    if isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh:
      return x
    (default,) = {device.default_memory().kind for device in x.sharding.device_set}
    kind = x.sharding.memory_kind
    kind = None if kind == default else kind  # a CPU calls its own memory otherwise than a GPU
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(), memory_kind=kind))

  return jax.tree.map(put, tree)


def in_parts(tree: T, mesh: Mesh | None) -> T:
  """A part of each array on every device (as in FSDP), for a model too large for one of them.

  Layers are stacked along their first axis and are used one after another, so that one is never
  cut. Of the others, the first is that divides evenly; where none does, the array is copied.
  """

  if mesh is None:
    return tree

  def put(path: Any, x: jax.Array) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh, part_of(path, x.shape, mesh.size)))

  return jax.tree_util.tree_map_with_path(put, tree)


def part_of(path: Any, shape: tuple[int, ...], count: int) -> PartitionSpec:
  """How `in_parts` cuts an array of that path and shape for so many devices."""
  first = 1 if "['layers']" in jax.tree_util.keystr(path) else 0
  even = [axis for axis in range(first, len(shape)) if shape[axis] % count == 0]
  return PartitionSpec(*[None] * even[0], "data") if even else PartitionSpec()


class Spread(NamedTuple):
  """How a step is spread over devices.

  Attributes:
    mesh: the devices; None for one.
    base_in_parts: whether they hold parts of what is frozen.
    trained_in_parts: whether they hold parts of what is trained.
  """

  mesh: Devices = None
  base_in_parts: bool = False
  trained_in_parts: bool = False

  @property
  def shards(self) -> int:
    """The number of devices."""
    return 1 if self.mesh is None else self.mesh.size

  def laid(self, tree: T, *, of_one_layer: bool = False) -> T:
    """Gradients, or what they are taken by, laid as what is trained.

    Where weights are in parts, the compiler may cut gradients by heads, four ways on eight devices.
    The update, which is cut as the state is, cannot be told of that.

    Args:
      tree: as what is trained, or as a part of it.
      of_one_layer: whether arrays of layers lack the axis over layers.
    """
    if self.mesh is None or not (self.base_in_parts or self.trained_in_parts):
      return tree
    mesh = self.mesh if isinstance(self.mesh, AbstractMesh) else self.mesh.abstract_mesh
    lead = (1,) * of_one_layer

    def lay(path: Any, x: jax.Array) -> jax.Array:
      spec = part_of(path, (*lead, *x.shape), mesh.size)[len(lead) :]
      spec = PartitionSpec(*spec) if self.trained_in_parts else PartitionSpec()
      return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(lay, tree)


ALONE = Spread()


def laid_on(mesh: Mesh | None, shapes: T) -> T:
  """Shapes that lie on an abstract mesh, on these devices; shapes as they are, where it is one."""
  if mesh is None:
    return shapes

  def lay(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    spec = x.sharding.spec if isinstance(x.sharding, NamedSharding) else PartitionSpec()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree.map(lay, shapes)


def dealt(batch: Batch, mesh: Mesh | None) -> Batch:
  """Some rows of the batch on every device."""
  if mesh is None:
    return batch
  parts = batch.inputs.ndim - 2  # a leading axis, in training
  rows = NamedSharding(mesh, PartitionSpec(*[None] * parts, "data"))
  return jax.tree.map(lambda x: jax.device_put(x, rows), batch)
