"""`offloaded`: optimizer state in pinned host memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from optax_lowmem._arguments.checks import check_transformation
from optax_lowmem._arguments.nnx_boxes import unbox
from optax_lowmem._arguments.sizes import bytes_of
from optax_lowmem._host_memory.capacity import (
  check_on_host,
  check_pool,
  check_where,
  choose,
  devices_of,
  has_host_memory,
  path_test,
  shard_bytes,
)
from optax_lowmem._host_memory.pages import (
  ToPage,
  as_typed,
  is_paged,
  is_to_page,
  lane_axis,
  store,
)
from optax_lowmem._host_memory.placement import DEVICE
from optax_lowmem._paging.lazy_state import committed, lazy_state, made
from optax_lowmem._paging.stacked import stack_of_layers
from optax_lowmem._paging.stream import stream
from optax_lowmem._paging.surroundings import check_keeps_memory, check_outermost, in_eval_shape
from optax_lowmem._state.gradients import check_gradients
from optax_lowmem._state.leaves import is_stored
from optax_lowmem._state.moments import is_quantized
from optax_lowmem._update.extra_args import compiled_outside_jit, split


def offloaded(
  inner: optax.GradientTransformation,
  *,
  min_bytes: int = 4096,
  where: str | Callable[[str], bool] | None = None,
  device_budget: int | str | None = None,
  max_bytes: int | str = "256MiB",
  fallback: Literal["device"] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps the state of any optax transformation in pinned host memory ("paged").

  The large arrays of the state rest on the host. An update fetches them parameter by parameter,
  runs `inner` on the device, and puts the new ones back:

  .. math::
    s_t, u_t = \mathrm{inner}(g_t, \mathrm{fetch}(h_{t-1}), p_t), \qquad h_t = \mathrm{store}(s_t).

  The arithmetic is `inner`'s, so results are those of the same run without `offloaded`, but for the
  last bit where XLA multiplies and adds in one step in one program and not in the other.

  Where each element of a parameter's new state is made of the same element of the old (Adam, Lion,
  and what is around them), which is proved, or of those of its block, as in the updates of
  `quantized`, a few rows are on the device at a time, in a loop for each parameter: at most
  `max_bytes` of paged state, old and new values together, however large an array is. One part is
  fetched while another is computed and a third stored. Each parameter is updated as soon as its
  gradient is there. What a norm or a mean is taken of, as the factors of CAME and Adafactor are, is
  fetched whole. On several GPUs this holds on meshes of explicit axes; on automatic ones all of the
  state is fetched at once.

  A `Paged` holds an array in one host array or in two, between which its rows alternate, with six
  leading axes of 1: where no shardings are named, JAX would give a donated page's memory to a new
  parameter of its shape, and abort. Donate the state as always.
  Pages are committed to their device, and so is all that a step makes of them: of parameters that
  were not, as fresh ones are, JAX compiles the second step again. To compile once, commit them,
  ``params = jax.device_put(params, jax.devices()[0])``, or lay them on a mesh.

  `unpaged` and `paged` convert the state to and from that of `inner`, for checkpoints of runs
  without `offloaded`.

  In `update_in_backward` the whole state of a parameter in one layer is fetched at a time, on
  meshes of automatic axes too: a layer's is the bound, and not `max_bytes`. There `min_bytes` and
  `where` are asked of a layer's arrays, and `device_budget` is for those of all layers.

  Put it outermost, around `optax.MultiSteps`, `optax.apply_if_finite` and
  `optax.conditionally_transform`; within them it refuses to work. Their choice is then part of the
  loop: of a condition both sides are computed, and one is stored.

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
    TypeError: if `inner` is no transformation.
    ValueError: for arguments out of range; from `init` if `where` names nothing, on a backend
      without pinned host memory, and on a GPU if the state is larger than the pool of pinned
      memory; from both within `optax.MultiSteps` and the like, `jax.pmap`, or a `jax.shard_map`
      that is not compiled; from `update` if `inner` has a callback with `ordered=True`, or if pages
      are not in host memory, where `lowmem.paged(state)` puts them back.

  Examples:
    >>> import jax.numpy as jnp, optax_lowmem as lowmem
    >>> params = jnp.zeros((256, 256))
    >>> tx = lowmem.offloaded(lowmem.adamw(3e-4, bits=8))
    >>> state = tx.init(params)
    >>> lowmem.state_bytes(state)
    {'device': 4, 'pinned_host': 139264}
    >>> updates, state = tx.update(params, state, params)
  """
  check_transformation("inner", inner)
  if isinstance(min_bytes, bool) or not isinstance(min_bytes, int) or min_bytes < 0:
    raise ValueError(f"`min_bytes` must be an integer of at least 0, got {min_bytes!r}.")
  if fallback not in (None, DEVICE.kind):
    raise ValueError(f"`fallback` must be 'device' or None, got {fallback!r}.")
  allowed = path_test(where)
  budget = None if device_budget is None else bytes_of("device_budget", device_budget)
  bound = bytes_of("max_bytes", max_bytes)
  inner = optax.with_extra_args_support(inner)

  def init(params):
    params = unbox(params)
    stack = stack_of_layers()
    devices = devices_of(params) if stack is None else stack.devices
    if not has_host_memory(devices, fallback):
      return inner.init(params)
    check_outermost()
    check_keeps_memory(params)
    state = lazy_state(inner.init, params, bound)
    if stack is not None:
      # What is marked by one within this is a page already.
      leaves, treedef = jax.tree.flatten(state, is_leaf=is_to_page)
      known = treedef.unflatten([None if is_to_page(x) else x for x in leaves])
      positions = [k for k, x in enumerate(leaves) if not is_to_page(x)]
      check_where(where, allowed, known)
      for k in choose(known, allowed, min_bytes, budget, stack.count):
        leaves[positions[k]] = ToPage(leaves[positions[k]])
      return treedef.unflatten(leaves)
    leaves, treedef = jax.tree.flatten(state, is_leaf=is_paged)
    check_where(where, allowed, state)
    chosen = choose(state, allowed, min_bytes, budget)
    axes = _lane_axes(state)
    del state
    here = sum(d.process_index == jax.process_index() for d in devices)
    size = here * sum(shard_bytes(leaves[k]) for k in chosen)
    check_pool(devices[0].platform, size, os.environ)
    for k in sorted(chosen):
      leaves[k] = store(made(leaves[k]), axes[k])
    state = jax.tree.map(made, treedef.unflatten(leaves))
    return committed(state, devices) if chosen else state

  def update(updates, state, params=None, **extra_args):
    return compiled(updates, state, params, extra_args)

  def run(updates, state, params, extra_args):
    out_tree = jax.tree.structure((updates, state), is_leaf=is_paged)
    args = unbox((updates, state, params))
    if not any(map(is_paged, jax.tree.leaves(args[1], is_leaf=is_paged))):
      stack = stack_of_layers()
      if stack is None or not stack.paged:
        warn_if_unpaged(args, stack)
      new = inner.update(*args, **extra_args)
      return out_tree.unflatten(jax.tree.leaves(new))
    check_outermost()
    check_keeps_memory(args)
    check_gradients(updates, params)
    if any(is_paged(x) and x.last_first for x in jax.tree.leaves(args[1], is_leaf=is_paged)):
      raise ValueError(
        "`state` is of `update_in_backward`: its pages hold the last layer first. For an ordinary "
        "step, lay them out anew: `lowmem.paged(lowmem.unpaged(state), like=tx.init(params))`."
      )
    shapes_only = in_eval_shape()
    if not shapes_only:
      check_on_host(args[1])
    count = len(jax.tree.leaves(args[0]))
    numbers, fixed = split(extra_args)
    flat = jax.tree.leaves((*args, numbers), is_leaf=is_paged)
    positions = [k for k, x in enumerate(flat) if is_paged(x)]

    def call(updates, state, params, numbers):
      return inner.update(updates, state, params, **fixed.joined(numbers))

    def paged_results(shapes):  # what was paged stays so: updates, then state, as among arguments
      if len(jax.tree.leaves(shapes[0])) != count:
        raise ValueError("`offloaded` needs updates with the structure of the gradients.")
      return positions

    results, _ = stream(call, (*args, numbers), paged_results, count, bound)
    if shapes_only:  # what JAX keeps of it must not abort when it is called with pages elsewhere
      results = [as_typed(x, flat[k]) if is_paged(x) else x for k, x in enumerate(results)]
    return out_tree.unflatten(results)

  def warn_if_unpaged(args, stack):
    """Warns of a state without pages, where `init` would have made some."""
    devices = devices_of(args)
    # Of shards, what is large enough is known to `init` only.
    if len(devices) > 1 or jax.device_count() > 1 or not has_host_memory(devices, fallback):
      return
    layers, init_of = (1, "tx.init") if stack is None else (stack.count, "init")
    whose = "" if stack is None else ", with that of `update_in_backward`"
    if choose(args[1], allowed, min_bytes, budget, layers):
      warnings.warn(
        "the state has no pages, so that all of it stays on the device. Page it once with "
        f"`lowmem.paged(state, like={init_of}(params))`{whose}.",
        stacklevel=2,
      )

  compiled = compiled_outside_jit(run)
  return optax.GradientTransformationExtraArgs(init, update)


def _lane_axes(state: Any) -> list[int | None]:
  """For each leaf, the axis by which it is dealt out; for codes and scales it is the same."""

  def axis(x, of):
    found = lane_axis(of.shape, len(of.block)) if is_quantized(of) else lane_axis(x.shape)
    alike = found is None or x.shape[: found + 1] == of.shape[: found + 1]
    return found if alike else lane_axis(x.shape)

  axes: list[int | None] = []
  for x in jax.tree.leaves(state, is_leaf=is_stored):
    parts = jax.tree.leaves(x, is_leaf=is_paged)
    axes += [axis(part, x) if hasattr(part, "shape") else None for part in parts]
  return axes
