"""Whole states, to host memory and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from optax_lowmem._arguments.nnx_boxes import boxed_as, unbox
from optax_lowmem._host_memory.pages import (
  Paged,
  fetch,
  host_of,
  is_paged,
  split,
  without_page_axes,
)
from optax_lowmem._host_memory.placement import DEVICE, PINNED_HOST


def unpaged(state: Any) -> Any:
  """The state as the transformation within `offloaded` has it: no `Paged`, all on the device.

  Abstract pages (`jax.ShapeDtypeStruct`) become abstract arrays in the same memory: a template by
  which a checkpoint of a run without `offloaded` can be restored straight into host memory.

  Args:
    state: a state of `offloaded`, or any tree that holds one, such as `opt_state` of an
      `nnx.Optimizer`.

  Returns:
    The same tree with arrays in the place of `Paged`; where Flax NNX has boxes around a page's
    arrays, with one around its array.

  Examples:
    >>> import jax.numpy as jnp, optax_lowmem as lowmem
    >>> state = lowmem.offloaded(lowmem.adam(1e-3)).init(jnp.zeros((64, 64)))
    >>> lowmem.unpaged(state)[0].mu.codes.shape
    (64, 64)
  """

  def one(x):
    return boxed_as(_array(unbox(x)), x) if is_paged(x) else x

  return jax.tree.map(one, state, is_leaf=is_paged)


def _array(x: Paged) -> Any:
  """The array of a page, on the device; of an abstract page an abstract one, where it is."""
  if not isinstance(x.lanes[0], jax.ShapeDtypeStruct):
    return fetch(x)
  sharding = x.lanes[0].sharding
  if isinstance(sharding, NamedSharding):
    spec = without_page_axes(sharding.spec)[x.last_first :]
    sharding = sharding.update(spec=PartitionSpec(*spec))
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def paged(state: Any, like: Any = None) -> Any:
  """Puts a state into host memory: one that was there, or, by `like`, one that never was.

  Pages lose their place in host memory by `out_shardings` that do not name it, by pickle and most
  checkpoint libraries, by `jax.device_put`. `update` refuses them then, and ``paged(state)`` puts
  them back, each with its sharding. Call it outside of `jax.jit`: from a page that is on the device
  and donated, JAX would make one on the host, and abort.

  With `like`, it is the reverse of `unpaged`: a state of the inner transformation, paged as `like`
  is.

  Args:
    state: a state of `offloaded`, its pages anywhere, numpy's arrays among them; with `like`, also
      the state of a run without `offloaded`. Of shapes (`jax.ShapeDtypeStruct`) without `like`, the
      shardings name host memory.
    like: a state of `offloaded` of the same run, from `init`.

  Returns:
    The state, its pages in host memory; with the structure, shapes, shardings and memories of
    `like`, if that is given.

  Raises:
    ValueError: if an array has another shape or dtype than that in `like`; without `like`, if there
      are no pages; within `jax.jit`, if a page is on the device.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_lowmem as lowmem
    >>> params = jnp.zeros((64, 64))
    >>> tx = lowmem.adam(1e-3)
    >>> like = lowmem.offloaded(tx).init(params)
    >>> state = lowmem.paged(tx.init(params), like)
    >>> lowmem.state_bytes(state)["pinned_host"]
    8192
    >>> moved = jax.device_put(state, jax.memory.Space.Device)
    >>> lowmem.state_bytes(moved)["pinned_host"]
    0
    >>> lowmem.state_bytes(lowmem.paged(moved))["pinned_host"]
    8192
  """
  if like is None:
    return _put_back(state)

  def one(x, target):
    if x.shape != target.shape or x.dtype != target.dtype:
      raise ValueError(
        f"`state` holds {x.dtype}{list(x.shape)} where `like` has "
        f"{target.dtype}{list(target.shape)}. Both must be of the same parameters and optimizer."
      )
    if not is_paged(target):
      return jax.device_put(x, target.sharding) if isinstance(target, jax.Array) else x
    if is_paged(x) and _form(x) == _form(target):
      lanes = x.lanes
    else:
      lanes = _lanes(fetch(x) if is_paged(x) else x, target)
    pairs = zip(lanes, target.lanes, strict=True)
    lanes = [jax.device_put(lane, wanted.sharding) for lane, wanted in pairs]
    return dataclasses.replace(target, lanes=tuple(map(PINNED_HOST.put, lanes)))

  # Boxes of Flax NNX hide what lies in a page; the result is in those of `like`.
  leaves, treedef = jax.tree.flatten(unbox(like), is_leaf=is_paged)
  given = jax.tree.leaves(unbox(state), is_leaf=is_paged)
  if len(given) != len(leaves):
    raise ValueError(
      f"`state` has {len(given)} arrays and `like` {len(leaves)}. Both must be of the same "
      "parameters and optimizer."
    )
  made = treedef.unflatten(map(one, given, leaves))
  return jax.tree.structure(like).unflatten(jax.tree.leaves(made))


def _put_back(state: Any) -> Any:
  """`state`, its pages in host memory, wherever they are."""
  if not any(map(is_paged, jax.tree.leaves(state, is_leaf=is_paged))):
    raise ValueError(
      "`state` has no pages. Pass `like=tx.init(params)`, which says what is to be paged, with the "
      "`offloaded` transformation `tx`."
    )

  def put(lane):
    if isinstance(lane, jax.ShapeDtypeStruct):
      where = lane.sharding or host_of(jax.local_devices()[0])
      where = where.with_memory_kind(PINNED_HOST.kind)
      return jax.ShapeDtypeStruct(lane.shape, lane.dtype, sharding=where)
    if isinstance(lane, Tracer) and DEVICE.holds(lane):
      raise ValueError(
        "`paged` has met a page on the device within `jax.jit`: donated, it would abort the "
        "process. Call `paged` before."
      )
    return PINNED_HOST.put(lane)

  def one(x):
    return dataclasses.replace(x, lanes=tuple(map(put, x.lanes))) if is_paged(x) else x

  return jax.tree.map(one, state, is_leaf=is_paged)


def _form(page: Paged) -> tuple[int, int, bool]:
  return len(page.lanes), page.axis, page.last_first


def _lanes(x: Any, target: Paged) -> list[Any]:
  """The lanes of an array of any memory, numpy's too, where they can be made."""
  count, shape = len(target.lanes), target.lanes[0].shape
  if isinstance(x, jax.Array):
    x = DEVICE.put(x)  # XLA reshapes nothing on the host
  if target.last_first:
    x = x[::-1]
  if isinstance(x, jax.Array):
    return list(split(x, target.axis)) if count > 1 else [x.reshape(shape)]
  at = (slice(None),) * target.axis
  return [x[(*at, slice(k, None, count))].reshape(shape) for k in range(count)]
