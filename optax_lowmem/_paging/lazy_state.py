"""A new state, of which arrays are made one by one: all may not fit on the device at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from optax_lowmem._host_memory.capacity import devices_of
from optax_lowmem._host_memory.pages import nbytes
from optax_lowmem._programs.outputs import one_by_one
from optax_lowmem._sharding.shards import on_mesh_of


class _Lazy:
  """An array of a new state that is made when it is needed."""

  def __init__(self, shape: Any, make: Callable[[], jax.Array], device: Any):
    self.shape, self.dtype = shape.shape, shape.dtype
    self._make, self._device = make, device

  def __call__(self) -> jax.Array:
    with jax.default_device(self._device):  # where no parameter says where
      return self._make()


def lazy_state(init: Callable[[Any], Any], params: Any, bound: int) -> Any:
  """`init(params)`; above `bound` bytes, its arrays are made one by one: all may not fit."""
  arrays = [x for x in jax.tree.leaves(params) if hasattr(x, "dtype")]
  if any(isinstance(x, Tracer) or not isinstance(x, jax.Array | np.ndarray) for x in arrays):
    return init(params)
  devices = devices_of(params)
  if len(devices) > 1:  # traced, it would not see how the parameters lie
    return _on_all(init(params), arrays)
  makers, shapes = one_by_one(init, params)
  leaves, treedef = jax.tree.flatten(shapes)
  if sum(map(nbytes, leaves)) <= bound:
    return init(params)
  return treedef.unflatten([_Lazy(*pair, devices[0]) for pair in zip(leaves, makers, strict=True)])


def _on_all(state: Any, params: Sequence[Any]) -> Any:
  """`state`, what was made on one device, as a count, being on all those of the parameters' mesh.

  As a page it would be bound to the one.
  """

  def one(x):
    alone = isinstance(x, jax.Array) and len(x.sharding.device_set) == 1
    return on_mesh_of(params, x) if alone else x

  return jax.tree.map(one, state)


def made(x: Any) -> Any:
  """`x`, an array of a `lazy_state`, made."""
  return x() if isinstance(x, _Lazy) else x


def committed(state: Any, devices: Sequence[Any]) -> Any:
  """The state with all its arrays committed to the one device where its pages are.

  What a step makes of pages is committed, its count too: were that uncommitted at first, JAX would
  compile the second step anew.
  """

  def commit(x):
    if isinstance(x, Tracer) or not isinstance(x, jax.Array) or set(devices) != x.devices():
      return x
    return jax.device_put(x, x.sharding)

  return jax.tree.map(commit, state) if len(devices) == 1 else state
