"""What is stored has no derivative: to ask for one is an error, not zero."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

CODES = "stored in 8 or 4 bits", "hold its state in float32, with `bits=32`"
PAGES = "handed to `offloaded`", "leave `offloaded` out"

_unchecked = contextvars.ContextVar("unchecked", default=False)


def without_tangent(x: jax.Array, how: tuple[str, str] = CODES) -> jax.Array:
  """`x`, on its way into what is stored.

  Codes are integers, which carry no tangent from one step to the next; what is left, that of the
  scales, gave half of a gradient through three steps of SGD. Straight through is no way out: there
  is nowhere in the state to keep a tangent of `x`'s size.

  Args:
    x: an array.
    how: how it is stored, and what to do instead.

  Raises:
    TypeError: where `x` depends on what is differentiated.
  """
  return x if _unchecked.get() else jax.lax.stop_gradient(_refused(x, how))


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
  """What is traced within has no rule for its derivative: for the bodies of kernels."""
  token = _unchecked.set(True)
  try:
    yield
  finally:
    _unchecked.reset(token)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _refused(x: jax.Array, how: tuple[str, str]) -> jax.Array:
  del how
  return x


def _refused_jvp(how, primals, tangents):
  (x,), (tangent,) = primals, tangents
  if not isinstance(tangent, SymbolicZero):
    raise TypeError(
      f"a value that is {how[0]} depends on what is differentiated, and would carry no derivative. "
      f"To differentiate through an optimizer's updates, {how[1]}; to take such values as "
      "constants, apply `jax.lax.stop_gradient` to what they are made of, such as the gradients."
    )
  return x, tangent


_refused.defjvp(_refused_jvp, symbolic_zeros=True)


def derivative(
  fn: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
  """`jax.jvp(fn, primals, tangents)` where tangents may be a rule's `SymbolicZero`s.

  These are constants to `fn`, so that what is stored of them alone is not refused.
  """
  flat, treedef = jax.tree.flatten(primals)
  directions = jax.tree.leaves(tangents)
  moving = [k for k, t in enumerate(directions) if not isinstance(t, SymbolicZero)]

  def of_moving(*values):
    known = dict(enumerate(flat)) | dict(zip(moving, values, strict=True))
    return fn(*treedef.unflatten([known[k] for k in range(len(flat))]))

  return jax.jvp(of_moving, [flat[k] for k in moving], [directions[k] for k in moving])
