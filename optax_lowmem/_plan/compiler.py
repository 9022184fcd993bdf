"""Compiles a function for a GPU or a TPU that this machine does not have; nothing is run.

XLA's compilers run without the device, and their answer is the program that would run. JAX compiles
for an absent device from shapes that lie on it (`jax.experimental.topologies`). Its devices list no
memories, so a sharding on them cannot name pinned host memory. A sharding on their abstract mesh
can, beside others on the mesh itself: that is how pages are laid out here, with public API alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from optax_lowmem._host_memory.pages import host_of, is_paged
from optax_lowmem._meshes.explicit_axes import is_explicit
from optax_lowmem._plan.cards import CARDS, TPUS, card_named
from optax_lowmem.kernels import using

# There is nothing to time kernels on, and Triton's matrix products are found by timing.
OPTIONS: dict[str, bool | str] = {
  "xla_gpu_autotune_level": "0",
  "xla_gpu_enable_triton_gemm": False,
}


@dataclasses.dataclass(frozen=True)
class Program:
  """What a compiled program needs; on several devices, each of them.

  Attributes:
    compiler: whose it is: a card's name, or "cpu".
    argument_bytes, output_bytes, alias_bytes, temp_bytes: device memory, as XLA counts it.
    host_bytes: pinned host memory at the peak.
    seconds: time to trace, lower and compile.
    note: what is to be known beside the numbers.
  """

  compiler: str
  argument_bytes: int
  output_bytes: int
  alias_bytes: int
  temp_bytes: int
  host_bytes: int
  seconds: float
  note: str = ""

  @property
  def device_bytes(self) -> int:
    """Device memory at the peak: arguments, results that reuse none of them, temporaries."""
    return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes


@functools.cache
def missing(card: str = "h100") -> str | None:
  """What is needed to compile for `card` and is not installed; None if nothing is."""
  if card_named(card).name in TPUS:
    return None if importlib.util.find_spec("libtpu") else "libtpu (`pip install 'jax[tpu]'`)"
  for name in ("jax_cuda13_plugin", "jax_plugins.xla_cuda13"):
    with contextlib.suppress(ModuleNotFoundError):
      if importlib.util.find_spec(name):
        break
  else:
    return "the CUDA compiler of jax (`pip install 'optax_lowmem[plan]'`)"
  try:
    topology(card, 1)
  except Exception as error:  # a plugin of another version, say
    return f"a CUDA compiler that works ({' '.join(str(error).split())[:200]})"
  return None


@functools.cache
def topology(card: str, count: int) -> Any:
  """What JAX compiles for: `count` cards that are not here; of TPUs, at least so many.

  Raises:
    ValueError: for a number of TPUs that no slice known here has.
  """
  # The plugin asks for a driver; libtpu lets one process use a TPU, and here there is none.
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  from jax.experimental import topologies

  known = card_named(card)
  if known.name in TPUS:
    slices = {1: "2x2", 2: "2x2", 4: "2x2", 8: "2x4"}
    if count not in slices:
      known_counts = ", ".join(map(str, slices))
      raise ValueError(
        f"`mesh` has {count} devices, and for {known.name} plans are made for {known_counts} of "
        "them. Take one of these, or a GPU as `card`."
      )
    name = f"{known.name}:{slices[count]}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name)
  return topologies.get_topology_desc(
    platform="cuda", target_config=known.target_config(), topology=f"1x1x{count}"
  )


def mesh_of(card: str, like: AbstractMesh | Mesh | None = None) -> Mesh:
  """A mesh of cards that are not here: one of them, or with the axes of `like`."""
  sizes = (1,) if like is None else like.axis_sizes
  names = ("device",) if like is None else like.axis_names
  types = (AxisType.Auto,) if like is None else like.axis_types
  count = int(np.prod(sizes))
  devices = topology(card, count).devices[:count]
  return Mesh(np.array(devices).reshape(sizes), names, axis_types=types)


def compile_for(
  fn: Callable[..., Any],
  args: Sequence[Any],
  donate: Sequence[int] = (),
  *,
  card: str,
  mesh: AbstractMesh | Mesh | None = None,
  results: Any = None,
) -> Program:
  """Compiles `fn(*args)`; where the card's compiler is not installed, by that of the CPU.

  Args:
    fn: a function that JAX can trace.
    args: arrays, or `jax.ShapeDtypeStruct`s. On a mesh they lie as their shardings say, and whole
      on every card where they have none. Pages rest in pinned host memory.
    donate: positions of the arguments to donate.
    card: a name in `CARDS` or `TPUS`.
    mesh: sizes and names of the cards' axes; None for one card.
    results: on a mesh, shapes that lie as the results are to; None where XLA is to choose.

  Raises:
    ValueError: for an unknown card, for several of them where its compiler is not installed, and
      for pages on a TPU, at which libtpu 0.0.52 aborts the process.
  """
  known = card_named(card)
  if known.name in TPUS and any(map(is_paged, jax.tree.leaves(tuple(args), is_leaf=is_paged))):
    raise ValueError(
      f"What is in host memory cannot be compiled for {known.name}: the compiler for TPUs aborts. "
      "Plan without `card`, or for a GPU."
    )
  if why := missing(card):
    if mesh is not None and mesh.size > 1:
      raise ValueError(f"To plan for {mesh.size} cards, install {why}.")
    cpu = jax.local_devices(backend="cpu")[0]
    here = jax.tree.map(functools.partial(_bare, cpu), tuple(args), is_leaf=is_paged)
    with jax.default_device(cpu):
      return _measured("cpu", jax.jit(fn, donate_argnums=tuple(donate)), here, None)
  on = mesh_of(card, mesh)
  laid = jax.tree.map(functools.partial(_laid, on), tuple(args), is_leaf=is_paged)
  out = None
  if results is not None and on.size > 1:
    out = jax.tree.map(functools.partial(_laid, on), results, is_leaf=is_paged)
    out = jax.tree.map(lambda x: x.sharding, out)
  jitted = jax.jit(fn, donate_argnums=tuple(donate), out_shardings=out)
  platform = "tpu" if known.name in TPUS else "cuda"
  with contextlib.ExitStack() as stack:
    if is_explicit(on):
      stack.enter_context(jax.set_mesh(on))
    if known.name in CARDS and CARDS[known.name].capability < (8, 0):
      stack.enter_context(using("xla"))  # Triton is for Ampere and later
    if not is_explicit(on):  # Pallas asks for its device (jax 0.11 and later)
      stack.enter_context(jax.sharding.use_abstract_mesh(on.abstract_mesh))
    try:
      return _measured(known.name, jitted, laid, platform)
    except RuntimeError as error:
      if "No supported GPU devices" not in str(error):
        raise
    # Pallas of jax 0.12 lowers for cards that it knows by name. On others the kernel is switched
    # off at its first use, so that the step is planned as it would run.
    stack.enter_context(using("xla"))
    again = jax.jit(functools.partial(fn), donate_argnums=tuple(donate), out_shardings=out)
    note = f"Without the kernel: Pallas of jax {jax.__version__} does not know {known.name}."
    return dataclasses.replace(_measured(known.name, again, laid, platform), note=note)


def _measured(compiler: str, jitted: Any, args: tuple[Any, ...], platform: str | None) -> Program:
  begun = time.perf_counter()
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Some donated buffers were not usable")
    # What was compiled for an absent card cannot be loaded from JAX's cache, and is compiled again.
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
    traced = jitted.trace(*args)
    lowered = traced.lower(lowering_platforms=(platform,)) if platform else traced.lower()
    options = OPTIONS if platform == "cuda" else None
    stats: Any = lowered.compile(compiler_options=options).memory_analysis()
  return Program(
    compiler,
    argument_bytes=stats.argument_size_in_bytes,
    output_bytes=stats.output_size_in_bytes,
    alias_bytes=stats.alias_size_in_bytes,
    temp_bytes=stats.temp_size_in_bytes,
    host_bytes=stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes,
    seconds=time.perf_counter() - begun,
  )


def _bare(device: Any, x: Any) -> Any:
  """The shape of an array alone, or of a page in the host memory of a device."""
  if is_paged(x):
    where = host_of(device)
    return jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=where), x)
  return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x


def _laid(mesh: Mesh, x: Any, host: bool = False) -> Any:
  """The shape of an array, or of a page's arrays, on a mesh of cards."""
  if is_paged(x):
    return jax.tree.map(functools.partial(_laid, mesh, host=True), x)
  if not hasattr(x, "dtype"):
    return x
  sharding = getattr(x, "sharding", None)
  spec = sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
  if not {*jax.tree.leaves(tuple(spec))} <= {*mesh.axis_names}:
    spec = PartitionSpec()
  host = host or getattr(sharding, "memory_kind", None) == "pinned_host"
  there: Any = NamedSharding(mesh, spec)
  if host:
    there = NamedSharding(mesh.abstract_mesh, spec, memory_kind="pinned_host")
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)
