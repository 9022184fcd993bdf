"""Bodies of kernels: a function of tiles, traced, with what it closes over as arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jec
import jax.numpy as jnp

from optax_lowmem._quantization.tangents import unchecked

Body = Callable[[list[Any], list[Any]], Sequence[Any]]  # new tiles, of those of reads and of writes


def traced(fn: Body, reads: Sequence[Any], writes: Sequence[Any], results: Sequence[Any]) -> Any:
  """The jaxpr of `fn` on tiles; what it closes over are its constants.

  Args:
    fn: the body.
    reads, writes: forms of its tiles.
    results: forms of what it must return.

  Raises:
    TypeError: if it returns something else.
  """
  leaves, treedef = jax.tree.flatten([list(reads), list(writes)])

  def flat(*leaves):
    return jax.tree.leaves(fn(*treedef.unflatten(leaves)))

  with unchecked():  # Mosaic knows no such rule, and what calls the kernel has one of its own
    closed = jax.make_jaxpr(flat)(*leaves)
  for got, like in zip(closed.out_avals, jax.tree.leaves(list(results)), strict=True):
    got, like = (f"{x.dtype}{list(x.shape)}" for x in (got, like))
    if got != like:
      raise TypeError(
        f"`fn` must return tiles in the form of what they replace, {like}, got {got}."
      )
  return closed


def unknown(closed: Any, lowered: frozenset[str], compiler: str) -> str | None:
  """Why `compiler`, which knows the primitives `lowered`, cannot lower a body, if it cannot."""
  for name in _primitives(closed.jaxpr):
    if name not in lowered:
      return f"{compiler} does not know {name!r}, which the rule uses"
  for value in closed.consts:
    if jnp.ndim(value):
      return f"the rule reads an array of shape {jnp.shape(value)} beside its arguments"
  return None


def _primitives(jaxpr: Any) -> Iterator[str]:
  for eqn in jaxpr.eqns:
    yield eqn.primitive.name
    for inner in jec.jaxprs_in_params(eqn.params):
      yield from _primitives(inner)


def as_argument(scalar: Any) -> jax.Array:
  """A scalar as a kernel takes it: in an array, and of numbers only."""
  scalar = jnp.asarray(scalar)
  return (scalar.astype(jnp.int32) if scalar.dtype == jnp.bool_ else scalar).reshape(1)


def as_constant(value: jax.Array, scalar: Any) -> jax.Array:
  """The inverse of `as_argument`, within the kernel."""
  return value != 0 if jnp.result_type(scalar) == jnp.bool_ else value
