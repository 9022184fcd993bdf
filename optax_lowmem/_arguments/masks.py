"""`quantize_mask`: the parameters whose moments are quantized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._arguments.hyperparameters import is_array


def broadcast_mask(mask: Any, params: Any) -> list[bool]:
  """`quantize_mask` for every parameter."""
  count = len(jax.tree.leaves(params))
  if mask is None or not count:  # as where optax probes a transformation
    return [True] * count
  if callable(mask):
    mask = mask(params)
  try:
    full = jax.tree.map(lambda m, sub: jax.tree.map(lambda _: m, sub), mask, params)
  except ValueError as error:
    raise ValueError(
      "`quantize_mask` must have the structure of the parameters or a prefix of it, got "
      f"{jax.tree.structure(mask)} for {jax.tree.structure(params)}."
    ) from error
  flags = jax.tree.leaves(full)
  if any(map(is_array, flags)):
    raise TypeError(
      "`quantize_mask` must be made of Python bools, got an array. Make the bools of shapes, names "
      "and dtypes, which are known without values."
    )
  return [bool(m) for m in flags]


def check_mask(mask: Any, allowed: Sequence[bool], leaves: Sequence[Any], least: int) -> None:
  """Refuses a mask that was to choose and chooses nothing that is large; a bare False was meant."""
  large = any(math.prod(jnp.shape(p)) >= least for p in leaves)
  if large and not any(allowed) and mask is not False:
    raise ValueError(
      "`quantize_mask` is False for every parameter, so that nothing is quantized. True is "
      "what is quantized. If nothing is to be, pass `bits=32`, or False itself."
    )
