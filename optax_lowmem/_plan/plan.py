"""`plan`: what a training run will hold in memory."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from optax_lowmem._arguments.checks import check_transformation
from optax_lowmem._plan.compiler import compile_for
from optax_lowmem._plan.memory_plan import MemoryPlan, Part
from optax_lowmem._plan.parts import device_and_host, of_gradients, of_state, of_weights
from optax_lowmem._plan.target import trees_of


def plan(
  target: Any,
  tx: optax.GradientTransformation,
  *,
  step: Callable[..., Any] | None = None,
  args: Sequence[Any] = (),
  wrt: Any = None,
  mesh: int | Mesh | AbstractMesh | None = None,
  card: str | None = None,
) -> MemoryPlan:
  r"""Says what training will hold in memory, before anything is there to be held.

  Weights, gradients and optimizer state follow from shapes, exactly. What a step needs beside them
  only a compiler knows: with `card`, the step is compiled for that card, which need not be here
  (``pip install 'optax_lowmem[plan]'``). At its peak a device then holds

  .. math::
    \text{arguments} + \text{results} - \text{results in the place of arguments} +
    \text{temporaries}.

  Args:
    target: what is trained: a tree of arrays or of shapes (`jax.ShapeDtypeStruct`); a function of
      no arguments that makes one, such as ``lambda: model.init(key, x)["params"]``; or a Flax NNX
      model, made or abstract (`flax.nnx.eval_shape`). Arrays of a model that are not trained count
      as weights. Or a model by its name, such as ``"llama-2-7b"``, or by its ``config.json``, as a
      path or as a dictionary: its parameters in float32 (`optax_lowmem.qlora.model_shapes` gives
      them in another dtype; needs ``optax_lowmem[qlora]``).
    tx: the transformation.
    step: ``step(params, state, *args)``, compiled if `card` is given; `params` and `state` are
      donated. Of an NNX model, `params` is its `flax.nnx.State` of what is trained. By default the
      update alone: `tx.update` and `optax.apply_updates` of gradients that are donated. On a mesh
      of automatic axes XLA chooses how the results of a step lie, if the step does not say it
      (`jax.lax.with_sharding_constraint`).
    args: what `step` takes further, as arrays or shapes.
    wrt: of an NNX model, what is trained, as in `flax.nnx.Optimizer`; by default its LoRA adapters,
      or all parameters if it has none.
    mesh: the devices, as their number or as a mesh; an array with a sharding on it counts with its
      part on one device, all others whole. By default one device.
    card: the GPU or TPU to compile for, such as ``"h100"``, ``"a100-40gb"``, ``"rtx-4090"``,
      ``"l4"``, ``"v5e"``. By default nothing is compiled. Where the card's compiler is not
      installed, the CPU's is asked, and the result says so.

  Returns:
    A `MemoryPlan`: numbers as data, of each device; `print` shows a table.

  Raises:
    TypeError: for a target without arrays, or a `tx` that is no transformation.
    ValueError: for an unknown card, a mesh that there cannot be, a `step` without `card`; for
      several devices in a process that has one, where updates are not cut: see the message.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_lowmem as lowmem
    >>> params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
    >>> print(lowmem.plan(params, lowmem.adamw(3e-4)))
                                        parameters     device
    weights, bfloat16                   16,777,216   32.0 MiB
    gradients                                        32.0 MiB
    optimizer state, count                                4 B
    optimizer state, mu, power8                      17.0 MiB
    optimizer state, nu, power8_unsigned             17.0 MiB
    in all                                           98.0 MiB
    Exact, from shapes; activations and other temporaries are not counted.
    >>> lowmem.plan(params, lowmem.offloaded(lowmem.adamw(3e-4))).state_bytes
    {'device': 4, 'pinned_host': 35651584}
  """
  check_transformation("tx", tx)
  trained, frozen, adapters = trees_of("target", target, wrt)
  if step is not None and card is None:
    raise ValueError("`step` is compiled for a card; pass `card`, such as card='h100'.")
  on = _mesh(mesh)
  check_devices(on.size if on else 1)
  trained, frozen = (jax.tree.map(functools.partial(_laid, on), t) for t in (trained, frozen))
  state = state_shapes(tx, trained, on)
  found = planned(trained, frozen, state, adapters=adapters, devices=on.size if on else 1)
  if card is None:
    return found
  extra: tuple[Any, ...] = tuple(args)
  note, results = "", None
  donate: tuple[int, ...] = (0, 1)
  if step is None:
    step, extra, donate = functools.partial(_update, tx), (trained,), (0, 1, 2)
    note, results = "Of the update alone, without a forward or backward pass.", (trained, state)
  elif held := device_and_host(extra)[0]:
    batch = Part("further arguments", "batch", held)
    found = MemoryPlan((*found.parts, batch), devices=found.devices)
  arguments = (trained, state, *extra)
  program = compile_for(step, arguments, donate, card=card, mesh=on, results=results)
  return found.compiled(program, note)


def planned(
  trained: Any, frozen: Any, state: Any, *, adapters: bool = False, devices: int = 1
) -> MemoryPlan:
  """The plan of these trees of arrays or shapes: weights, state and gradients.

  Args:
    trained: what is trained.
    frozen: what is not.
    state: the optimizer's, as `state_shapes` gives it.
    adapters: whether what is trained are adapters.
    devices: over how many it is spread.
  """
  parts = of_weights(frozen, "frozen weights")
  name, kind = ("adapters", "adapters") if adapters else ("weights", "weights")
  parts += of_weights(trained, name, kind)
  return MemoryPlan((*parts, *of_gradients(trained), *of_state(state, trained)), devices=devices)


def check_devices(count: int) -> None:
  """Raises ValueError for several devices in a process of one: there, updates are never cut."""
  if count > 1 and jax.device_count() == 1:
    raise ValueError(
      f"To plan for {count} devices, this process must have more than one, if only of the CPU's: "
      f"call `jax.config.update('jax_num_cpu_devices', {count})` before JAX is used, or set "
      f"XLA_FLAGS=--xla_force_host_platform_device_count={count}."
    )


def state_shapes(tx: Any, params: Any, mesh: AbstractMesh | None = None) -> Any:
  """The shapes of an optimizer's state; on a mesh with how its arrays lie, as eager `init` does."""
  if mesh is None:
    return jax.eval_shape(tx.init, params)
  explicit = mesh.update(axis_types=(AxisType.Explicit,) * len(mesh.axis_names))

  def on(mesh: AbstractMesh, x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))

  with jax.sharding.use_abstract_mesh(explicit):
    state = jax.eval_shape(tx.init, jax.tree.map(functools.partial(on, explicit), params))

  def back(x: Any) -> Any:
    known = isinstance(x.sharding, NamedSharding)
    spec = x.sharding.spec if known else PartitionSpec()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree.map(back, state)


def _mesh(mesh: Any) -> AbstractMesh | None:
  """The sizes and names of the devices' axes."""
  if mesh is None:
    return None
  if isinstance(mesh, Mesh):
    return mesh.abstract_mesh
  if isinstance(mesh, AbstractMesh):
    return mesh
  try:
    count = operator.index(mesh)
  except TypeError:
    count = 0
  if isinstance(mesh, bool) or count < 1:
    raise ValueError(f"`mesh` must be a mesh or a positive number of devices, got {mesh!r}.")
  return AbstractMesh((count,), ("data",), axis_types=(AxisType.Auto,))


def _laid(mesh: AbstractMesh | None, x: Any) -> Any:
  """The shape of an array, and how it lies on the mesh."""
  if not hasattr(x, "dtype"):
    return x
  if mesh is None:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
  sharding = getattr(x, "sharding", None)
  spec = PartitionSpec()
  if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == mesh.axis_names:
    if sharding.mesh.axis_sizes != mesh.axis_sizes:
      raise ValueError(
        f"`mesh` has axes of {mesh.axis_sizes}, and an array lies on {sharding.mesh.axis_sizes}."
      )
    spec = sharding.spec
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


def _update(tx: Any, params: Any, state: Any, gradients: Any) -> Any:
  updates, state = tx.update(gradients, state, params)
  return optax.apply_updates(params, updates), state
