"""Loops over stacked layers: forward, keeping what each is given, and backward, updating each.

A layer's arrays are taken out of the stacks in the loop's carry, and the new ones put where they
were: XLA does so in place. As `xs` and `ys` of a scan, the new stacks would lie beside the old.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._backward.owners import owners
from optax_lowmem._backward.stacks import count_of, take
from optax_lowmem._backward.trip import trip
from optax_lowmem._host_memory.pages import is_paged

Body = Callable[[Any, Any, Any], Any]  # of a layer's parameters, x and its inputs; the new x


def forward(body: Body, layers: Any, x: Any, inputs: Any) -> tuple[Any, Any]:
  """What the last layer returns, and what each was given, stacked."""

  def one(x, each):
    p, own = each
    new = body(p, x, own)
    _check_alike(x, new)
    return new, x

  return jax.lax.scan(one, x, (layers, inputs))


def backward(
  body: Body,
  update: Callable[[Any, Any, Any, Any], tuple[Any, Any]],
  layers: Any,
  state: Any,
  given: tuple[Any, Any],
  dx: Any,
) -> tuple[Any, tuple[Any, Any]]:
  """Goes through the layers from the last to the first, and updates each.

  Args:
    body: the layer.
    update: of a layer's number, gradients, state and parameters; its new parameters and state.
    layers: the parameters, stacked.
    state: the state, stacked; what is paged, the last layer first.
    given: what each layer was given, x and inputs, stacked.
    dx: the gradient by what the last layer returned.

  Returns:
    The state, and the parameters with the gradient by what the first layer was given.
  """
  count = count_of(layers)
  params = len(jax.tree.leaves(layers))
  before, treedef = jax.tree.flatten((layers, state), is_leaf=is_paged)
  on_host = [*map(is_paged, before)]
  stacks = [x.lanes[0] if is_paged(x) else x for x in before]
  owned = owners(state, layers)

  def loop(i, carry):
    stacks, dx = carry
    k = count - 1 - i

    def one(arrays, rest):
      (x, own), dx, number = rest
      p, s = treedef.unflatten(arrays)
      _, pull = jax.vjp(lambda p, x: body(p, x, own), p, x)
      grads, dx = pull(dx)
      new = update(number, grads, s, p)
      return jax.tree.leaves(grads), jax.tree.leaves(new), dx

    return trip(one, stacks, on_host, (take(given, k), dx, k), i, params, owned)

  stacks, dx = jax.lax.fori_loop(0, count, loop, (stacks, dx))
  new = [
    dataclasses.replace(old, lanes=(stack,)) if is_paged(old) else stack
    for old, stack in zip(before, stacks, strict=True)
  ]
  layers, state = treedef.unflatten(new)
  return state, (layers, dx)


def squares_of_all(
  body: Body, layers: Any, given: tuple[Any, Any], dx: Any
) -> tuple[jax.Array, Any]:
  """The sum of squares of all gradients, and the gradient by what the first layer was given."""
  count = count_of(layers)

  def loop(i, carry):
    total, dx = carry
    k = count - 1 - i
    p, (x, own) = take(layers, k), take(given, k)
    _, pull = jax.vjp(lambda p, x: body(p, x, own), p, x)
    grads, dx = pull(dx)
    return total + squares(grads), dx

  return jax.lax.fori_loop(0, count, loop, (jnp.zeros((), _wide(layers)), dx))


def squares(grads: Any) -> jax.Array:
  """The sum of squares of magnitudes, in float32, or in float64 if there are such."""
  total = jnp.zeros((), _wide(grads))
  for g in jax.tree.leaves(grads):
    x = g.astype(jnp.promote_types(g.dtype, jnp.float32))
    square = x.real**2 + x.imag**2 if jnp.iscomplexobj(x) else x * x
    total += jnp.sum(square)
  return total


def _wide(tree: Any) -> Any:
  """The dtype of a sum over arrays of floats."""
  return jnp.finfo(jnp.result_type(jnp.float32, *jax.tree.leaves(tree))).dtype


def _check_alike(x: Any, new: Any) -> None:
  """Refuses a layer that changes the form of what goes from layer to layer.

  Raises:
    TypeError: if it does, or if there is an array that has no gradient.
  """
  before, after = ([_form(a) for a in jax.tree.leaves(tree)] for tree in (x, new))
  if jax.tree.structure(x) != jax.tree.structure(new) or before != after:
    raise TypeError(
      f"`layer` must return what it is given, in structure, shape and dtype: it is given "
      f"{', '.join(before)} and returns {', '.join(after)}. Cast in `embed`, and in the layer."
    )
  for a in jax.tree.leaves(x):
    if not jnp.issubdtype(a.dtype, jnp.inexact):
      raise TypeError(
        f"`embed` must return arrays of floats, got {_form(a)}. What has no gradient goes into "
        "`batch`, or into `inputs`."
      )


def _form(a: Any) -> str:
  return f"{jnp.result_type(a)}[{','.join(map(str, jnp.shape(a)))}]"
