"""Where the bytes of a tree are."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.core import Tracer

from optax_lowmem._host_memory.pages import is_paged
from optax_lowmem._host_memory.placement import DEVICE, PINNED_HOST, PLACEMENTS


def state_bytes(tree: Any) -> dict[str, int]:
  """Counts the bytes of a tree's arrays by the memory they live in.

  Every array counts with the bytes it holds over all devices together: a sharded array once, one
  that is replicated over n devices n times. Shapes without data (`jax.eval_shape`) count as they
  would on one device, in the memory where `offloaded` would have them.

  Args:
    tree: any pytree of arrays, `QuantizedArray`s included: optimizer state, parameters, ….

  Returns:
    ``{"device": bytes, "pinned_host": bytes}``.

  Raises:
    TypeError: if `tree` holds functions: a transformation instead of its state.

  Examples:
    >>> import jax.numpy as jnp, optax_lowmem as lowmem
    >>> params = jnp.zeros((64, 64))
    >>> lowmem.state_bytes(lowmem.adam(1e-3, bits=32).init(params))
    {'device': 32772, 'pinned_host': 0}
    >>> lowmem.state_bytes(lowmem.adam(1e-3, bits=8).init(params))
    {'device': 8708, 'pinned_host': 0}
  """
  count = {placement.kind: 0 for placement in PLACEMENTS}
  leaves = [
    ((PINNED_HOST if is_paged(x) else DEVICE).kind, leaf)
    for x in jax.tree.leaves(tree, is_leaf=is_paged)
    for leaf in jax.tree.leaves(x)
  ]
  for kind, leaf in leaves:
    if not hasattr(leaf, "dtype"):
      if callable(leaf):
        raise TypeError(
          f"`tree` must hold arrays, got a {type(tree).__name__} with a function in it. Of a "
          "transformation, pass the state: `state_bytes(tx.init(params))`."
        )
      continue
    size = math.prod(leaf.shape)
    if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
      size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * len(leaf.sharding.device_set)
      kind = leaf.sharding.memory_kind if leaf.sharding.memory_kind in count else DEVICE.kind
    count[kind] += size * leaf.dtype.itemsize
  return count
