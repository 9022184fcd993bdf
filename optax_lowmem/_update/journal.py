"""What an update notes of each parameter while it is traced, for `explain`."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


class Note(NamedTuple):
  """How a parameter is updated.

  Attributes:
    method: ``"elementwise"`` (by kernel, tiles or phases), ``"whole"``, or ``"optax"``.
    reason: why; of an elementwise rule, why not by the kernel, or an empty string.
  """

  method: str
  reason: str


class _Journal(NamedTuple):
  platform: str
  notes: dict[str, Note]


_open: contextvars.ContextVar[_Journal | None] = contextvars.ContextVar("journal", default=None)


@contextlib.contextmanager
def journal(platform: str) -> Iterator[dict[str, Note]]:
  """Notes of how all that is traced within is updated on a platform, by parameters' paths."""
  found = _Journal(platform, {})
  token = _open.set(found)
  try:
    yield found.notes
  finally:
    _open.reset(token)


def asked_for() -> str | None:
  """The platform of which notes are wanted; None if nobody wants any."""
  found = _open.get()
  return found and found.platform


def note(path: Any, method: str, reason: str) -> None:
  """Notes how the parameter at `path` is updated.

  Of several updates, one of quantized state counts; of several traces of it, one that is not a
  kernel's.
  """
  if (found := _open.get()) is None:
    return
  known = found.notes.get(name := jax.tree_util.keystr(path))
  if known is None or known.method == "optax" or (method != "optax" and reason):
    found.notes[name] = Note(method, reason)
