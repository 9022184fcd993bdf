"""A function of a tree, traced once and evaluated one output at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jec
import jax.numpy as jnp

from optax_lowmem._programs.primitives import is_var


def subprogram(jaxpr: Any, equations: list[Any], inputs: list[Any], outputs: list[Any]) -> Any:
  """Some equations of a jaxpr as a function of `inputs` that returns a list of `outputs`."""
  names, paths = (None,) * len(inputs), (None,) * len(outputs)
  info = jaxpr.debug_info._replace(arg_names=names, result_paths=paths)
  part = jec.Jaxpr((), inputs, outputs, equations, jaxpr.effects, info)
  return jec.jaxpr_as_fun(jec.ClosedJaxpr(part, ()))


def inputs_of(equations: list[Any]) -> list[Any]:
  """The variables that equations take and do not make, in the order in which they need them."""
  made = {v for eqn in equations for v in eqn.outvars}
  return list(
    dict.fromkeys(v for eqn in equations for v in eqn.invars if is_var(v) and v not in made)
  )


def one_by_one(function: Callable[[Any], Any], tree: Any) -> tuple[list[Callable[[], Any]], Any]:
  """How to make each output of ``function(tree)`` by itself.

  What outputs share is computed for each of them again.

  Args:
    function: of one tree of arrays; it is traced once.
    tree: its argument.

  Returns:
    A function without arguments for each leaf of the output, and the output's tree of shapes.

  >>> makers, _ = one_by_one(lambda x: {"a": x + 1, "b": x * x}, jnp.arange(3.0))
  >>> [make().tolist() for make in makers]
  [[1.0, 2.0, 3.0], [0.0, 1.0, 4.0]]
  """
  closed, shapes = jax.make_jaxpr(function, return_shape=True)(tree)
  jaxpr = closed.jaxpr
  maker = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
  given = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  given |= dict(zip(jaxpr.invars, jax.tree.leaves(tree), strict=True))

  def make(out: Any) -> jax.Array:
    if not is_var(out):
      return jnp.asarray(out.val, out.aval.dtype)
    needed: set[int] = set()
    open_ = [out]
    while open_:
      i = maker.get(v) if is_var(v := open_.pop()) else None
      if i is not None and i not in needed:
        needed.add(i)
        open_ += jaxpr.eqns[i].invars
    if not needed:
      return given[out]
    equations = [jaxpr.eqns[i] for i in sorted(needed)]
    inputs = inputs_of(equations)
    return subprogram(jaxpr, equations, inputs, [out])(*(given[v] for v in inputs))[0]

  return [lambda out=out: make(out) for out in jaxpr.outvars], shapes
