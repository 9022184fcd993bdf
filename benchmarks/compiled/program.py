"""Compiles a JAX function for a GPU or a TPU that this machine does not have.

XLA's compilers run without the device. Their answer is the program that would run: its buffers,
kernels, copies and transfers. Times it cannot tell. For CUDA, the plugins of jax's own version are
needed, and no driver:

    pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt \\
      nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt

for TPU, `jax[tpu]`. This is the one file that uses `jax._src`: jax compiles for an absent device
only from shapes (`topologies`), whose shardings cannot name pinned host memory. Programs with paged
state must be lowered on CPU arrays and given to the device's compiler by hand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src.lib import xla_client as xc  # pyright: ignore[reportPrivateImportUsage]

from optax_lowmem._plan.cards import CARDS, TPUS
from optax_lowmem._plan.compiler import OPTIONS, missing, topology

from .traffic import Traffic, traffic


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled program, and what it needs. On several devices: of each of them.

  Attributes:
    argument_bytes, output_bytes, alias_bytes, temp_bytes: device memory, as XLA counts it.
    host_argument_bytes, host_temp_bytes: host memory.
    trace_seconds, compile_seconds: time to trace and lower, and to compile.
    text: the optimized HLO, in the order of its schedule.
  """

  argument_bytes: int
  output_bytes: int
  alias_bytes: int
  temp_bytes: int
  host_argument_bytes: int
  host_temp_bytes: int
  trace_seconds: float
  compile_seconds: float
  text: str = dataclasses.field(repr=False)

  @property
  def device_bytes(self) -> int:
    """Device memory at the peak: arguments, results that reuse none of them, temporaries."""
    return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes

  @property
  def host_bytes(self) -> int:
    """Host memory at the peak."""
    return self.host_argument_bytes + self.host_temp_bytes

  @property
  def seconds(self) -> float:
    """Time to trace, lower and compile."""
    return self.trace_seconds + self.compile_seconds

  @functools.cached_property
  def traffic(self) -> Traffic:
    """What it launches and moves."""
    return traffic(self.text)

  @property
  def kernels(self) -> int:
    return self.traffic.kernels


def mesh_of(
  card: str, sizes: Sequence[int], names: Sequence[str], axis_type: jax.sharding.AxisType
) -> jax.sharding.Mesh:
  """A mesh of cards that are not here, for the shardings of `jax.ShapeDtypeStruct`s.

  They have no host memory: paged state is to be laid out on a mesh of CPU devices.
  """
  count = int(np.prod(sizes))
  devices = np.array(topology(card, count).devices[:count]).reshape(sizes)
  return jax.sharding.Mesh(devices, names, axis_types=(axis_type,) * len(names))


def compile_for(
  fn: Callable[..., Any],
  args: Sequence[Any],
  donate: Sequence[int] = (),
  card: str = "h100",
  count: int = 1,
) -> Compiled:
  """Compiles `fn(*args)`.

  Args:
    fn: a function that JAX can trace.
    args: arrays on CPU devices, or `jax.ShapeDtypeStruct` with their shardings. What rests in
      pinned host memory on them does so on the card.
    donate: positions of the arguments to donate.
    card: a name in `CARDS`, or a TPU's.
    count: devices; arguments are laid out over as many CPU devices
      (`XLA_FLAGS=--xla_force_host_platform_device_count=8`).

  Returns:
    The program.
  """
  if reason := missing(card):
    raise RuntimeError(f"To compile for {card!r}, install {reason}.")
  there, start = topology(card, count).devices[:count], time.perf_counter()
  platform = "tpu" if card in TPUS else "cuda"
  with _seen_by_kernels(card, args), warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Some donated buffers were not usable")
    lowered = (
      jax.jit(fn, donate_argnums=tuple(donate)).trace(*args).lower(lowering_platforms=(platform,))
    )
  middle = time.perf_counter()
  with _seen_by_kernels(card, args):  # shards under `custom_partitioning` are lowered now
    executable = there[0].client.compile(
      lowered.compiler_ir("stablehlo"),
      xc.DeviceList(tuple(there)),
      _options(count, {} if platform == "tpu" else OPTIONS),
    )
  end = time.perf_counter()
  stats = executable.get_compiled_memory_stats()
  return Compiled(
    argument_bytes=stats.argument_size_in_bytes,
    output_bytes=stats.output_size_in_bytes,
    alias_bytes=stats.alias_size_in_bytes,
    temp_bytes=stats.temp_size_in_bytes,
    host_argument_bytes=stats.host_argument_size_in_bytes,
    host_temp_bytes=stats.host_temp_size_in_bytes,
    trace_seconds=middle - start,
    compile_seconds=end - middle,
    text=executable.hlo_modules()[0].to_string(),
  )


@contextlib.contextmanager
def _seen_by_kernels(card: str, args: Any) -> Iterator[None]:
  """Pallas asks which device it lowers for (jax 0.11 and later): that of the mesh that is set."""
  if card in TPUS:
    device = jax.sharding.AbstractDevice(f"TPU {card}", 1, "tpu")
  else:
    device = jax.sharding.AbstractDevice(CARDS[card].name, CARDS[card].cores, "gpu")
  mesh = jax.sharding.get_abstract_mesh()
  shardings = (getattr(x, "sharding", None) for x in jax.tree.leaves(args))
  meshes = [mesh, *(s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding))]
  if any(jax.sharding.AxisType.Explicit in m.axis_types for m in meshes):
    yield  # the types of arrays name the mesh, and so the device: see `mesh_of`
    return
  shape, names, types = (1,), ("_",), (jax.sharding.AxisType.Auto,)
  if known := [m for m in meshes if not m.empty]:
    shape, names, types = known[0].axis_sizes, known[0].axis_names, known[0].axis_types
  mesh = jax.sharding.AbstractMesh(shape, names, axis_types=types, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    yield


def _options(count: int, flags: dict[str, Any]) -> Any:
  options = xc.CompileOptions()
  options.num_replicas, options.num_partitions = 1, count
  options.env_option_overrides = list(flags.items())
  build = options.executable_build_options
  build.num_replicas, build.num_partitions = 1, count
  if count > 1:
    build.use_spmd_partitioning = build.use_shardy_partitioner = True
  build.device_assignment = xc.DeviceAssignment.create(np.arange(count).reshape(1, count))
  return options
