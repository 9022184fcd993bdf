"""What `quantized` asks of the transformation within, as far as its state shows it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._host_memory.pages import is_paged, is_to_page
from optax_lowmem._quantization.storage import Storage
from optax_lowmem._state.leaves import is_stored
from optax_lowmem._state.moments import Place, field_of, is_of_optax, is_quantized


def check_dense(state: Any) -> None:
  """Refuses an inner state in which something is quantized or paged already."""
  for path, x in jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_kept)[0]:
    if is_quantized(x):
      raise ValueError(
        f"`inner` holds {jax.tree_util.keystr(path)} quantized already. Leave `quantized` out, "
        "or wrap only what holds float32: `quantized(optax.adamw(…))`."
      )
    if is_paged(x) or is_to_page(x):
      raise ValueError(
        "`inner` keeps its state in host memory, where it cannot be quantized. Swap the two: "
        "`offloaded(quantized(tx, …))`."
      )


def _is_kept(x: Any) -> bool:
  return is_stored(x) or is_to_page(x)


def check_dtypes(
  shaped: Sequence[Any], moments: Sequence[Place], storages: Sequence[Storage | None]
) -> None:
  """Refuses a dtype that `inner` was given for a moment which is held in another way."""
  for value, moment, storage in zip(shaped, moments, storages, strict=True):
    # Parameters are shown to it in float32: another dtype was asked for.
    if storage is None or value.dtype == jnp.float32:
      continue
    form = jax.eval_shape(storage.store, jax.ShapeDtypeStruct(value.shape, jnp.float32))
    if is_quantized(form) or form.dtype != value.dtype:
      name, dtype = field_of(moment), value.dtype.name
      raise ValueError(
        f"`inner` was given the dtype {dtype} for its moment {name!r}, which is to be held in "
        "another way: a quantized moment has no dtype. Leave the dtype out, pass `bits=32`, or "
        f"give the moment a storage: `storage={{{name!r}: Dense(jnp.{dtype})}}`."
      )


def check_fields(storage: Mapping[str, Storage], fields: set[str | None]) -> None:
  """Refuses a storage for a field that the state does not have."""
  known = sorted(f for f in fields if f)
  for name in storage:
    if name not in known:
      raise ValueError(
        f"`storage` names the field {name!r}; this state has {', '.join(known) or 'none'}."
      )


def warn_if_unknown(
  state: Any,
  moments: Sequence[Place],
  allowed: Sequence[bool],
  params: Sequence[Any],
  min_size: int,
) -> None:
  """Warns of a state with floats that are large enough to be quantized, of which none is."""
  sizes = [math.prod(jnp.shape(p)) for p in params]
  unknown = [
    m
    for m, x in zip(moments, jax.tree.leaves(state), strict=True)
    if m.owner is not None and allowed[m.owner] and sizes[m.owner] >= min_size and field_of(m)
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  fields = sorted({str(field_of(m)) for m in unknown})
  if not fields:
    _warn_if_shapeless(state, moments, sum(sizes), min_size)
    return
  names, others = ", ".join(fields), [m for m in unknown if not is_of_optax(state, m)]
  why = f"what optax keeps as {names} is left as it is, see docs/transformations.md."
  if others:
    named = ", ".join(f'"{name}": Blockwise("power8")' for name in fields[:3])
    why = (
      f"its fields {names} are not known to be moments. Name those that are, "
      f'`storage={{{named}}}`, and give Blockwise("power8_unsigned") to what is never negative.'
    )
  warnings.warn(f"nothing of this state is quantized: {why}", stacklevel=3)


def _warn_if_shapeless(state: Any, moments: Sequence[Place], total: int, min_size: int) -> None:
  """Warns of floats as large as parameters but of no parameter's shape; nothing is quantized."""
  shapes = [
    x.shape
    for m, x in zip(moments, jax.tree.leaves(state), strict=True)
    if m.owner is None and jnp.issubdtype(x.dtype, jnp.floating)
    if math.prod(x.shape) >= min_size
  ]
  # Rows and columns of factored moments are far fewer.
  if not shapes or 2 * sum(map(math.prod, shapes)) < total:
    return
  # `optax.flatten` shows its rule all parameters as one vector.
  why = "its large arrays have the shape of no parameter, see docs/transformations.md."
  if all(shape == (total,) for shape in shapes):
    why = (
      "it is of all parameters in one array, as `optax.flatten` has them. Swap the two: "
      "`optax.flatten(lowmem.quantized(tx))`."
    )
  warnings.warn(f"nothing of this state is quantized: {why}", stacklevel=4)
