"""What bfloat16 parameters lack of their float32 masters, as trees: made, joined, set."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_lowmem._masters.bits import join
from optax_lowmem._masters.wrapped import in_float32, is_narrow
from optax_lowmem._sharding.shards import full_on_shards

DTYPES = {16: jnp.int16, 8: jnp.int8}


def zeros(params: Any, dtype: Any) -> Any:
  """Remainders of nothing: a tree like the parameters, each sharded as its parameter."""

  def one(p):
    if not is_narrow(p):
      return optax.MaskedNode()
    form = jax.ShapeDtypeStruct(jnp.shape(p), dtype)
    return full_on_shards(p, form, [jnp.zeros((), dtype)])

  return jax.tree.map(one, params)


def remainders(state: Any, params: Any, dtype: Any = None) -> list[jax.Array | None]:
  """The remainder of each parameter, None of those in float32.

  Args:
    state: a `MasterWeightsState`.
    params: the parameters.
    dtype: that the remainders are to have; None for either.

  Raises:
    ValueError: if they are not those of such parameters.
  """
  found = jax.tree.leaves(state.remainder, is_leaf=_is_none)
  # What a mask leaves out is among both.
  leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_none)
  if len(found) != len(leaves):
    raise ValueError(
      f"the state has remainders of {len(found)} parameters, and there are {len(leaves)}. Make it "
      "with `tx.init(params)`."
    )
  allowed = DTYPES.values() if dtype is None else [dtype]
  pairs = [(*leaf, low) for leaf, low in zip(leaves, found, strict=True) if not _is_none(leaf[1])]
  for path, p, low in pairs:
    narrow = is_narrow(p)
    if narrow and (_is_none(low) or low.dtype not in allowed or low.shape != p.shape):
      held = "none" if _is_none(low) else f"{low.dtype}{list(low.shape)}"
      raise ValueError(
        f"the remainder of {jax.tree_util.keystr(path) or '()'} is {held}, and is to be "
        f"{' or '.join(jnp.dtype(d).name for d in allowed)}{list(p.shape)}: the state was made "
        "with other `bits` or for parameters of other dtypes or shapes."
      )
    if not narrow and not _is_none(low):
      raise ValueError(
        f"the state has a remainder of {jax.tree_util.keystr(path) or '()'}, which is "
        f"{jnp.result_type(p)}: it was made when the parameter was bfloat16. Make it anew with "
        "`tx.init(params)`."
      )
  return [None if _is_none(low) else low for _, _, low in pairs]


def aligned(state: Any, params: Any) -> list[jax.Array | None]:
  """`remainders` of a state that is known to fit; parameters may be given in float32."""
  found = jax.tree.leaves(state.remainder, is_leaf=_is_none)
  # What a mask leaves out is among both.
  leaves = jax.tree.leaves(params, is_leaf=_is_none)
  pairs = zip(leaves, found, strict=True)
  return [None if _is_none(low) else low for p, low in pairs if not _is_none(p)]


def joined(params: Any, lows: list[jax.Array | None]) -> Any:
  """The float32 weights that parameters and their remainders stand for."""
  leaves, treedef = jax.tree.flatten(params)
  pairs = zip(leaves, lows, strict=True)
  return treedef.unflatten([in_float32(p) if low is None else join(p, low) for p, low in pairs])


def _is_none(x: Any) -> bool:
  return isinstance(x, optax.MaskedNode)
