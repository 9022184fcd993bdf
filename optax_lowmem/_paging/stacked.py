"""What `offloaded` does for a transformation of one layer, of a stack that has many.

`update_in_backward` vectorizes the `init` of such a transformation, and fetches the state of a
layer for its `update`. So here `offloaded` marks what is to be paged, and moves nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

_stack: contextvars.ContextVar[Stack | None] = contextvars.ContextVar("stack", default=None)


@dataclasses.dataclass(frozen=True)
class Stack:
  """A stack of layers.

  Attributes:
    count: the number of layers.
    devices: where they are.
  """

  count: int
  devices: list[Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ToPage:
  """An array of a new state that is to be stored in host memory."""

  array: Any


def is_to_page(x: Any) -> bool:
  return isinstance(x, ToPage)


@contextlib.contextmanager
def within(stack: Stack) -> Iterator[None]:
  """While a transformation is called for one layer of a stack whose state has pages."""
  token = _stack.set(stack)
  try:
    yield
  finally:
    _stack.reset(token)


def stack_of_layers() -> Stack | None:
  """The stack for a layer of which this is called, if it is."""
  return _stack.get()
