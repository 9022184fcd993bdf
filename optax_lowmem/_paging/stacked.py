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

_stack: contextvars.ContextVar[Stack | None] = contextvars.ContextVar("stack", default=None)


@dataclasses.dataclass(frozen=True)
class Stack:
  """A stack of layers.

  Attributes:
    count: the number of layers.
    devices: where they are.
    paged: whether there are pages of its state, or are to be.
  """

  count: int
  devices: list[Any]
  paged: bool = True


@contextlib.contextmanager
def within(stack: Stack) -> Iterator[None]:
  """While a transformation is called for one layer of a stack."""
  token = _stack.set(stack)
  try:
    yield
  finally:
    _stack.reset(token)


def stack_of_layers() -> Stack | None:
  """The stack for a layer of which this is called, if it is."""
  return _stack.get()
