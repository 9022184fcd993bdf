"""Adapters, taken into the weights of a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from optax_lowmem._peft.tensor_files import open_weights
from optax_lowmem.nn._adapters.lora_linear import check_mergeable
from optax_lowmem.nn._layers.base_layer import dense_variable, matrix_shape, stack_shape
from optax_lowmem.nn._model.model_tree import ModelTree, Place, check_replaceable
from optax_lowmem.nn._peft.save import is_tied

M = TypeVar("M", bound=nnx.Module)
Weights = str | os.PathLike[str] | Mapping[str, Any]


def merge_lora(
  model: M, *, dtype: Any = None, original: Weights | None = None, stack: str = "layers"
) -> M:
  """Turns every adapter and its base into one plain layer, in place.

  The weight becomes W + scale * A B, computed in float32. Where the base is quantized, W is its
  decoded weight, or, better, the one in `original`; the merged model no longer is quantized.
  Layers are merged one at a time. What is trained beside adapters (modules to save, biases) is
  in the model already.

  Args:
    model: any NNX module with adapters in it.
    dtype: of the merged weights; None is what each has, or had before it was packed.
    original: weights under PyTorch's names, `model.layers.0.self_attn.q_proj.weight` of shape
      (out, in): a mapping, a safetensors file, or a directory of them. They take the place of
      what the base holds.
    stack: the part of a stacked module's path after which the layer number belongs.

  Returns:
    `model`.

  Raises:
    ValueError: there is no adapter in `model`; an embedding has one, and `model.config` says that
      the output layer is tied to it; or `original` lacks a weight or has it in another shape.

  >>> from flax import nnx
  >>> from optax_lowmem import nn
  >>> mlp = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
  >>> mlp = nn.add_lora(mlp, rank=2, alpha=4, targets=".*", rngs=nnx.Rngs(1))
  >>> type(nn.merge_lora(mlp).layers[0]).__name__
  'Linear'
  """
  tree = ModelTree(model, stack)
  chosen = tree.adapters
  if not chosen:
    raise ValueError("`model` holds no LoRALinear, there is nothing to merge.")
  check_replaceable(chosen)
  if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"`dtype` must be floating point, got {jnp.dtype(dtype).name}.")
  for place in chosen:
    check_mergeable(f"the adapter of `{place.path}`", place.module)
    if place.module.is_embed and is_tied(model):
      raise ValueError(
        f"the embedding `{place.path}` has an adapter, which is of the input alone, and the output "
        "layer is tied to it (`tie_word_embeddings`). A merged table would change both. Keep the "
        "adapter, or give the model an output layer of its own."
      )
  if original is None:
    for place in chosen:
      place.replace(place.module.merge(dtype=_dtype(place.base, dtype)))
    return model
  weights = open_weights(original)
  for place in chosen:
    check_original(place, weights, tree)
  for place in chosen:
    w = jnp.asarray(read_original(place, weights, tree))
    place.replace(place.module.merge(w, _dtype(place.base, dtype)))
  return model


def _dtype(base: Any, dtype: Any) -> Any:
  """Of a merged weight: what is asked for, or what the base has, before it was packed."""
  if dtype is not None:
    return dtype
  variable = dense_variable(base)
  return (base.weight.get_value() if variable is None else variable[...]).dtype


def _torch_shape(place: Place) -> tuple[int, ...]:
  """The shape of one layer's weight in PyTorch."""
  shape = matrix_shape(place.base)[len(stack_shape(place.base)) :]
  return shape[::-1] if place.module.is_embed else shape


def check_original(place: Place, weights: Any, tree: ModelTree) -> None:
  for name in tree.torch_names(place):
    shape = weights.shapes.get(f"{name}.weight")
    if shape != _torch_shape(place):
      raise ValueError(
        f"`original` {'lacks' if shape is None else f'has shape {shape} for'} `{name}.weight`, "
        f"which must be of shape {_torch_shape(place)}."
      )


def read_original(place: Place, weights: Any, tree: ModelTree) -> np.ndarray:
  """The original weight as `matrix_of` gives it: (..., out, in)."""
  read = [weights.read(f"{name}.weight") for name in tree.torch_names(place)]
  read = [w.astype(np.float32) for w in read]
  w = np.stack(read) if stack_shape(place.base) else read[0]
  return w.swapaxes(-1, -2) if place.module.is_embed else w
