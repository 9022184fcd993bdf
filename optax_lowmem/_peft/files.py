"""The two files of a PEFT adapter: what may stand in them, and how they are read and written."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from optax_lowmem._peft.foreign_files import member, read_object
from optax_lowmem._variants.variant import Variant

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# What is read of a configuration beside a variant's own fields, and what may stand in it without
# changing what an adapter computes. Any other key that is set means something that is not supported
# here, whatever PEFT may add later.
_READ = {
    "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "use_rslora",
}  # fmt: skip
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
# These start an adapter in another way and leave the base as it was.
_INITS = (True, False, "gaussian", "orthogonal", "eva")

_TEXTS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
MOST_RANK = 1 << 16

Kinds = Sequence[type[Variant]]


def import_safetensors():
  try:
    import safetensors
    import safetensors.numpy
  except ImportError as error:
    raise ImportError(
      "PEFT's adapter files need the package safetensors: `pip install safetensors`."
    ) from error
  return safetensors


def check_writable(dir: str | os.PathLike[str], overwrite: bool) -> pathlib.Path:
  """The path of `dir`, if an adapter can be written to it: before any work."""
  import_safetensors()
  path = pathlib.Path(dir)
  there = [name for name in (CONFIG, WEIGHTS) if (path / name).exists()]
  if there and not overwrite:
    raise FileExistsError(
      f"`dir` {str(path)!r} holds an adapter already ({', '.join(there)}). "
      "Choose another directory, or pass `overwrite=True`."
    )
  return path


def write_adapter(
  dir: pathlib.Path, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> None:
  """Writes both files, each whole under another name first: no half-written adapter is left."""
  data = import_safetensors().numpy.save(tensors, metadata={"format": "pt"})
  dir.mkdir(parents=True, exist_ok=True)
  for name, content in (
    (WEIGHTS, data),
    (CONFIG, (json.dumps(config, indent=2) + "\n").encode()),
  ):
    partial = dir / f".{name}.partial"
    with open(partial, "wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())  # a rename alone may be on the disk before what it names
    os.replace(partial, dir / name)


def read_config(path: pathlib.Path, variant: Variant | Kinds) -> tuple[dict[str, Any], Variant]:
  """The configuration, checked, under LoRA's keys; and the variant that it is of.

  That is `variant`, or one of these kinds: the first that says the configuration is its own, or
  else, for messages, the last.
  """
  if not os.path.lexists(path):
    raise FileNotFoundError(
      f"there is no {CONFIG} in {str(path.parent)!r}. Pass the directory that PEFT's "
      "`save_pretrained` or `save_peft` wrote."
    )
  config = read_object(member(path.parent, path.name))

  def refuse(key: str, why: str) -> None:
    raise ValueError(f"{str(path)!r} sets {key} to {config.get(key)!r:.200}: {why}")

  if not isinstance(variant, Variant):
    kinds = variant
    variant = next((found for kind in kinds if (found := kind.of(config))), kinds[-1]())
  name, own = type(variant).__name__, variant.config()
  if config.get("peft_type") != variant.peft_type:
    raise ValueError(
      f"{str(path)!r} does not describe a {name} adapter (`peft_type` {variant.peft_type!r})."
    )
  for key, value in own.items():
    if config.get(key) != value:
      refuse(key, f"an adapter that is {variant!r} has {value!r}.")
  names = {variant.peft_keys.get(key, key): key for key in _READ}
  for key, value in config.items():
    if value and key not in names.keys() | own.keys() | _HARMLESS:
      refuse(
        key,
        "what it means is not supported. Merge the adapter with PEFT (`merge_and_unload`) and load "
        "the merged model, or train it without.",
      )
  config = {names.get(key, key): value for key, value in config.items()}
  if config.get("bias", "none") not in ("none", "all", "lora_only"):
    refuse("bias", "only 'none', 'all' and 'lora_only' are known.")
  if config.get("init_lora_weights", True) not in _INITS:
    refuse(
      "init_lora_weights",
      "it changes the base weights, which is not supported. Convert the adapter with PEFT's "
      "`save_pretrained(…, path_initial_model_for_weight_conversion=…)`, or merge it there.",
    )
  rank, alpha = config.get("r"), config.get("lora_alpha")
  if type(rank) is not int or not 1 <= rank <= MOST_RANK:
    refuse("r", f"the rank must be a positive integer, at most {MOST_RANK:,}.")
  if not _is_positive(alpha):
    refuse("lora_alpha", "it must be a positive number.")
  for key in ("rank_pattern", "alpha_pattern"):
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict) or not all(map(_is_positive, pattern.values())):
      refuse(key, "its values must be positive numbers.")
    if key == "rank_pattern" and any(value > MOST_RANK for value in pattern.values()):
      refuse(key, f"a rank must be at most {MOST_RANK:,}.")
  dropout = config.get("lora_dropout") or 0.0
  if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
    refuse("lora_dropout", "it must be a number from 0 to 1.")
  for key in _TEXTS:
    if not _are_texts(config.get(key)):
      refuse(key, "it must be a text or a list of texts.")
  indices = config.get("layers_to_transform")
  listed = [indices] if isinstance(indices, int) else indices or []
  if not isinstance(listed, list) or not all(type(index) is int for index in listed):
    refuse("layers_to_transform", "it must be a number or a list of numbers.")
  return config, variant


def _is_positive(value: Any) -> bool:
  return isinstance(value, (int, float)) and type(value) is not bool and 0 < value < 1e30


def _are_texts(value: Any) -> bool:
  texts = value if isinstance(value, list) else [] if value is None else [value]
  return all(isinstance(text, str) for text in texts)
