"""What is checked of every layer before the first of a model is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from optax_lowmem.nn._layers.base_layer import is_embed, is_linear
from optax_lowmem.nn._model.head_names import HEAD
from optax_lowmem.nn._model.heads import output_heads
from optax_lowmem.nn._model.places import Place, listing, matches, nearest, patterns


def check_model(model: Any) -> None:
  """Refuses what holds no layers, or shapes in place of arrays."""
  if not isinstance(model, nnx.Pytree):
    raise TypeError(
      f"`model` must be an nnx.Module, got {type(model).__name__}. For Flax Linen there is "
      "`optax_lowmem.linen`."
    )
  if is_linear(model) or is_embed(model):
    raise ValueError(
      f"`model` is itself a {type(model).__name__}, and layers are changed where they are held. "
      "Pass `nnx.Dict(layer=model)`, or put it into a LoRALinear, LoRAEmbed or NF4Linear."
    )
  values = (v.get_value() for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable))
  if any(isinstance(x, jax.ShapeDtypeStruct) for value in values for x in jax.tree.leaves(value)):
    raise ValueError(
      "`model` holds shapes and no arrays. Call this within the function that is given to "
      "`nnx.eval_shape`."
    )


def excluded(exclude: str | Sequence[str] | None, everything: Sequence[Place]) -> set[str]:
  """The paths that `exclude` names; each pattern must match one: a typo would pack the head."""
  found: set[str] = set()
  paths = [place.path for place in everything]
  for pattern in [] if exclude is None else patterns("exclude", exclude):
    if pattern.pattern == HEAD:
      found |= {place.path for place in output_heads(everything)}
      continue
    matched = {path for path in paths if matches(pattern, path)}
    if not matched:
      lasts = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
      raise ValueError(
        f"`exclude` {pattern.pattern!r} matches no module."
        f"{nearest(pattern.pattern, [*lasts, *paths])} Available modules: {listing(paths)}."
      )
    found |= matched
  return found
