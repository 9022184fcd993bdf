"""`offloaded`: optimizer state that rests in pinned host memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer

from optax_lowmem._boxes import unbox
from optax_lowmem._host import (
  bytes_of,
  check_pool,
  choose,
  devices_of,
  has_host_memory,
  path_test,
  shard_bytes,
)
from optax_lowmem._one_by_one import one_by_one
from optax_lowmem._pages import is_paged, nbytes, store
from optax_lowmem._paging import stream


def offloaded(
  inner: optax.GradientTransformation,
  *,
  min_bytes: int = 4096,
  where: str | Callable[[str], bool] | None = None,
  device_budget: int | str | None = None,
  max_bytes: int | str = "256MiB",
  fallback: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps the state of any optax transformation in pinned host memory ("paged").

  The large arrays of the state rest on the host. An update fetches them parameter by parameter,
  runs `inner` on the device, and puts the new ones back:

  .. math::
    s_t, u_t = \mathrm{inner}(g_t, \mathrm{fetch}(h_{t-1}), p_t), \qquad h_t = \mathrm{store}(s_t).

  The arithmetic is `inner`'s, so results are those of the same run without `offloaded`, but for the
  last bit where XLA multiplies and adds in one step in one program and not in the other. At most
  `max_bytes` of paged state, old and new values together, are on the device at any time, or those
  of the largest parameter if they are more; the next parameters' state is fetched while the
  present one is computed. The bound holds if `inner` treats each parameter's arrays on their own,
  norms included (Adam, Lion, CAME, LAMB, …). Where it needs the state of all parameters at once,
  as a norm over all moments that is then applied to them does, that state is on the device at once.

  A page is a `Paged` with six leading axes of 1: where no shardings are named, JAX would give a
  donated page's memory to a new parameter of its shape, and abort. Donate the state as always.
  Pages are committed to their device, and so is all that a step makes of them: of parameters that
  were not, as fresh ones are, JAX compiles the second step again. To compile once, commit them,
  ``params = jax.device_put(params, jax.devices()[0])``, or lay them on a mesh.

  `unpaged` and `paged` convert the state to and from that of `inner`, for checkpoints of runs
  without `offloaded`.

  Put it outermost, around `optax.MultiSteps`, `optax.apply_if_finite` and the like. Within them it
  works on CPUs; what XLA's GPU backend makes of host memory in the branches of a condition has not
  been measured.

  Args:
    inner: the transformation.
    min_bytes: smaller arrays of the state stay on the device, as scalars do.
    where: which arrays of the state may be paged: a regular expression, searched in their paths
      (``"0/mu/layers/w/codes"``), or a function of the path.
    device_budget: how much of the state may stay on the device, in bytes or as ``"4GB"``,
      ``"512MiB"``; the largest arrays are paged first, and the choice is made once, by `init`.
      Without it, all that may be paged is. Sharded arrays count with their bytes on one device,
      but whole in a traced `init` (`jax.jit`, `jax.eval_shape`) on meshes of automatic axes or
      outside of `jax.set_mesh`.
    max_bytes: most bytes of paged state on the device during an update.
    fallback: ``"device"`` leaves the state on a device that has no pinned host memory; by default
      that is an error.

  Returns:
    The transformation.

  Raises:
    ValueError: for arguments out of range; from `init` on a backend without pinned host memory, and
      on a GPU if the state is larger than the pool of pinned memory.

  Examples:
    >>> import jax.numpy as jnp, optax_lowmem as lowmem
    >>> params = jnp.zeros((256, 256))
    >>> tx = lowmem.offloaded(lowmem.adamw(3e-4, bits=8))
    >>> state = tx.init(params)
    >>> lowmem.state_bytes(state)
    {'device': 4, 'pinned_host': 139264}
    >>> updates, state = tx.update(params, state, params)
  """
  if isinstance(min_bytes, bool) or not isinstance(min_bytes, int) or min_bytes < 0:
    raise ValueError(f"`min_bytes` must be an integer of at least 0, got {min_bytes!r}.")
  if fallback not in (None, "device"):
    raise ValueError(f"`fallback` must be 'device' or None, got {fallback!r}.")
  allowed = path_test(where)
  budget = None if device_budget is None else bytes_of("device_budget", device_budget)
  bound = bytes_of("max_bytes", max_bytes)
  inner = optax.with_extra_args_support(inner)

  def init(params):
    params = unbox(params)
    devices = devices_of(params)
    if not has_host_memory(devices, fallback):
      return inner.init(params)
    state = _init(inner.init, params, bound)
    leaves, treedef = jax.tree.flatten(state, is_leaf=is_paged)
    chosen = choose(state, allowed, min_bytes, budget)
    del state
    here = sum(d.process_index == jax.process_index() for d in devices)
    size = here * sum(shard_bytes(leaves[k]) for k in chosen)
    check_pool(devices[0].platform, size, os.environ)
    for k in sorted(chosen):
      leaves[k] = store(_made(leaves[k]))
    state = jax.tree.map(_made, treedef.unflatten(leaves))
    return _committed(state, devices) if chosen else state

  def update(updates, state, params=None, **extra_args):
    args = updates, state, params, extra_args
    return (compiled if _is_concrete(args) else run)(*args)

  def run(updates, state, params, extra_args):
    out_tree = jax.tree.structure((updates, state), is_leaf=is_paged)
    args = unbox((updates, state, params))
    if not any(map(is_paged, jax.tree.leaves(args[1], is_leaf=is_paged))):
      new = inner.update(*args, **extra_args)
      return out_tree.unflatten(jax.tree.leaves(new))
    count = len(jax.tree.leaves(args[0]))
    # What is no array is not traced: a flag, or the function whose minimum L-BFGS looks for.
    extra, extra_tree = jax.tree.flatten(extra_args)
    numbers = {k: x for k, x in enumerate(extra) if hasattr(x, "dtype")}
    flat = jax.tree.leaves((*args, numbers), is_leaf=is_paged)
    positions = [k for k, x in enumerate(flat) if is_paged(x)]

    def call(updates, state, params, numbers):
      again = extra_tree.unflatten(numbers.get(k, x) for k, x in enumerate(extra))
      return inner.update(updates, state, params, **again)

    def paged_results(shapes):  # what was paged stays so: updates, then state, as among arguments
      if len(jax.tree.leaves(shapes[0])) != count:
        raise ValueError("`offloaded` needs updates with the structure of the gradients.")
      return positions

    results, _ = stream(call, (*args, numbers), positions, paged_results, bound)
    return out_tree.unflatten(results)

  compiled = jax.jit(run)
  return optax.GradientTransformationExtraArgs(init, update)


class _Lazy:
  """An array of a new state that is made when it is needed."""

  def __init__(self, shape: Any, make: Callable[[], jax.Array], device: Any):
    self.shape, self.dtype = shape.shape, shape.dtype
    self._make, self._device = make, device

  def __call__(self) -> jax.Array:
    with jax.default_device(self._device):  # where no parameter says where
      return self._make()


def _init(init: Callable[[Any], Any], params: Any, bound: int) -> Any:
  """`init(params)`; above `bound` bytes, its arrays are made one by one: all may not fit."""
  arrays = [x for x in jax.tree.leaves(params) if hasattr(x, "dtype")]
  if any(isinstance(x, Tracer) or not isinstance(x, jax.Array | np.ndarray) for x in arrays):
    return init(params)
  devices = devices_of(params)
  if len(devices) > 1:  # traced, it would not see how the parameters lie
    return init(params)
  makers, shapes = one_by_one(init, params)
  leaves, treedef = jax.tree.flatten(shapes)
  if sum(map(nbytes, leaves)) <= bound:
    return init(params)
  return treedef.unflatten([_Lazy(*pair, devices[0]) for pair in zip(leaves, makers, strict=True)])


def _made(x: Any) -> Any:
  return x() if isinstance(x, _Lazy) else x


def _committed(state: Any, devices: Sequence[Any]) -> Any:
  """The state with all its arrays committed to the one device where its pages are.

  What a step makes of pages is committed, its count too: were that uncommitted at first, JAX would
  compile the second step anew.
  """

  def commit(x):
    if isinstance(x, Tracer) or not isinstance(x, jax.Array) or set(devices) != x.devices():
      return x
    return jax.device_put(x, x.sharding)

  return jax.tree.map(commit, state) if len(devices) == 1 else state


def _is_concrete(tree: Any) -> bool:
  return all(
    isinstance(x, jax.Array | np.ndarray | float | int) and not isinstance(x, Tracer | bool)
    for x in jax.tree.leaves(tree)
  )
