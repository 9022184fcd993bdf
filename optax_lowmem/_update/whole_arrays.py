"""One update of a whole state, in float32 throughout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._programs.leaf_plan import decoded
from optax_lowmem._quantization.array import encode_finite, finite_or
from optax_lowmem._quantization.scales import healed
from optax_lowmem._state.gradients import check_gradients
from optax_lowmem._state.moments import is_quantized, places


def update_dense(
  update: Callable[..., Any], grads: Any, state: Any, params: Any, extra_args: dict[str, Any]
) -> tuple[Any, Any]:
  """Runs `update` on a state that is held as the rule made it, from float32 parameters."""
  grads, params = as_arrays(grads), as_arrays(params)
  check_gradients(grads, params)
  updates, state = update(_to_float32(grads), state, _to_float32(params), **extra_args)
  return _as_updates(updates, grads, params), state


def update_whole(update, grads, state, params, extra_args):
  """Decodes everything, updates, encodes everything: right for any transformation."""
  dense = jax.tree.map(_decode_narrow, _healed(state, grads), is_leaf=is_quantized)
  updates, new = update_dense(update, grads, dense, params, extra_args)
  return updates, jax.tree.map(
    _encode_like,
    state,
    new,
    dense,
    is_leaf=is_quantized,
  )


def _healed(state: Any, grads: Any) -> Any:
  """`state` with `healed` moments, parameter by parameter."""
  leaves, treedef = jax.tree.flatten(state, is_leaf=is_quantized)
  members: dict[int | None, list[int]] = {}
  for k, place in enumerate(places(state, grads)):
    if is_quantized(leaves[k]):
      members.setdefault(place.owner, []).append(k)
  for same in members.values():
    for k, x in zip(same, healed([leaves[k] for k in same]), strict=True):
      leaves[k] = x
  return treedef.unflatten(leaves)


def _as_updates(updates: Any, grads: Any, params: Any) -> Any:
  """`updates` in the dtypes of `update_dtypes`."""
  flat, treedef = jax.tree.flatten(updates)
  dtypes = update_dtypes(grads, params)
  return treedef.unflatten([u.astype(d) for u, d in zip(flat, dtypes, strict=True)])


def update_dtypes(grads: Any, params: Any) -> list[Any]:
  """The dtype of each update: the wider of gradient's and parameter's."""
  dtypes = [g.dtype for g in jax.tree.leaves(grads)]
  if params is None:
    return dtypes
  params = jax.tree.leaves(params)
  return [jnp.promote_types(d, p.dtype) for d, p in zip(dtypes, params, strict=True)]


def as_arrays(tree: Any) -> Any:
  """Python numbers among the leaves as arrays: a parameter may be one."""
  return jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), tree)


def _to_float32(tree: Any) -> Any:
  """Floating leaves in float32: arithmetic in bf16 would stall a moment with b2 = 0.999."""

  def cast(x):
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

  return jax.tree.map(cast, tree)


def _decode_narrow(stored: Any) -> jax.Array:
  """Quantized arrays and those of 16 or 8 bits in float32, others as they are."""
  dtype = stored.dtype
  narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
  return decoded(stored) if narrow or is_quantized(stored) else stored


def _encode_like(stored: Any, value: jax.Array, old: jax.Array) -> Any:
  """A value in the form of `stored`; what is not finite is, if quantized, not new."""
  if not is_quantized(stored):
    return value.astype(stored.dtype)
  return encode_finite(finite_or(value, old), stored.codebook, stored.block, old)
