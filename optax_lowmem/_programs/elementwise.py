"""The proof that a rule is elementwise, and its equations, each with the leaf that it belongs to.

Tiling a rule that reduces over a leaf would be silently wrong, so elementwise is proved, never
assumed. The rule is traced once, on abstract arrays of the true shapes (so that a mask that looks
at names or ranks sees the real tree). Every equation of the jaxpr then inherits the leaf that its
inputs belong to:

- equations that belong to no leaf (step counts, schedules, bias corrections) are run once a step;
- equations of one leaf must be elementwise primitives, and mix that leaf's arrays only with values
  that are the same for every element; they can then be run on any tile of the leaf;
- anything else refutes the claim, and the caller runs the rule on whole arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from optax_lowmem._programs.flat_jaxpr import Operation, flattened
from optax_lowmem._programs.primitives import ELEMENTWISE


class NotElementwise(Exception):
  """The rule cannot be run tile by tile; the message says which part of it refuses.

  Attributes:
    by_phases: whether a part of it is one that GPUs compute in phases.
  """

  by_phases = False


@dataclasses.dataclass(frozen=True)
class Ref:
  """A value of the program.

  `owner` is the index of the leaf it belongs to, or None. A value without owner is `uniform` if it
  is the same everywhere; it is then kept as a scalar, whatever its shape.
  """

  index: int
  aval: Any
  owner: int | None
  uniform: bool


@dataclasses.dataclass(frozen=True)
class Op:
  """An equation; `on_scalars` if elementwise on uniform values: one element is enough."""

  primitive: Any
  params: dict[str, Any]
  inputs: tuple[Ref, ...]
  outputs: tuple[Ref, ...]
  on_scalars: bool


class Proof:
  """What was proved of a program.

  Attributes:
    inputs: its arguments.
    outputs: its results.
    constants: values that are known.
    ops: by owner, the operations in an order in which they can be run.
  """

  def __init__(self, closed: Any, owners: Sequence[int | None]):
    """Proves that a closed jaxpr is elementwise.

    Args:
      closed: the jaxpr.
      owners: for every argument the leaf it belongs to, or None.

    Raises:
      NotElementwise: if it is not.
    """
    if closed.effects:
      raise NotElementwise(f"it has side effects: {closed.effects}")
    self._count = 0
    self.constants: list[tuple[Ref, Any]] = []
    self.ops: dict[int | None, list[Op]] = {}
    flat = flattened(closed)
    self.inputs = [
      self._ref(value.aval, owner, owner is None and not value.aval.shape)
      for value, owner in zip(flat.inputs, owners, strict=True)
    ]
    refs = dict(zip(flat.inputs, self.inputs, strict=True))
    for value, known in flat.constants.items():
      refs[value] = self._ref(value.aval, None, not value.aval.shape)
      self.constants.append((refs[value], known))
    for operation in flat.operations:
      made = self._append(operation, [refs[value] for value in operation.inputs])
      refs.update(zip(operation.outputs, made, strict=True))
    self.outputs = [refs[value] for value in flat.outputs]

  def _ref(self, aval: Any, owner: int | None, uniform: bool) -> Ref:
    self._count += 1
    return Ref(self._count, aval, owner, uniform)

  def _append(self, operation: Operation, operands: list[Ref]) -> list[Ref]:
    name = operation.primitive.name
    leaves = {ref.owner for ref in operands} - {None}
    if len(leaves) > 1:
      raise NotElementwise(f"{name!r} mixes two leaves")
    owner = leaves.pop() if leaves else None
    elementwise = name in ELEMENTWISE or _keeps_width(operation)
    if name == "broadcast_in_dim":
      (operand, *_), aval = operands, operation.outputs[0].aval
      if operand.uniform or (owner is not None and operand.aval.shape == aval.shape):
        return [dataclasses.replace(operand, aval=aval)]  # the same value, spread
    if owner is None:
      on_scalars = elementwise and all(ref.uniform for ref in operands)
      uniform = on_scalars or not any(value.aval.shape for value in operation.outputs)
    else:
      on_scalars = uniform = False
      if not elementwise:
        raise NotElementwise(f"{name!r} is not elementwise")
      if not all(ref.owner is not None or ref.uniform for ref in operands):
        raise NotElementwise(f"{name!r} reads an array that belongs to no leaf")
    outputs = tuple(self._ref(value.aval, owner, uniform) for value in operation.outputs)
    op = Op(operation.primitive, operation.params, tuple(operands), outputs, on_scalars)
    self.ops.setdefault(owner, []).append(op)
    return list(outputs)


def _keeps_width(operation: Operation) -> bool:
  """Whether it only reads the bits of elements as another type of the same width."""
  if operation.primitive.name != "bitcast_convert_type":
    return False
  widths = {value.aval.dtype.itemsize for value in (*operation.inputs, *operation.outputs)}
  return len(widths) == 1
