"""Checkpoints on disk: a Hugging Face directory of safetensors, or a GGUF file.

Both become a `Checkpoint`: a configuration, the shape of every tensor under its Hugging Face name,
and a function that reads one tensor. Nothing is read before it is asked for, so the one who loads
decides how much of a model is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from llama_config import LlamaConfig, config_from_gguf, config_from_hf

Shape = tuple[int, ...]

# Buffers that old checkpoints carry and that follow from the configuration.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)

GGUF_LAYER_NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
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


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A model on disk.

  Invariants: every name of `expected_shapes(config)` is in `shapes`, with that shape, and
  ``read(name)`` returns a float array of shape ``shapes[name]``.
  """

  config: LlamaConfig
  shapes: dict[str, Shape]
  read: Callable[[str], np.ndarray]


def expected_shapes(config: LlamaConfig) -> dict[str, Shape]:
  """Returns the shape of every tensor a model has, under its Hugging Face name.

  Args:
    config: the model's configuration.

  Returns:
    A dictionary; linear weights are (out, in).
  """
  d, ff = config.hidden_size, config.intermediate_size
  q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
  layer: dict[str, Shape] = {
    "input_layernorm": (d,),
    "self_attn.q_proj": (q, d),
    "self_attn.k_proj": (kv, d),
    "self_attn.v_proj": (kv, d),
    "self_attn.o_proj": (d, q),
    "post_attention_layernorm": (d,),
    "mlp.gate_proj": (ff, d),
    "mlp.up_proj": (ff, d),
    "mlp.down_proj": (d, ff),
  }
  shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, d)}
  for i in range(config.num_hidden_layers):
    shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
  shapes["model.norm.weight"] = (d,)
  if not config.tie_word_embeddings:
    shapes["lm_head.weight"] = (config.vocab_size, d)
  return shapes


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
  """Opens a model and checks, without reading its weights, that they are all there.

  Args:
    path: a Hugging Face directory with ``config.json`` and safetensors (one file, or several
      with an index), or a ``.gguf`` file.

  Returns:
    The checkpoint.

  Raises:
    FileNotFoundError: if there is nothing at `path`.
    ValueError: if the model is not a supported Llama, if a file is truncated, or if tensors are
      missing, misshapen or unexpected.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(f"There is no model at {path}.")
  try:
    checkpoint = _open_directory(path) if path.is_dir() else _open_gguf(path)
    _check_tensors(checkpoint)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  return checkpoint


def _check_tensors(checkpoint: Checkpoint) -> None:
  expected, found = expected_shapes(checkpoint.config), checkpoint.shapes
  missing = [name for name in expected if name not in found]
  extra = [n for n in found if n not in expected and not n.endswith(IGNORED_SUFFIXES)]
  if checkpoint.config.tie_word_embeddings and "lm_head.weight" in extra:
    # Some tied models are saved with both copies. Dropping one is right only if it is a copy.
    extra.remove("lm_head.weight")
    head, table = (checkpoint.read(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
    if not np.array_equal(head, table):
      raise ValueError(
        "`tie_word_embeddings` is true, but lm_head.weight differs from "
        "model.embed_tokens.weight; set it to false to use both."
      )
  if missing:
    near = difflib.get_close_matches(missing[0], extra, n=1)
    hint = f" (it has {near[0]})" if near else ""
    raise ValueError(f"missing {_listing(missing)}{hint}.")
  wrong = [f"{n} {found[n]}, expected {s}" for n, s in expected.items() if found[n] != s]
  if wrong:
    raise ValueError(f"wrong shape of {_listing(wrong)}.")
  if extra:
    raise ValueError(
      f"unexpected {_listing(extra)}. A model with more tensors than a plain "
      "Llama computes something else."
    )


def _listing(names: list[str], limit: int = 20) -> str:
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return f"{len(names)} tensor{'s' * (len(names) > 1)}: " + "; ".join(names[:limit]) + more


# --- Hugging Face directories -------------------------------------------------------------------


def _open_directory(path: pathlib.Path) -> Checkpoint:
  from safetensors import SafetensorError, safe_open

  config_file = path / "config.json"
  if not config_file.exists():
    raise ValueError("the directory has no config.json.")
  config = config_from_hf(_read_json(config_file))

  single, index = path / "model.safetensors", path / "model.safetensors.index.json"
  if single.exists():
    files = [single]
  elif index.exists():
    weight_map = _read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
      raise ValueError(f"{index.name} has no `weight_map` of tensor names to file names.")
    files = [path / name for name in sorted(set(map(str, weight_map.values())))]
    absent = [file.name for file in files if not file.exists()]
    if absent:
      raise ValueError(f"{index.name} names files that are not there: {', '.join(absent)}.")
  else:
    raise ValueError(
      "the directory has neither model.safetensors nor "
      "model.safetensors.index.json. Save the model as safetensors first "
      "(`save_pretrained(..., safe_serialization=True)`)."
    )

  shapes: dict[str, Shape] = {}
  where: dict[str, Any] = {}
  for file in files:
    try:
      tensors: Any = safe_open(file, framework="numpy")
      names = tensors.keys()
    except SafetensorError as error:
      raise ValueError(
        f"{file.name} is truncated or not a safetensors file ({error}); "
        f"it has {file.stat().st_size} bytes."
      ) from error
    for name in names:
      if name in where:
        raise ValueError(f"{name} is in more than one file.")
      part = tensors.get_slice(name)
      if not name.endswith(IGNORED_SUFFIXES) and part.get_dtype() not in (
        "F32",
        "F16",
        "BF16",
      ):
        raise ValueError(
          f"{name} is of type {part.get_dtype()}; supported: F32, F16, "
          "BF16. Save the model unquantized."
        )
      where[name], shapes[name] = tensors, tuple(part.get_shape())
  return Checkpoint(config, shapes, lambda name: where[name].get_tensor(name))


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:  # covers JSONDecodeError and UnicodeDecodeError
    raise ValueError(f"{file.name} is not valid JSON: {error}") from error
  if not isinstance(content, dict):
    raise ValueError(f"{file.name} must hold a JSON object.")
  return content


# --- GGUF ----------------------------------------------------------------------------------------


def _open_gguf(path: pathlib.Path) -> Checkpoint:
  import gguf

  try:
    reader = gguf.GGUFReader(path)
  except Exception as error:  # the reader trusts the file: any numpy error may come out of it
    raise ValueError(
      f"truncated or not a GGUF file ({error}); it has {path.stat().st_size} bytes. "
      "(Of a Hugging Face model, give the directory.)"
    ) from error
  metadata = {
    key: field.contents()
    for key, field in reader.fields.items()
    if key.startswith(("general.architecture", "llama."))
  }
  tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
  if "rope_freqs.weight" in tensors:
    raise ValueError("rope_freqs.weight says rope scaling 'llama3', which is not supported.")
  shapes = {n: tuple(int(s) for s in reversed(t.shape)) for n, t in tensors.items()}
  # The table says how many tokens there are; metadata need not. Its absence is reported later.
  table = shapes.get("model.embed_tokens.weight", (metadata.get("llama.vocab_size", 1),))
  config = config_from_gguf(metadata, tied="lm_head.weight" not in tensors, vocab_size=table[0])

  def read(name: str) -> np.ndarray:
    tensor = tensors[name]
    try:
      array = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
      raise ValueError(
        f"{path}: {name} is stored as {tensor.tensor_type.name}, which `gguf` cannot decode."
      ) from error
    array = array.reshape(shapes[name])
    if name.endswith(("q_proj.weight", "k_proj.weight")):
      array = _unpermute(array, config.head_dim)
    return array

  return Checkpoint(config, shapes, read)


def _hf_name(name: str) -> str:
  """The Hugging Face name of a GGUF tensor, or `name` where there is none."""
  if name in GGUF_NAMES:
    return GGUF_NAMES[name]
  match name.split("."):
    case ["blk", layer, part, "weight"] if part in GGUF_LAYER_NAMES:
      return f"model.layers.{layer}.{GGUF_LAYER_NAMES[part]}.weight"
  return name


def _unpermute(weight: np.ndarray, head_dim: int) -> np.ndarray:
  # GGUF orders the rows of a head so that a rotated pair is adjacent, (dim/2, 2); Hugging Face's
  # rotate-half convention wants the first halves before the second halves, (2, dim/2).
  rows = weight.reshape(-1, head_dim // 2, 2, weight.shape[-1])
  return rows.swapaxes(1, 2).reshape(weight.shape)
