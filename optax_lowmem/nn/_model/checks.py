"""What is checked of every layer before the first of a model is changed."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from optax_lowmem.nn._layers.base_layer import is_linear
from optax_lowmem.nn._proofs.flax_layers import is_embed


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
