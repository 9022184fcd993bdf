"""Calls of a jaxpr, opened where they hold computations that have nothing to do with each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jec

from optax_lowmem._one_by_one import inputs_of, subprogram

_CALLS = ("jit", "pjit")


def opened(closed: Any, wanted: set[int], groups: Callable[[Any, set[int]], list[Any]]) -> Any:
  """`closed`, without the calls in which arguments come together that do not meet.

  Such a call is one equation, which needs all of its arguments at once: optax's bias correction of
  a whole tree is one on jax 0.12. A call whose arguments do meet is left closed, so that it is
  compiled once for all who make it.

  Args:
    closed: a closed jaxpr.
    wanted: the positions of the arguments that matter.
    groups: of a jaxpr and such positions, which of these meet in it.

  Returns:
    A closed jaxpr of the same function; `closed` itself if there is nothing to open.
  """
  found = False

  def run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], wanted: set[int]) -> list[Any]:
    nonlocal found
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    touched = {jaxpr.invars[k] for k in wanted}

    def read(atom: Any) -> Any:
      return atom.val if isinstance(atom, jec.Literal) else env[atom]

    for eqn in jaxpr.eqns:
      literal = jec.Literal
      at = {k for k, v in enumerate(eqn.invars) if not isinstance(v, literal) and v in touched}
      inner = eqn.params["jaxpr"] if eqn.primitive.name in _CALLS else None
      if inner is not None and len(groups(inner.jaxpr, at)) > 1:
        found = True
        values = run(inner.jaxpr, inner.consts, [read(v) for v in eqn.invars], at)
      else:
        inputs = inputs_of([eqn])
        values = subprogram(jaxpr, [eqn], inputs, eqn.outvars)(*(env[v] for v in inputs))
      env.update(zip(eqn.outvars, values, strict=True))
      if at:
        touched.update(v for v in eqn.outvars if v.aval.shape)
    return [read(v) for v in jaxpr.outvars]

  shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
  again = jax.make_jaxpr(lambda *xs: run(closed.jaxpr, closed.consts, xs, wanted))(*shapes)
  return again if found else closed
