"""Whether gradients fit what they are given with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._arguments.nnx_boxes import unbox
from optax_lowmem._state.moments import is_quantized


def check_gradients(grads: Any, params: Any) -> None:
  """Refuses gradients of another structure or other shapes than the parameters.

  Arithmetic would broadcast them, and moments that are found by path and shape would not be found.

  Raises:
    ValueError: if they differ.
  """
  if params is None:
    return
  ours, theirs = _shapes(grads), _shapes(params)
  if ours == theirs:
    return
  for path, shape in theirs.items():
    if path not in ours:
      what = f"parameter {path} of shape {shape} has no gradient"
    elif ours[path] != shape:
      what = f"the gradient of {path} has shape {ours[path]}, and the parameter {shape}"
    else:
      continue
    raise ValueError(f"{what}. `updates` must have the structure and the shapes of `params`.")
  more = next(path for path in ours if path not in theirs)
  raise ValueError(
    f"the gradient {more} has no parameter. `updates` must have the structure and the shapes of "
    "`params`."
  )


def check_moments(leaves: Sequence[Any], owners: Sequence[int | None]) -> None:
  """Refuses a state with a quantized moment that belongs to none of the gradients.

  Raises:
    ValueError: if there is one.
  """
  for leaf, owner in zip(leaves, owners, strict=True):
    if is_quantized(leaf) and owner is None:
      raise ValueError(
        f"the state has a moment of shape {leaf.shape} for which `updates` has no gradient of that "
        "shape. Pass gradients of the structure and the shapes that `init` was given."
      )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(unbox(tree))
  return {jax.tree_util.keystr(path) or "()": jnp.shape(leaf) for path, leaf in leaves}
