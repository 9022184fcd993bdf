"""What both wrappers do around a transformation of parameters in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._arguments.nnx_boxes import unbox
from optax_lowmem._host_memory.pages import is_paged
from optax_lowmem._masters.bits import reach
from optax_lowmem._programs.elementwise import NotElementwise
from optax_lowmem._quantization.positions import indices
from optax_lowmem._state.gradients import check_gradients
from optax_lowmem._update.engine import in_phases_on_gpus, update_elementwise
from optax_lowmem._update.whole_arrays import as_arrays


def check_parameters(wrapper: str, params: Any) -> None:
  """Refuses parameters that are neither bfloat16 nor float32, or of which none is bfloat16.

  Raises:
    TypeError: if there are such.
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  for path, p in leaves:
    if (dtype := jnp.result_type(p)) not in (jnp.bfloat16, jnp.float32):
      raise TypeError(
        f"parameter {jax.tree_util.keystr(path) or '()'} has dtype {dtype}, but `{wrapper}` takes "
        "bfloat16, and float32, which it leaves as it is. Convert the parameter, or leave it out "
        "with `optax.masked` or `optax.partition`."
      )
  if leaves and not any(jnp.result_type(p) == jnp.bfloat16 for _, p in leaves):
    raise TypeError(
      f"no parameter is bfloat16, so there is nothing for `{wrapper}` to do. Convert the "
      "parameters, `jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)`, or leave the wrapper "
      f"out. If it is within `quantized`, which shows it float32, swap the two: "
      f"`{wrapper}(quantized(…))`."
    )


def check_update(wrapper: str, grads: Any, params: Any) -> None:
  """Refuses an update without parameters, or with gradients that do not fit them.

  Raises:
    ValueError: if they are missing or of other shapes.
    TypeError: if they are of other dtypes.
  """
  if params is None:
    raise ValueError(
      f"`{wrapper}` needs the parameters: `tx.update(grads, state, params)`, not without `params`."
    )
  check_gradients(grads, params)
  check_parameters(wrapper, params)


def in_float32(tree: Any) -> Any:
  """Floating leaves in float32; of shapes, shapes."""

  def cast(x):
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
      return x
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
    return jnp.asarray(x, jnp.float32)

  return jax.tree.map(cast, tree)


def is_narrow(p: Any) -> bool:
  """Whether a parameter is bfloat16."""
  return jnp.result_type(p) == jnp.bfloat16


def update_narrow(
  rule: Callable[..., tuple[Any, Any]],
  grads: Any,
  state: Any,
  params: Any,
  extra_args: dict[str, Any],
  indexed: bool,
) -> tuple[Any, Any]:
  """The updates that take parameters in bfloat16 to where `rule` wants them, and the new state.

  If the whole of `rule` is elementwise, what is within it too, all of it is done in the pass that
  updates the moments: a kernel, or tiles. If GPUs compute a part of it in phases, as CAME, they
  so compute all of it. Else its parts are updated, and one parameter at a time is in float32 in
  between.

  Args:
    rule: of gradients and parameters in float32, a state with its moments decoded, indices by
      number of the parameter, and, by name, `extra_args`; it returns for each parameter in bfloat16
      a float32 that one equals, for others the update, and the new state. It may also be given the
      state and the parameters as they are.
    grads, state, params, extra_args: its arguments.
    indexed: whether it needs indices.
  """

  def in_parts(grads, state, params, extra_args):
    leaves, treedef = jax.tree.flatten(params)
    narrow = [k for k, p in enumerate(leaves) if is_narrow(p)]
    index = {k: indices(leaves[k].shape) for k in narrow} if indexed else {}
    targets, state = rule(in_float32(grads), state, params, index, **extra_args)
    updates = jax.tree.leaves(targets)
    for k in narrow:
      updates[k] = reach(leaves[k], updates[k])
    return treedef.unflatten(updates), state

  grads, state, params = map(as_arrays, (grads, state, params))
  if not any(map(_stays_as_it_is, jax.tree.leaves(state, is_leaf=is_paged))):
    try:
      return update_elementwise(rule, grads, state, params, extra_args, reach, indexed)
    except NotElementwise as reason:
      if reason.by_phases:
        return in_phases_on_gpus(in_parts, grads, state, params, extra_args)
  return in_parts(grads, state, params, extra_args)


def _stays_as_it_is(x: Any) -> bool:
  """Whether the engine would not give back what the rule made: pages, floats not of 32 bits."""
  return is_paged(x) or (jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != jnp.float32)


def boxed_alike(run: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
  """`run` of trees without the boxes of Flax NNX; its results are in the boxes of the arguments."""

  def update(updates, state, params, extra_args):
    out_tree = jax.tree.structure((updates, state))
    new = run(unbox(updates), unbox(state), unbox(params), extra_args)
    return out_tree.unflatten(jax.tree.leaves(new))

  return update
