"""The training step of some settings as shapes: what is planned, and what is compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from optax_lowmem._plan.compiler import compile_for
from optax_lowmem._plan.memory_plan import MemoryPlan, Part
from optax_lowmem._plan.parts import device_and_host, of_gradients, of_state, of_weights
from optax_lowmem._plan.plan import check_devices, state_shapes
from optax_lowmem.qlora.data.batches import Batch
from optax_lowmem.qlora.kinds import kind_of
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.run.settings import Settings
from optax_lowmem.qlora.training.devices import part_of
from optax_lowmem.qlora.training.step import State, split


class Step(NamedTuple):
  """A training step and its arguments, as shapes.

  Attributes:
    fn: ``fn(state, frozen, batch)``; the state is donated.
    state: what is trained, and the optimizer's state.
    frozen: the rest of the model.
    batch: one batch.
    at_a_time: of what is trained, what has gradients at a time.
    whole: whether all of the model is trained, or adapters.
    passes: how many a step has; with more than one, sums of all gradients are held as well.
    mesh: the devices; None for one.
  """

  fn: Callable[..., Any]
  state: State
  frozen: Any
  batch: Batch
  at_a_time: Any
  whole: bool
  passes: int
  mesh: AbstractMesh | None

  def shapes(self) -> MemoryPlan:
    """Its memory from shapes alone."""
    name, kind = ("weights", "weights") if self.whole else ("adapters", "adapters")
    parts = of_weights(self.frozen, "frozen weights") + of_weights(self.state.trained, name, kind)
    parts += of_gradients(self.at_a_time)
    if self.passes > 1:
      name = f"sums of the gradients of {self.passes} passes"
      parts.append(Part(name, "gradients", device_and_host(self.state.trained)[0]))
    parts += of_state(self.state.opt_state, self.state.trained)
    batch = Part("batch", "batch", device_and_host((self.batch, self.state.rngs))[0])
    return MemoryPlan((*parts, batch), devices=self.mesh.size if self.mesh else 1)

  def compiled(self, card: str) -> MemoryPlan:
    """Its memory by the compiler of a card."""
    args = (self.state, self.frozen, self.batch)
    # As `training.step.compiled` has it: the new state lies where the old one did.
    program = compile_for(
      self.fn, args, (0,), card=card, mesh=self.mesh, results=(self.state, None)
    )
    return self.shapes().compiled(program)


def step_of(config: LlamaConfig, s: Settings, *, devices: int = 1) -> Step:
  """The step that `lowmem finetune` compiles for these settings; nothing is made of it.

  Args:
    config: of the model.
    s: the settings.
    devices: how many there are. A batch's rows are spread over them; each holds the whole model, or
      with `fsdp` a part of what is frozen, and in full training of all there is.

  Raises:
    ValueError: where the rows cannot be spread evenly, and as `check_devices`.
  """
  if devices < 1:
    raise ValueError(f"--mesh must be a positive number of devices, got {devices}.")
  if s.batch_size % devices:
    raise ValueError(
      f"--batch-size {s.batch_size} is not a multiple of the {devices} devices of --mesh, over "
      "which its rows are spread."
    )
  check_devices(devices)
  kind = kind_of(s)
  model = kind.abstract(config, s)
  graph, (trained, _, rngs), frozen = split(model, lambda trained: None, kind.variables)
  shape = (s.grad_accum, s.batch_size, s.seq_len)
  ids, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool)
  packed = (ids, ids) if s.packing else ()
  batch = Batch(ids, ids, mask, jax.ShapeDtypeStruct(shape[:2], jnp.int32), *packed)
  mesh = None
  if devices > 1:
    mesh = AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    whole = functools.partial(_laid, mesh)
    frozen = _in_parts(mesh, frozen) if s.fsdp else jax.tree.map(whole, frozen)
    divided = s.fsdp and kind.whole
    trained = _in_parts(mesh, trained) if divided else jax.tree.map(whole, trained)
    rngs = jax.tree.map(whole, rngs)
    batch = jax.tree.map(lambda x: _laid(mesh, x, None, "data"), batch)
  method = kind.method(s, graph, kind.optimizer(s)[0], mesh)
  state = State(trained, state_shapes(method, trained, mesh), rngs)
  at_a_time = method.at_a_time(trained)
  return Step(method.step, state, frozen, batch, at_a_time, kind.whole, s.grad_accum, mesh)


def _laid(mesh: AbstractMesh, x: Any, *spec: str | None) -> Any:
  where = NamedSharding(mesh, PartitionSpec(*spec))
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _in_parts(mesh: AbstractMesh, tree: Any) -> Any:
  """As `training.devices.in_parts` lays arrays out."""

  def part(path: Any, x: Any) -> Any:
    return _laid(mesh, x, *part_of(path, x.shape, mesh.size))

  return jax.tree_util.tree_map_with_path(part, tree)
