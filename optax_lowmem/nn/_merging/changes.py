"""What a merged model has that the original has not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_lowmem._linear.head_names import HEAD_TENSORS, HEADS, TABLE_TENSORS
from optax_lowmem._linear.names import nearest
from optax_lowmem._peft.adapter_file import AdapterFile
from optax_lowmem._peft.tensor_files import Weights
from optax_lowmem._variants.lora_scale import scale_of
from optax_lowmem.nn._merging.delta import Delta
from optax_lowmem.nn._model.model_tree import ModelTree
from optax_lowmem.nn._model.trainable import trained_beside
from optax_lowmem.nn._peft.save import check_matrix, peft_layers


class Changes(NamedTuple):
  """What is different in a merged model.

  Attributes:
    deltas: adapters by the name of their layer.
    whole: values by the name of a tensor that take the place of the original's.
  """

  deltas: dict[str, Delta]
  whole: dict[str, np.ndarray]


def changes_of_model(tree: ModelTree, of_original: bool) -> Changes:
  """The adapters of a model, and, for an original, what was trained beside them."""
  changes = Changes({}, {})
  for place in tree.adapters:
    names = tree.torch_names(place)
    check_matrix(place)
    lora: Any = place.module
    for name, layer in peft_layers(place, names, of_original).items():
      scale = scale_of(layer.rank, layer.alpha, lora.use_rslora)
      changes.deltas[name] = Delta(lora.variant, layer.parts, scale, lora.is_embed)
  if of_original:
    for tensor, names in trained_beside(tree).values():
      value = tensor.to_torch(np.asarray(tensor.variable[...]))
      for name, one in zip(names, value if tensor.lead else value[None], strict=True):
        changes.whole[f"{name}.{tensor.suffix}"] = one
  return changes


def changes_of_file(file: AdapterFile) -> Changes:
  """What an adapter's file changes; its settings are checked against it."""
  found = {}
  for name, parts in file.layers.items():
    embedding = name in file.embeddings
    # An output layer is a Linear beside the Conv1D of the others.
    turned = file.config.get("fan_in_fan_out") and not (embedding or HEADS.fullmatch(name))
    delta = Delta(file.variant, parts, file.scale(name), embedding, bool(turned))
    file.check_shapes(name, delta.sizes, embedding, "original")
    found[name] = delta
  return Changes(found, file.plain)


def check_changes(weights: Weights, changes: Changes, source: str) -> None:
  """Refuses what has no place in `weights`, or another shape."""
  wanted = {f"{name}.weight": delta.shape for name, delta in changes.deltas.items()}
  for name, delta in changes.deltas.items():
    if delta.bias is not None:
      if f"{name}.bias" not in weights.shapes:
        raise ValueError(
          f"the adapter of `{name}` has a bias (`lora_bias`) and {source} has none to add it to. "
          "Keep the adapter, or give the base a bias of zeros."
        )
      wanted[f"{name}.bias"] = delta.bias.shape
  for name, value in changes.whole.items():
    if wanted.setdefault(name, value.shape) != value.shape:
      raise ValueError(
        f"`{name}` is saved with the adapter in shape {value.shape}, which does not fit the "
        f"adapter's own {wanted[name]}."
      )
  for name, shape in wanted.items():
    found = weights.shapes.get(name)
    if found is None:
      tied = " It may be tied to the embedding there." if HEAD_TENSORS.fullmatch(name) else ""
      raise ValueError(
        f"{source} lacks `{name}`, which the adapter changes.{tied}"
        f"{nearest(name, list(weights.shapes))} Names must be those of the PyTorch model."
      )
    if found != shape:
      raise ValueError(
        f"{source} has shape {found} for `{name}`, and the adapter needs {shape}. Pass the model "
        "that the adapter was trained on."
      )
    if not jnp.issubdtype(weights.dtypes[name], jnp.floating):
      raise ValueError(
        f"{source} holds `{name}` as {weights.dtypes[name]}, to which nothing can be added. Pass "
        "the model as it was before it was quantized."
      )


def shares_table(tree: ModelTree) -> bool:
  """Whether the table of an embedding with an adapter has a second place in the model."""
  bases = {id(p.base): p for p in tree.adapters if p.module.is_embed}
  if any(len(place.holders) > 1 for place in bases.values()):
    return True
  tables = {id(place.module.embedding) for place in bases.values()}
  others = [p.module for p in tree.places if id(p.module) not in bases]
  return any(id(value) in tables for module in others for value in vars(module).values())


def says_tied(config: Mapping[str, Any], weights: Weights) -> bool:
  """Whether a `config.json` says that the output layer is the embedding."""
  inner = config.get("text_config")
  for part in (config, inner if isinstance(inner, dict) else {}):
    if part.get("tie_word_embeddings") is not None:
      return bool(part["tie_word_embeddings"])
  # Left out, it is what the class of the model takes: only the tensors tell.
  return bool(config) and not any(map(HEAD_TENSORS.fullmatch, weights.shapes))


def check_tied(weights: Weights, changes: Changes, tied: bool, head_follows: bool) -> None:
  """In a file there is one table for both, so both must be changed, and no second copy be there.

  PEFT's adapter of an embedding is of the input alone.
  """
  if not tied:
    return
  for name, delta in changes.deltas.items():
    if delta.embedding:
      raise ValueError(
        f"the embedding `{name}` has an adapter, which is of the input alone, and the output layer "
        "is tied to it. A merged table would change both. Keep the adapter, or give the original "
        "an output layer of its own (`lm_head.weight`, and `tie_word_embeddings` false)."
      )
  for name in filter(TABLE_TENSORS.fullmatch, changes.whole):
    copies = [n for n in weights.shapes if HEAD_TENSORS.fullmatch(n) and n not in changes.whole]
    if copies or not head_follows:
      raise ValueError(
        f"`{name}` was trained whole, and "
        + (
          f"the original holds its tied copy `{copies[0]}` too, which would stay as it was. "
          "Delete the copy from the original."
          if copies
          else "in PEFT the output layer that is tied to it stays as it was, which in one table "
          "it cannot. Save the adapter with `ensure_weight_tying`."
        )
      )
