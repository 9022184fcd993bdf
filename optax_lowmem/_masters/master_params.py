"""The float32 weights of a run with `master_weights`: read, and set."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._arguments.nnx_boxes import unbox
from optax_lowmem._host_memory.paged_state import unpaged
from optax_lowmem._host_memory.pages import is_paged
from optax_lowmem._masters.bits import bits_of, remainder_of, upper
from optax_lowmem._masters.master_weights import MasterWeightsState
from optax_lowmem._masters.remainders import joined, remainders


def master_params(params: Any, state: Any) -> Any:
  """The float32 weights that bfloat16 parameters and a state of `master_weights` stand for.

  For evaluation and export. They are new arrays, of 4 bytes a parameter.

  Args:
    params: the parameters, as they are after the step that gave `state`.
    state: the optimizer's state; the `MasterWeightsState` may be within it.

  Returns:
    A tree like `params`, in float32.

  Raises:
    ValueError: if there is no or more than one `MasterWeightsState` in `state`, or if it was made
      for other parameters.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params = jnp.ones(4, jnp.bfloat16)
    >>> tx = lowmem.master_weights(optax.sgd(1e-4))
    >>> updates, state = tx.update(jnp.ones(4), tx.init(params), params)
    >>> print(lowmem.master_params(optax.apply_updates(params, updates), state))
    [0.9999 0.9999 0.9999 0.9999]
  """
  treedef, pure = jax.tree.structure(params), unbox(params)
  weights = joined(pure, remainders(unpaged(_found(unbox(state))), pure))
  return treedef.unflatten(jax.tree.leaves(weights))


def with_master_params(weights: Any, params: Any, state: Any) -> tuple[Any, Any]:
  """Sets the float32 weights of a run with `master_weights`: the way back from `master_params`.

  To start from weights of float32, as a checkpoint holds them, without losing what bfloat16 does
  not hold; and to put averages or merged weights in their place. With 8 bits they are rounded to
  16 significant bits.

  Args:
    weights: a tree like `params`, in float32.
    params: the parameters, for their dtypes.
    state: the optimizer's state.

  Returns:
    The new parameters and the new state, of which nothing but remainders is new.

  Raises:
    ValueError: as `master_params` does, for weights of another structure or other shapes, and if
      remainders are in host memory.
    TypeError: for weights that are not float32.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> weights = jnp.full(4, 0.1)
    >>> params = weights.astype(jnp.bfloat16)
    >>> tx = lowmem.master_weights(optax.sgd(1e-4))
    >>> params, state = lowmem.with_master_params(weights, params, tx.init(params))
    >>> bool((lowmem.master_params(params, state) == weights).all())
    True
  """
  treedef, pure = jax.tree.structure(params), unbox(params)
  flat = jax.tree_util.tree_flatten_with_path(unbox(weights))[0]
  leaves = jax.tree.leaves(pure)
  if [jnp.shape(w) for _, w in flat] != [jnp.shape(p) for p in leaves]:
    raise ValueError("`weights` must have the structure and the shapes of `params`.")
  for path, w in flat:
    if jnp.result_type(w) != jnp.float32:
      raise TypeError(
        f"`weights` must be float32, got {jnp.result_type(w)} at "
        f"{jax.tree_util.keystr(path) or '()'}."
      )
  ours = _found(unbox(state))
  if any(map(is_paged, jax.tree.leaves(ours.remainder, is_leaf=is_paged))):
    raise ValueError(
      "`state` has remainders in host memory. Set the weights in `lowmem.unpaged(state)`, and page "
      "that with `lowmem.paged(state, like=tx.init(params))`."
    )
  lows = remainders(ours, pure)
  new = [
    (w, None) if r is None else _halves(w, r.dtype) for (_, w), r in zip(flat, lows, strict=True)
  ]

  def replaced(node):
    if not _is_ours(node):
      return node
    kept = iter([low for _, low in new if low is not None])
    return node._replace(remainder=jax.tree.map(lambda _: next(kept), node.remainder))

  state = jax.tree.map(replaced, state, is_leaf=_is_ours)
  return treedef.unflatten([p for p, _ in new]), state


def _halves(w: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
  """A weight as bfloat16 and remainder."""
  pattern = bits_of(jnp.asarray(w))
  if dtype == jnp.int8:
    magnitude = jnp.minimum(pattern & 0x7FFFFFFF, 0x7F7FFF7F)  # the largest that rounds to a finite
    rounded = (pattern & ~0x7FFFFFFF) | ((magnitude + 0x80) & ~0xFF)
    pattern = jnp.where(jnp.isfinite(w), rounded, pattern)
  high = upper(pattern)
  low = remainder_of(pattern, high)
  bits = (high >> 16).astype(jnp.uint16)
  p = jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
  return p, (low >> 8 if dtype == jnp.int8 else low).astype(dtype)


def _is_ours(node: Any) -> bool:
  return isinstance(node, MasterWeightsState)


def _found(state: Any) -> MasterWeightsState:
  """The one `MasterWeightsState` in a state."""
  found = [x for x in jax.tree.leaves(state, is_leaf=_is_ours) if _is_ours(x)]
  if len(found) != 1:
    raise ValueError(
      f"`state` must hold one `MasterWeightsState`, and it holds {len(found)}. Pass that of a "
      "transformation with `master_weights`; of one in parts (`optax.partition`), each part's own."
    )
  return found[0]
