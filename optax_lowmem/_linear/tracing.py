"""A call that is traced once to see what a model computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def trace(call: Callable[..., Any], state: Any, inputs: Any) -> None:
  """Traces `call(state, inputs)` and computes nothing.

  All of the state is abstract. Of the inputs only what is a `jax.ShapeDtypeStruct` is: a program
  may depend on the others' values.
  """
  leaves, structure = jax.tree.flatten(inputs)
  abstract = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)}

  def run(state: Any, traced: dict[int, Any]) -> None:
    call(state, jax.tree.unflatten(structure, [traced.get(i, x) for i, x in enumerate(leaves)]))

  jax.eval_shape(run, state, abstract)
