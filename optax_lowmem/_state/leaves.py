"""Moments as leaves of a state, for `optax.tree.map_params` and `jax.tree.map`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from optax_lowmem._host_memory.paged_state import unpaged
from optax_lowmem._host_memory.pages import is_paged
from optax_lowmem._state.moments import Place, is_quantized, places


def is_stored(x: Any) -> bool:
  """Whether `x` is a moment that is held in another form: a `QuantizedArray` or a `Paged`.

  For the argument `is_leaf` of `optax.tree.map_params` and `jax.tree.map`. A function is then given
  a moment as a whole, and a further tree has a leaf for it. Without it, it would be given codes and
  scales, of which a further tree knows nothing.

  Args:
    x: anything.

  Returns:
    True for a `QuantizedArray`, whose arrays may be paged, and for a `Paged`.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params, labels = {"w": jnp.zeros((64, 64))}, {"w": "rows"}
    >>> tx = lowmem.adam(1e-3)
    >>> state = optax.tree.map_params(
    ...   tx,
    ...   lambda moment, label: f"{label} {moment.shape}",
    ...   tx.init(params),
    ...   labels,
    ...   is_leaf=lowmem.is_stored,
    ... )
    >>> state[0].nu
    {'w': 'rows (64, 64)'}
  """
  return is_quantized(x) or is_paged(x)


def stored_places(state: Any, params: Any) -> Iterator[tuple[Place, Any]]:
  """Each leaf of a state as it is stored, with the parameter that it belongs to.

  Raises:
    ValueError: for a page of what is no array.
  """
  stored = jax.tree.leaves(state, is_leaf=is_stored)
  known = places(unpaged(state) if any(map(holds_pages, stored)) else state, params)
  if len(known) != len(stored):
    raise ValueError("`tx` has a state whose pages cannot be told apart.")
  yield from zip(known, stored, strict=True)


def holds_pages(x: Any) -> bool:
  """Whether there are pages in a tree."""
  return any(map(is_paged, jax.tree.leaves(x, is_leaf=is_paged)))
