"""Rules that are traced as a part of another, whose state is decoded around all of it.

`master_weights(quantized(adam))` is one program of its parameter: parameters are joined, moments
decoded, the rule is run, and all is stored again, in one kernel or tile. So while the outer one is
traced, `quantized` within is the rule that it wraps.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from optax_lowmem._programs.elementwise import NotElementwise


@dataclasses.dataclass
class _Decoded:
  forms: dict[int, Any]
  by_phases: bool = False


_open: contextvars.ContextVar[_Decoded | None] = contextvars.ContextVar("decoded", default=None)


@contextlib.contextmanager
def decoded_state(values: Sequence[Any], forms: Sequence[Any]) -> Iterator[None]:
  """What is traced within is given a state that is decoded already.

  Args:
    values: its arrays.
    forms: for each of them, the form in which it is held between updates.

  Raises:
    NotElementwise: if a part of it is computed in phases on GPUs: it takes norms or means.
  """
  found = _Decoded({id(x): form for x, form in zip(values, forms, strict=True)})
  token = _open.set(found)
  try:
    yield
  finally:
    _open.reset(token)
  if found.by_phases:
    error = NotElementwise("a part of it takes norms or means")
    error.by_phases = True
    raise error


def note_phases() -> None:
  """Makes known that what is traced now is, on GPUs, computed in phases."""
  if (found := _open.get()) is not None:
    found.by_phases = True


def is_decoded() -> bool:
  """Whether the state of what is traced now is decoded around it."""
  return _open.get() is not None


def held(state: Any) -> Any:
  """A decoded state in the form in which it is held; None if that cannot be told."""
  found = _open.get()
  forms = {} if found is None else found.forms
  leaves, treedef = jax.tree.flatten(state)
  if any(id(x) not in forms for x in leaves):
    return None
  return treedef.unflatten([forms[id(x)] for x in leaves])
