"""A jaxpr as one flat list of operations, calls inlined."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from optax_lowmem._programs.primitives import called, is_var


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


def flattened(closed: Any, custom: bool = True) -> Flat:
  """A closed jaxpr as one list of operations.

  Args:
    closed: the jaxpr.
    custom: whether calls are inlined that have a derivative of their own, which is lost by that.
  """
  inputs = [Value(v.aval) for v in closed.jaxpr.invars]
  flat = Flat(inputs, {}, [], [])
  flat.outputs = _walk(flat, closed, inputs, custom)
  return flat


def _walk(flat: Flat, closed: Any, inputs: Sequence[Value], custom: bool) -> list[Value]:
  def constant(value):
    known = Value(jax.typeof(value))
    flat.constants[known] = value
    return known

  env = dict(zip(closed.jaxpr.constvars, map(constant, closed.consts), strict=True))
  env |= dict(zip(closed.jaxpr.invars, inputs, strict=True))

  def read(atom):
    return env[atom] if is_var(atom) else constant(atom.val)

  for eqn in closed.jaxpr.eqns:
    operands = [read(atom) for atom in eqn.invars]
    inner = called(eqn, custom)
    if inner is None:
      made = [Value(v.aval) for v in eqn.outvars]
      flat.operations.append(Operation(eqn.primitive, eqn.params, tuple(operands), tuple(made)))
    else:
      made = _walk(flat, inner, operands, custom)
    env.update(zip(eqn.outvars, made, strict=True))
  return [read(atom) for atom in closed.jaxpr.outvars]
