"""One layer's arrays, in stacks of those of all layers."""

from __future__ import annotations

from typing import Any

import jax


def count_of(stacks: Any) -> int:
  """The number of layers in a tree of stacks."""
  return jax.tree.leaves(stacks)[0].shape[0]


def take(stacks: Any, k: Any) -> Any:
  """The arrays of layer `k`."""
  return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, k, 0, keepdims=False), stacks)


def put(stacks: Any, new: Any, k: Any) -> Any:
  """`stacks`, the arrays of layer `k` replaced."""

  def one(a, b):
    return jax.lax.dynamic_update_index_in_dim(a, b, k, 0)

  return jax.tree.map(one, stacks, new)
