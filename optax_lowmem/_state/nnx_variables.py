"""Flax NNX keeps arrays in `Variable` boxes; the engine wants the arrays."""

from __future__ import annotations

import sys
from typing import Any

import jax

from optax_lowmem._state.moments import is_quantized


def is_model(x: Any) -> bool:
  """Whether it is an NNX model."""
  nnx = sys.modules.get("flax.nnx")  # who has made a model has imported it
  return nnx is not None and isinstance(x, nnx.Module)


def unbox_quantized(tree: Any) -> Any:
  """`tree` with every `nnx.Variable` that holds a `QuantizedArray` replaced by it.

  `nnx.Optimizer` puts its own box around each array of its state. With codes and scales in one box,
  it would after an update put back a dictionary of the two.
  """
  nnx = sys.modules.get("flax.nnx")
  if nnx is None:
    return tree

  def is_box(x):
    return isinstance(x, nnx.Variable)

  def hoist(x):
    return x.get_value() if is_box(x) and is_quantized(x.get_value()) else x

  return jax.tree.map(hoist, tree, is_leaf=lambda x: is_box(x) or is_quantized(x))
