"""Checks of arguments, made at construction."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.core import Tracer


def check(name: str, value: Any, holds: Callable[[Any], bool], what: str) -> None:
  """Raises unless `value` is None or `holds`."""
  # A traced value is a hyperparameter that `optax.inject_hyperparams` has put in the state.
  if value is not None and not isinstance(value, Tracer) and not holds(value):
    raise ValueError(f"`{name}` must be {what}, got {value}.")


def check_block_size(block_size: int) -> int:
  """Returns `block_size` as an int, or raises if it is not a positive even number."""
  try:
    size = operator.index(block_size)
  except TypeError:
    size = 0
  if size < 2 or size % 2:
    raise ValueError(
      f"`block_size` must be a positive multiple of 2, got {block_size!r}. Typical: 64 or 256."
    )
  return size


def check_min_size(min_size: int) -> None:
  """Raises if `min_size` is no number or negative."""
  if not isinstance(min_size, int | float | np.number):
    raise ValueError(f"`min_size` must be a number, got {min_size!r}. Pass 0 for no limit.")
  if min_size < 0:
    raise ValueError(f"`min_size` must not be negative, got {min_size}. Pass 0 for no limit.")


def check_transformation(name: str, tx: Any) -> None:
  """Raises unless `tx` has the two methods of a transformation."""
  methods = getattr(tx, "init", None), getattr(tx, "update", None)
  if isinstance(tx, type) or not all(map(callable, methods)):
    what = type(tx).__name__
    if callable(tx):
      what = f"the function `{getattr(tx, '__name__', what)}`"
    hint = f" Call it first: `{tx.__name__}(…)`." if hasattr(tx, "__name__") else ""
    raise TypeError(f"`{name}` must be an optax transformation, got {what}.{hint}")
