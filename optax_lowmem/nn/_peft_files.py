"""The two files of a PEFT adapter: what may stand in them, and how they are read and written."""

from __future__ import annotations

import json
import os
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# What an adapter's configuration may say without changing what a plain adapter computes. Any other
# key that is set means something that is not supported here, whatever PEFT may add later.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights"}
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "target_modules", "task_type",
}  # fmt: skip


def import_safetensors():
  try:
    import safetensors
    import safetensors.numpy
  except ImportError as error:
    raise ImportError(
      "PEFT's adapter files need the package safetensors: `pip install safetensors`."
    ) from error
  return safetensors


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
    partial.write_bytes(content)
    os.replace(partial, dir / name)


def read_config(path: pathlib.Path) -> dict[str, Any]:
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise FileNotFoundError(
      f"there is no {CONFIG} in {str(path.parent)!r}. Pass the directory that PEFT's "
      "`save_pretrained` or `save_peft` wrote."
    ) from None
  except ValueError as error:
    raise ValueError(f"{str(path)!r} is not a JSON file: {error}.") from error

  def refuse(key: str, why: str) -> None:
    raise ValueError(f"{str(path)!r} sets {key} to {config.get(key)!r}: {why}")

  if not isinstance(config, dict) or config.get("peft_type") != "LORA":
    raise ValueError(f"{str(path)!r} does not describe a LoRA adapter (`peft_type` 'LORA').")
  if config.get("use_dora"):
    refuse("use_dora", "DoRA adapters are not supported, only plain LoRA and rsLoRA.")
  if config.get("modules_to_save"):
    refuse("modules_to_save", "whole trained modules in an adapter are not supported.")
  if config.get("bias", "none") != "none":
    refuse("bias", "trained biases are not supported, only 'none'.")
  if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
    refuse("init_lora_weights", "it changes the base weights, which is not supported.")
  for key, value in config.items():
    if value and key not in _READ | _HARMLESS:
      refuse(key, "only plain LoRA and rsLoRA on linear layers are supported.")
  rank, alpha = config.get("r"), config.get("lora_alpha")
  if not isinstance(rank, int) or rank < 1:
    refuse("r", "the rank must be a positive integer.")
  if not isinstance(alpha, (int, float)) or not alpha > 0:
    refuse("lora_alpha", "it must be a positive number.")
  return config


def read_tensors(path: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
  """{module name: {"A": (r, in), "B": (out, r)}} in float32."""
  if not path.exists():
    raise FileNotFoundError(
      f"there is no {WEIGHTS} in {str(path.parent)!r}. Adapters saved as .bin are not read; "
      "save them with safetensors."
    )
  safetensors = import_safetensors()
  modules: dict[str, dict[str, np.ndarray]] = {}
  try:
    with safetensors.safe_open(path, framework="np") as file:
      tensors = {name: file.get_tensor(name) for name in file.keys()}
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{str(path)!r} is not a whole safetensors file: {error}. Copy it again."
    ) from error
  for name, value in tensors.items():
    match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", name)
    if not match:
      if name.endswith("lora_magnitude_vector"):
        why = "It belongs to DoRA, which is not supported."
      elif "lora_embedding_" in name:
        why = "Adapters on embeddings are not supported."
      else:
        why = f"Names of plain LoRA are {PREFIX}<module>.lora_A.weight and lora_B.weight."
      raise ValueError(f"{str(path)!r} holds the tensor {name!r}. {why}")
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise ValueError(f"{str(path)!r}: {name!r} is {value.dtype}, not floating point.")
    modules.setdefault(match[1], {})[match[2]] = value.astype(np.float32)
  for name, pair in modules.items():
    if len(pair) < 2:
      missing = "B" if "A" in pair else "A"
      raise ValueError(f"{str(path)!r} lacks {PREFIX}{name}.lora_{missing}.weight.")
  return modules
