"""A program in parts that have nothing to do with each other, as most updates are by parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from optax_lowmem._programs.inlined_calls import opened
from optax_lowmem._programs.outputs import inputs_of, subprogram
from optax_lowmem._programs.primitives import is_var

# What is kept as it is: a condition, and what has a derivative of its own.
_CLOSED = frozenset(("cond", "custom_jvp_call", "custom_vjp_call"))


@dataclasses.dataclass
class Part:
  """Some results of a program, and no arguments that another part needs, but for scalars.

  Attributes:
    groups: their positions, those together that have arguments in common.
    size: elements of all of them.
  """

  groups: list[list[int]]
  size: int

  @property
  def results(self) -> list[int]:
    """Positions of all of them."""
    return [k for group in self.groups for k in group]


class Parts:
  """A program in its parts.

  Attributes:
    parts: them, in the order of their results.
    others: positions of the results that are made of scalars alone.
  """

  def __init__(self, closed: Any, most: int):
    """Finds the parts of a closed jaxpr.

    Args:
      closed: the jaxpr.
      most: how many parts there may be; small ones are joined to their neighbours.
    """
    arrays = {k for k, v in enumerate(closed.jaxpr.invars) if v.aval.shape}
    closed = opened(closed, arrays, lambda eqn: eqn.primitive.name in _CLOSED)
    self._jaxpr, self._consts = closed.jaxpr, closed.consts
    self._maker = {v: i for i, eqn in enumerate(self._jaxpr.eqns) for v in eqn.outvars}
    owners = _owners(self._jaxpr)
    found: dict[Any, Part] = {}
    self.others: list[int] = []
    for k, v in enumerate(self._jaxpr.outvars):
      owner = owners.get(v) if is_var(v) else None
      if owner is None:
        self.others.append(k)
        continue
      part = found.setdefault(owner, Part([[]], 0))
      part.groups[0].append(k)
      part.size += math.prod(v.aval.shape)
    self.parts = _joined(list(found.values()), most)

  def run(self, results: Sequence[int], args: Sequence[Any]) -> list[Any]:
    """Some results, made of the arguments that they need; the others' places may hold anything."""
    jaxpr = self._jaxpr
    wanted = [jaxpr.outvars[k] for k in results]
    equations, inputs = self._behind(results)
    env = dict(zip(jaxpr.constvars, self._consts, strict=True))
    env |= dict(zip(jaxpr.invars, args, strict=True))
    made = [v for v in wanted if is_var(v) and v in self._maker]
    if made:
      values = subprogram(jaxpr, equations, inputs, made)(*(env[v] for v in inputs))
      env.update(zip(made, values, strict=True))
    return [env[v] if is_var(v) else jax.numpy.asarray(v.val, v.aval.dtype) for v in wanted]

  def arguments(self, results: Sequence[int]) -> list[int]:
    """Positions of the arguments that some results are made of."""
    used = {*self._behind(results)[1], *(self._jaxpr.outvars[k] for k in results)}
    return [k for k, v in enumerate(self._jaxpr.invars) if v in used]

  def _behind(self, results: Sequence[int]) -> tuple[list[Any], list[Any]]:
    """The equations that make some results, and what those take."""
    needed: set[int] = set()
    open_ = [v for k in results if is_var(v := self._jaxpr.outvars[k])]
    while open_:
      i = self._maker.get(open_.pop())
      if i is not None and i not in needed:
        needed.add(i)
        open_ += [v for v in self._jaxpr.eqns[i].invars if is_var(v)]
    equations = [self._jaxpr.eqns[i] for i in sorted(needed)]
    return equations, inputs_of(equations)


def _owners(jaxpr: Any) -> dict[Any, Any]:
  """For each variable that depends on an array among the arguments, what stands for its part."""
  parent: dict[Any, Any] = {v: v for v in jaxpr.invars if v.aval.shape}

  def root(v):
    while parent[v] is not v:
      parent[v] = parent[parent[v]]
      v = parent[v]
    return v

  for eqn in jaxpr.eqns:
    met = [root(v) for v in eqn.invars if is_var(v) and v in parent]
    for v in met[1:]:
      parent[root(v)] = root(met[0])
    if met:
      parent.update((v, root(met[0])) for v in eqn.outvars)
  return {v: root(v) for v in parent}


def _joined(parts: list[Part], most: int) -> list[Part]:
  """At most about so many parts, of neighbours."""
  least = sum(part.size for part in parts) / most
  joined: list[Part] = []
  for part in parts:
    if joined and joined[-1].size + part.size <= least:
      joined[-1] = Part([*joined[-1].groups, *part.groups], joined[-1].size + part.size)
    else:
      joined.append(part)
  return joined
