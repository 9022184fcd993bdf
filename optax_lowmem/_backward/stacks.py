"""One layer's arrays, in stacks of those of all layers.

A stack in host memory is the lane of a page that is `last_first`: the backward pass comes to the
layers in that order, and a layer's index into host memory has to be the number of the loop's trip,
by which XLA works out where to copy from. docs/xla_notes.md#trip
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from optax_lowmem._host_memory.pages import without_page_axes
from optax_lowmem._host_memory.placement import DEVICE, placement_of


def count_of(stacks: Any) -> int:
  """The number of layers in a tree of stacks."""
  return jax.tree.leaves(stacks)[0].shape[0]


def take(stacks: Any, k: Any) -> Any:
  """The arrays of layer `k`."""
  return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, k, 0, keepdims=False), stacks)


def take_apart(stacks: Any, k: Any) -> Any:
  """`take` in a loop that puts something in the place of what is taken.

  XLA's CPU backend would read the stack once more for each use, and copy all of it in every trip so
  that it can: 39 gradients of a layer for AdamW of 12 layers, and not 3.6. It heeds no barrier, but
  does not look into a condition that it cannot decide.
  """

  def of_cpu(stacks, k):
    return jax.lax.cond(k >= 0, lambda a: take(a, k), lambda a: take(a, 0), stacks)

  return jax.lax.platform_dependent(stacks, k, cpu=of_cpu, default=take)


def put(stacks: Any, new: Any, k: Any) -> Any:
  """`stacks`, the arrays of layer `k` replaced."""

  def one(a, b):
    return jax.lax.dynamic_update_index_in_dim(a, b, k, 0)

  return jax.tree.map(one, stacks, new)


def fetch(lane: Any, i: Any) -> Any:
  """What a page's lane has for trip `i`, on the device."""
  shape = without_page_axes(lane.shape)[2:]
  extent = (*lane.shape[: -len(shape) - 1], 1, *shape)

  def cut(lane, i):
    return jax.lax.dynamic_slice(lane, _index(lane, shape, i), extent)

  def of_cpu(lane, i):  # as in `take_apart`
    return jax.lax.cond(i >= 0, lambda a: cut(a, i), lambda a: cut(a, 0), lane)

  return DEVICE.put(jax.lax.platform_dependent(lane, i, cpu=of_cpu, default=cut)).reshape(shape)


def store(lane: Any, new: Any, i: Any) -> Any:
  """A page's lane, what it has for trip `i` replaced."""
  extent = (1,) * (lane.ndim - new.ndim) + new.shape
  there = placement_of(lane).put(new.reshape(extent))
  return jax.lax.dynamic_update_slice(lane, there, _index(lane, new.shape, i))


def _index(lane: Any, shape: Sequence[int], i: Any) -> tuple[Any, ...]:
  return (*(0,) * (lane.ndim - len(shape) - 1), i, *(0,) * len(shape))
