"""Transformations that cannot be run in the backward pass, known by their state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_lowmem._host_memory.pages import is_paged
from optax_lowmem._steps.loss_scaling import LossScalingState

_SEARCHES = (optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState)
_PROBES = tuple({"w": jax.ShapeDtypeStruct((64, 64), t)} for t in (jnp.bfloat16, jnp.float32))


def check_transformation_now(name: str, tx: optax.GradientTransformation) -> None:
  """`check_state` of the state of a matrix, where `tx` takes one.

  What wants other parameters (masks by path, labels) is checked by `init`.
  """
  for probe in _PROBES:
    try:
      state = jax.eval_shape(tx.init, probe)
    except Exception:  # of a user's own function, any
      continue
    check_state(name, state)


def check_state(name: str, state: Any) -> None:
  """Refuses what would need the gradients of all layers, or the loss elsewhere.

  Raises:
    ValueError: for a state of such a transformation.
  """

  def accumulates(x: Any) -> bool:
    return isinstance(x, optax.MultiStepsState)

  def is_known(x: Any) -> bool:
    return accumulates(x) or isinstance(x, (*_SEARCHES, LossScalingState))

  for x in jax.tree.leaves(state, is_leaf=is_known):
    if accumulates(x):
      raise ValueError(
        f"`{name}` accumulates gradients (`optax.MultiSteps`): that holds the gradients of all "
        "layers from step to step, which an update in the backward pass is there to do without. "
        "Give `step` the whole batch: activations of one layer and the inputs of all are what it "
        "holds; or train with an ordinary step."
      )
    if isinstance(x, LossScalingState):
      raise ValueError(
        f"`{name}` is scaled (`loss_scaling`): whether a step is skipped depends on gradients of "
        "all layers, and one is updated before the next are there. Train in bfloat16, or with an "
        "ordinary step."
      )
    if isinstance(x, _SEARCHES):
      raise ValueError(
        f"`{name}` searches along a line ({type(x).__name__}), for which it computes the loss at "
        "other parameters: a layer's update has only its gradient. Use a schedule, or train with "
        "an ordinary step."
      )


def check_params(params: Any, inputs: Any = None) -> None:
  """Refuses parameters that are not ``{"outer": …, "layers": …}`` with stacks of one length.

  Raises:
    ValueError: if they are not, or `inputs` has another length.
  """
  if not isinstance(params, dict) or set(params) != {"outer", "layers"}:
    what = f"keys {sorted(map(str, params))}" if isinstance(params, dict) else type(params).__name__
    raise ValueError(
      f'`params` must be a dict with the keys "outer" and "layers", got {what}. `layers` holds '
      "the stacked arrays of all layers, and `outer` the rest."
    )
  known, count = "", None
  for name, tree in (("layers", params["layers"]), ("inputs", inputs)):
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
      shape, key = jnp.shape(x), name + jax.tree_util.keystr(path)
      if name == "layers" and not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        raise ValueError(
          f"`{key}` is {jnp.result_type(x)}, and only floats are trained. What a layer needs "
          "besides goes into `inputs`, which `step` takes."
        )
      count, known = (shape[0], key) if count is None and shape else (count, known)
      if not shape or shape[0] != count:
        raise ValueError(
          f"`{key}` must have an axis over the layers first, of length "
          f"{'one a layer' if count is None else f'{count} as `{known}` has'}, got shape {shape}."
        )
  if not count:
    what = "no arrays" if count is None else "no layers, its arrays have a leading axis of 0"
    raise ValueError(f"`params['layers']` has {what}. Train what is not stacked as usual.")


def check_stacked_state(state: Any, count: int) -> None:
  """Refuses a state that is not of so many layers.

  Raises:
    ValueError: if it is not as `init` makes it.
  """
  remedy = "Make it with `init` of what `update_in_backward` returns."
  if not isinstance(state, dict) or set(state) != {"outer", "layers"}:
    raise ValueError(
      f'`state` must be a dict with the keys "outer" and "layers", got {type(state).__name__}. '
      + remedy
    )
  for path, x in jax.tree_util.tree_flatten_with_path(state["layers"], is_leaf=is_paged)[0]:
    shape = x.shape if is_paged(x) else jnp.shape(x)
    if not shape or shape[0] != count:
      raise ValueError(
        f"`state['layers']{jax.tree_util.keystr(path)}` must have an axis over the {count} layers "
        f"first, got shape {shape}. {remedy}"
      )
    if is_paged(x) and not x.last_first:
      raise ValueError(
        f"the page `state['layers']{jax.tree_util.keystr(path)}` is not of layers, the last of "
        f"them first. {remedy[:-1]}, or page it with "
        "`lowmem.paged(lowmem.unpaged(state), like=init(params))`."
      )


def check_loss(loss: Any) -> None:
  """Refuses what is no scalar loss.

  Raises:
    TypeError: if it is none.
  """
  is_scalar = isinstance(loss, jax.Array) and loss.ndim == 0
  if not is_scalar or not jnp.issubdtype(loss.dtype, jnp.floating):
    what = f"{loss.dtype}{list(loss.shape)}" if isinstance(loss, jax.Array) else type(loss).__name__
    raise TypeError(
      f"`head` must return a scalar loss of floats, got {what}. Take the mean over rows, "
      "`loss.mean()`; for a pair `(loss, aux)`, pass `has_aux=True`."
    )
