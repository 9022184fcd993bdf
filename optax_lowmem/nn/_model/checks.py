"""What is checked of every layer before the first of a model is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from optax_lowmem.nn._adapters.lora_init import Init, LoftQ, check_fits
from optax_lowmem.nn._layers.base_layer import (
  contraction_of,
  dense_variable,
  foreign_of,
  is_embed,
  is_linear,
  matrix_shape,
)
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


def check_product(path: str, layer: Any) -> None:
  """Refuses a layer that multiplies in a way of its own, which a quantized one would not."""
  contraction_of(layer)
  foreign = foreign_of(layer)
  if foreign is not None:
    if not foreign.plain:
      raise ValueError(
        f"`{path}` accumulates its product in another dtype (`preferred_element_type`), which a "
        "quantized layer does not. Name it in `exclude`."
      )
    return
  own = getattr(layer, "dot_general", None) not in (None, jax.lax.dot_general)
  own = own or getattr(layer, "dot_general_cls", None) is not None
  own = own or getattr(layer, "einsum_op", jnp.einsum) is not jnp.einsum
  own = own or layer.promote_dtype is not dtypes.promote_dtype
  if own or layer.preferred_element_type is not None:
    raise ValueError(
      f"`{path}` sets `dot_general`, `einsum_op`, `promote_dtype` or `preferred_element_type`, "
      "which a quantized layer does not have. Name it in `exclude`, or leave it out of `targets`."
    )


def check_start(path: str, base: Any, rank: Any, init: Init) -> None:
  """Refuses a layer whose adapter cannot start as `init` says."""
  loftq = init == "loftq" or isinstance(init, LoftQ)
  if is_embed(base) or not (loftq or init == "pissa"):
    return
  if loftq:
    if dense_variable(base) is None:
      raise ValueError(
        f"`{path}` is quantized, and `init` 'loftq' needs the weights before they are. Call "
        "`add_lora` on the float model, without `quantize_model`; it quantizes the layers that it "
        "adapts."
      )
    check_product(path, base)
  largest = max(rank) if isinstance(rank, Sequence) else rank
  check_fits(largest, matrix_shape(base)[-2:], f" of `{path}`")
