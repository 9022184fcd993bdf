"""Flax NNX keeps arrays in `Variable` boxes: out of them, and back into them."""

from __future__ import annotations

import sys
from typing import Any

import jax


def unbox(tree: Any) -> Any:
  """`tree` with every `nnx.Variable` replaced by its value."""
  # Where flax was never imported there are no variables, and it need not be installed.
  nnx = sys.modules.get("flax.nnx")
  return tree if nnx is None else nnx.as_pure(tree)


def boxed_as(value: Any, parts: Any) -> Any:
  """`value`, made of all of `parts`, in a box like the first that these lie in, if they do."""
  nnx = sys.modules.get("flax.nnx")
  if nnx is None:
    return value
  found = jax.tree.leaves(parts, is_leaf=lambda x: isinstance(x, nnx.Variable))
  box = next((x for x in found if isinstance(x, nnx.Variable)), None)
  return value if box is None else box.replace(value)
