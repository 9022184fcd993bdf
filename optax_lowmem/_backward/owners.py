"""Which parameter an array of a state belongs to, by its key path."""

from __future__ import annotations

from typing import Any

import jax

from optax_lowmem._host_memory.pages import is_paged


def owners(state: Any, params: Any) -> list[int | None]:
  """For each array or page of `state` the parameter of which the key path is in its own; or None.

  It is asked for when things are to be done, not what: of an array that is ascribed to another
  parameter, the result is the same.

  >>> owners(({"a": 1, "b": 2}, 3), {"a": 0, "b": 0})
  [0, 1, None]
  """
  known = {path: i for i, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(params)[0])}
  lengths = sorted({len(path) for path in known}, reverse=True)

  def owner(path):
    for n in lengths:
      for end in range(len(path), n - 1, -1):
        if (found := known.get(path[end - n : end])) is not None:
          return found
    return None

  leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_paged)[0]
  return [owner(path) for path, _ in leaves]
