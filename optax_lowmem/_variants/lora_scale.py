"""The numbers of an adapter: what they may be, and the scale that they make."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, SupportsFloat

import jax
import jax.numpy as jnp


def check_numbers(rank: Any, alpha: Any, dropout: Any, *, per_layer: bool = False) -> None:
  """Refuses numbers that mean nothing.

  With `per_layer`, `rank` and `alpha` may have one for each layer of a stack; a rank of 0 then is
  no adapter.
  """
  many = per_layer and isinstance(rank, Sequence)
  ranks, least = (rank, 0) if many else ([rank], 1)
  numbers = [_index(r) for r in ranks]
  if any(n is None or n < least for n in numbers) or not any(numbers):
    raise ValueError(f"`rank` must be an integer of at least 1, got {rank!r}. 8 or 16 is usual.")
  for a in alpha if per_layer and isinstance(alpha, Sequence) else [alpha]:
    if not (_is_number(a) and 0 < float(a) < math.inf):
      raise ValueError(
        f"`alpha` must be a positive number, got {alpha!r}. "
        "The adapter is scaled by alpha / rank; alpha = 2 * rank is usual."
      )
  if not (_is_number(dropout) and 0.0 <= float(dropout) < 1.0):
    raise ValueError(f"`dropout` must be in [0, 1), got {dropout!r}. 0 turns it off.")


def plain_numbers(rank: Any, alpha: Any) -> tuple[Any, Any]:
  """A rank and an alpha, or those of each layer, as Python's numbers, which a file can hold."""

  def number(a):
    return a if isinstance(a, int | float) else float(a)

  def each(fn, x):
    return tuple(map(fn, x)) if isinstance(x, Sequence) else fn(x)

  return each(operator.index, rank), each(number, alpha)


def scale_of(rank: int, alpha: float, use_rslora: bool) -> float:
  """alpha / rank, or alpha / sqrt(rank) with `use_rslora`; 0 where there is no adapter."""
  return 0.0 if rank == 0 else alpha / (math.sqrt(rank) if use_rslora else rank)


def spread(scale: Any, ndim: int) -> Any:
  """A scale, or one for each layer of a stack, to broadcast against an array of that rank."""
  if isinstance(scale, float):
    return scale
  return scale.reshape(scale.shape + (1,) * (ndim - scale.ndim if scale.ndim else 0))


def masked(value: jax.Array, axis: int, ranks: Sequence[int] | None) -> jax.Array:
  """Zero beyond each layer's rank, which the axis counts."""
  if ranks is None:
    return value
  keep = jnp.arange(value.shape[axis]) < jnp.asarray(ranks)[:, None]  # (layers, rank)
  shape = [1] * value.ndim
  shape[0], shape[axis] = keep.shape
  return jnp.where(keep.reshape(shape), value, 0.0)


def _index(r: Any) -> int | None:
  """An integer of Python, NumPy or JAX as one of Python; None if it is none."""
  try:
    return None if isinstance(r, bool) else operator.index(r)
  except TypeError:
    return None


def _is_number(x: Any) -> bool:
  return isinstance(x, SupportsFloat) and not isinstance(x, (bool, str))
