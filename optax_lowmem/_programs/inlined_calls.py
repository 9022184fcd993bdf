"""A jaxpr in one piece: its calls inlined, so that what they do to one array stands alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from optax_lowmem._meshes.explicit_axes import is_explicit
from optax_lowmem._programs.outputs import inputs_of, subprogram
from optax_lowmem._programs.primitives import called, is_var


def opened(closed: Any, wanted: set[int], closes: Callable[[Any], bool]) -> Any:
  """`closed`, without the calls that are reached by some of its arguments.

  optax's bias correction of a whole tree is one call on jax 0.12, which would need all moments at
  once. A condition is opened, too: both of its branches are computed, and one is chosen for each
  element. Of state in host memory, what chooses can then be run where the state is.

  Args:
    closed: a closed jaxpr.
    wanted: the positions of those arguments.
    closes: which equations are to stay as they are.

  Returns:
    A closed jaxpr of the same function.
  """

  def run(closed: Any, args: Sequence[Any], wanted: set[int]) -> Any:
    jaxpr = closed.jaxpr
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))
    touched = {jaxpr.invars[k] for k in wanted}

    def read(atom: Any) -> Any:
      return env[atom] if is_var(atom) else atom.val

    for eqn in jaxpr.eqns:
      at = {k for k, v in enumerate(eqn.invars) if is_var(v) and v in touched}
      values = None if not at or closes(eqn) else _inside(eqn, [*map(read, eqn.invars)], at, run)
      if values is None:
        inputs = inputs_of([eqn])
        values = subprogram(jaxpr, [eqn], inputs, eqn.outvars)(*(env[v] for v in inputs))
      env.update(zip(eqn.outvars, values, strict=True))
      if at:
        touched.update(v for v in eqn.outvars if v.aval.shape)
    return [read(v) for v in jaxpr.outvars]

  shapes = [_shaped(v.aval) for v in closed.jaxpr.invars]
  return jax.make_jaxpr(lambda *xs: run(closed, xs, wanted))(*shapes)


def _inside(eqn: Any, args: list[Any], at: set[int], run: Callable[..., Any]) -> Any:
  """The results of an equation, of what is inside; None if it is not to be opened."""
  if eqn.primitive.name == "cond" and not eqn.params.get("branches_platforms"):
    index, *operands = args
    branches, kinds = eqn.params["branches"], [v.aval for v in eqn.outvars]
    if eqn.effects or len(branches) != 2:
      return None
    results = [run(branch, operands, {k - 1 for k in at}) for branch in branches]
    return [
      x
      if x is y
      else jax.lax.select_n(index != 0, *(jax.numpy.asarray(z, k.dtype) for z in (x, y)))
      for x, y, k in zip(*results, kinds, strict=True)
    ]
  inner = called(eqn)
  return None if inner is None else run(inner, args, at)


def _shaped(aval: Any) -> jax.ShapeDtypeStruct:
  sharding = aval.sharding if is_explicit(aval.sharding.mesh) else None
  return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)
