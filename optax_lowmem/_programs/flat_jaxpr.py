"""A jaxpr as one flat list of operations, calls inlined."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jec

# Primitives that only wrap a jaxpr, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
    "remat": "jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
  """A value of a program: an argument, a constant, or what an operation makes."""

  aval: Any

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.aval.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
  """An equation: `primitive` of `inputs`."""

  primitive: Any
  params: dict[str, Any]
  inputs: tuple[Value, ...]
  outputs: tuple[Value, ...]

  def run(self, *operands: Any) -> Sequence[Any]:
    """Its results."""
    made = self.primitive.bind(*operands, **self.params)
    return made if self.primitive.multiple_results else [made]


@dataclasses.dataclass
class Flat:
  """A jaxpr without calls.

  Attributes:
    inputs: its arguments.
    constants: values that are known, closed-over arrays and literals.
    operations: in an order in which they can be run.
    outputs: its results.
  """

  inputs: list[Value]
  constants: dict[Value, Any]
  operations: list[Operation]
  outputs: list[Value]


def flattened(closed: Any) -> Flat:
  """A closed jaxpr as one list of operations."""
  inputs = [Value(v.aval) for v in closed.jaxpr.invars]
  flat = Flat(inputs, {}, [], [])
  flat.outputs = _walk(flat, closed.jaxpr, closed.consts, inputs)
  return flat


def _walk(flat: Flat, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
  def constant(value):
    known = Value(jax.typeof(value))
    flat.constants[known] = value
    return known

  env = dict(zip(jaxpr.constvars, map(constant, consts), strict=True))
  env |= dict(zip(jaxpr.invars, inputs, strict=True))

  def read(atom):
    return constant(atom.val) if isinstance(atom, jec.Literal) else env[atom]

  for eqn in jaxpr.eqns:
    operands = [read(atom) for atom in eqn.invars]
    inner = eqn.params.get(CALLS.get(eqn.primitive.name, ""))
    if inner is None:
      made = [Value(v.aval) for v in eqn.outvars]
      flat.operations.append(Operation(eqn.primitive, eqn.params, tuple(operands), tuple(made)))
    else:
      inner, known = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
      made = _walk(flat, inner, known, operands)
    env.update(zip(eqn.outvars, made, strict=True))
  return [read(atom) for atom in jaxpr.outvars]
