"""What a model multiplies by that is no linear layer, said aloud instead of left out in silence."""

from __future__ import annotations

import warnings
from typing import Any

import jax.numpy as jnp
from flax import nnx

from optax_lowmem._linear.names import folded
from optax_lowmem.nn._layers.base_layer import is_known, reading
from optax_lowmem.nn._model.model_tree import ModelTree, Place
from optax_lowmem.nn._proofs.flax_layers import is_no_product


def skipped(tree: ModelTree) -> dict[str, str]:
  """{path: why} of modules with weights of their own that are not known to be linear layers.

  Counted are modules outside flax that have a `__call__`, a matrix, and no module below them, and
  Params with three axes or more (experts, say) wherever they are. A table that is looked up in by
  another method, or a position embedding beside other modules, is neither.
  """
  found = {}
  for place in (Place("", tree.model, []), *tree.places):
    module: Any = place.module
    if place.adapted or ((is_known(module) or is_no_product(module)) and not place.norm):
      continue
    if reading(module).foreign is not None and not place.norm:
      continue
    shapes = [
      tuple(n for n in v.shape if n > 1)
      for v in vars(module).values()
      if isinstance(v, nnx.Param) and jnp.issubdtype(v.dtype, jnp.floating)
    ]
    leaf = sum(1 for _ in nnx.iter_modules(module)) == 1 and callable(module)
    if any(len(shape) >= (2 if leaf else 3) for shape in shapes):
      reason = place.reason or "it has no `__call__`"
      found[place.path or "the model itself"] = f"{type(module).__name__}: {reason}"
  return found


def sentence(found: dict[str, str]) -> str:
  """The same in words, layer numbers folded into a star; nothing if there is nothing."""
  if not found:
    return ""
  short = {folded(path): reason for path, reason in found.items()}
  listed = "; ".join(f"`{path}` ({reason})" for path, reason in short.items())
  return f" Modules with weights that are not known to be linear layers: {listed}."


def warn(function: str, done: str, tree: ModelTree) -> None:
  found = skipped(tree)
  if found:
    warnings.warn(
      f"`{function}` {done}.{sentence(found)} If that is meant, name the others in `targets`.",
      UserWarning,
      stacklevel=3,
    )
