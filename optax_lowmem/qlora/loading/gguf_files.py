"""Models in GGUF, the format of llama.cpp: their configuration and their tensors."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from optax_lowmem.qlora.families import FAMILIES
from optax_lowmem.qlora.files.gguf_header import Header
from optax_lowmem.qlora.loading.checkpoint import Checkpoint
from optax_lowmem.qlora.loading.config_files import config_from_hf
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.models.rope_scaling import Divided, Linear

GGUF_LAYER_NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
GGUF_NAMES = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}


def open_gguf(path: pathlib.Path) -> Checkpoint:
  """Opens a GGUF file; see `weights.open_checkpoint`, which checks its tensors too."""
  import gguf

  header = Header(path)
  architecture = header.value("general.architecture")
  metadata = {
    key: header.value(key)
    for key in header.keys()
    if key.startswith(("general.architecture", f"{architecture}."))
  }
  tensors = {_hf_name(name): name for name in header.tensors}
  factors = tensors.pop("rope_freqs.weight", None)
  shapes = {n: header.tensors[name].shape[::-1] for n, name in tensors.items()}
  # The table says how many tokens there are; metadata need not. Its absence is reported later.
  table = shapes.get("model.embed_tokens.weight", (metadata.get(f"{architecture}.vocab_size", 1),))
  config = config_from_gguf(
    metadata,
    tied="lm_head.weight" not in tensors,
    vocab_size=table[0],
    biases={
      "attention_bias": "model.layers.0.self_attn.q_proj.bias" in tensors,
      "mlp_bias": "model.layers.0.mlp.up_proj.bias" in tensors,
    },
    rope_factors=None if factors is None else tuple(map(float, np.ravel(header.array(factors)))),
  )
  model_type = str(architecture)  # a Mistral's file says "llama", and that it is one

  def read(name: str) -> np.ndarray:
    kind = header.tensors[tensors[name]].type
    try:
      array = gguf.dequantize(header.array(tensors[name]), kind)
    except NotImplementedError as error:
      raise ValueError(
        f"{path}: {name} is stored as {kind.name}, which `gguf` cannot decode."
      ) from error
    array = array.reshape(shapes[name])
    if FAMILIES[model_type].gguf_adjacent_pairs and (".q_proj." in name or ".k_proj." in name):
      array = by_halves(array, config.head_dim)
    return array

  return Checkpoint(model_type, config, shapes, read)


def _hf_name(name: str) -> str:
  """The Hugging Face name of a GGUF tensor, or `name` where there is none."""
  if name in GGUF_NAMES:
    return GGUF_NAMES[name]
  match name.split("."):
    case ["blk", layer, part, ("weight" | "bias") as kind] if part in GGUF_LAYER_NAMES:
      return f"model.layers.{layer}.{GGUF_LAYER_NAMES[part]}.{kind}"
  return name


def by_halves(weight: np.ndarray, head_dim: int) -> np.ndarray:
  """Orders the rows of each head for Hugging Face, which turns (i, i + dim/2).

  GGUF files of some families have the two beside each other, as (2 i, 2 i + 1).
  """
  rows = weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:])  # a bias has no more axes
  return rows.swapaxes(1, 2).reshape(weight.shape)


def by_adjacent_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
  """The inverse of `by_halves`."""
  rows = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
  return rows.swapaxes(1, 2).reshape(weight.shape)


def config_from_gguf(
  metadata: Mapping[str, Any],
  *,
  tied: bool,
  vocab_size: int,
  biases: Mapping[str, bool] | None = None,
  rope_factors: tuple[float, ...] | None = None,
) -> LlamaConfig:
  """Reads the metadata of a GGUF file.

  Args:
    metadata: the file's key-value pairs, as Python values.
    tied: whether the file has no output layer of its own (the metadata does not say).
    vocab_size: the number of rows of the embedding table (the metadata need not say).
    biases: of an architecture "llama", which of ``attention_bias`` and ``mlp_bias`` the file's
      tensors show.
    rope_factors: the file's ``rope_freqs.weight``.

  Returns:
    The configuration.

  Raises:
    ValueError: as `config_from_hf`.

  Example:
    >>> config_from_gguf({"general.architecture": "mamba"}, tied=True, vocab_size=8)
    Traceback (most recent call last):
    ...
    ValueError: `general.architecture` is 'mamba'; supported: 'llama', 'qwen2', 'qwen3'.
  """
  kind = metadata.get("general.architecture")
  if kind not in ("llama", "qwen2", "qwen3"):  # Mistral's files say "llama"
    known = any(kind == family.gguf for family in FAMILIES.values())
    hint = " Give the Hugging Face directory of this model." * known
    raise ValueError(
      f"`general.architecture` is {kind!r}; supported: 'llama', 'qwen2', 'qwen3'.{hint}"
    )
  values: dict[str, Any] = {}
  for key, field in {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
  }.items():
    value = metadata.get(f"{kind}.{key}")
    if isinstance(value, list):
      raise ValueError(f"`{kind}.{key}` differs from layer to layer, which is not supported.")
    if value is not None:
      values[field] = value
  # llama.cpp's defaults, where Hugging Face's are others.
  if (heads := values.get("num_attention_heads")) is not None:
    values.setdefault("num_key_value_heads", heads)
    hidden = values.get("hidden_size")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0:
      values.setdefault("head_dim", hidden // heads)
  if kind == "llama":
    values |= biases or {}
  scaling: Linear | Divided | None = None
  match metadata.get(f"{kind}.rope.scaling.type"), metadata.get(f"{kind}.rope.scaling.factor"):
    case "linear", float(factor):
      scaling = Linear(factor)
    case ((None | "none"), _):
      pass
    case other, _:
      raise ValueError(
        f"`{kind}.rope.scaling.type` is {other!r}, which is not supported; needs 'none' or "
        "'linear' with its factor."
      )
  if rope_factors is not None:
    if scaling is not None:
      raise ValueError("The file has both linear rope scaling and rope_freqs.weight.")
    scaling = Divided(rope_factors)
  config = config_from_hf(
    {"model_type": kind, "vocab_size": vocab_size, "tie_word_embeddings": tied, **values}
  )
  config = dataclasses.replace(config, rope_scaling=scaling)
  for key, supported in {
    "rope.scale_linear": (None, 1),
    "rope.dimension_count": (None, config.head_dim),
    "attention.value_length": (None, config.head_dim),
    "attention.sliding_window": (None, 0),
    "expert_count": (None, 0),
    "vocab_size": (None, vocab_size),
  }.items():
    value = metadata.get(f"{kind}.{key}")
    if value not in supported:
      raise ValueError(
        f"`{kind}.{key}` is {value!r}, which is not supported; needs {supported[1]!r}."
      )
  return config
