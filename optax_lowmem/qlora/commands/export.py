"""``lowmem export RUN --out FILE``: an adapter as llama.cpp takes it beside a model."""

import collections
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from optax_lowmem.qlora.families import FAMILIES
from optax_lowmem.qlora.files.model_files import member, read_json
from optax_lowmem.qlora.loading.checkpoint import Checkpoint
from optax_lowmem.qlora.loading.gguf_files import by_adjacent_pairs
from optax_lowmem.qlora.loading.weights import open_checkpoint
from optax_lowmem.qlora.run.called import called
from optax_lowmem.qlora.run.finished import adapter_of, parser_of
from optax_lowmem.qlora.run.terminal import say, sentences

PREFIX = "base_model.model."
# A dtype's name -> what the file calls a tensor's type, and its own.
DTYPES = {
  "float32": ("F32", "ALL_F32"),
  "float16": ("F16", "MOSTLY_F16"),
  "bfloat16": ("BF16", "MOSTLY_BF16"),
}


def export(argv: Sequence[str]) -> int:
  """Writes the adapter alone, for a GGUF file of the base model."""
  parser = parser_of(
    "export",
    "Write a run's adapter as a GGUF file, which llama.cpp loads beside the base "
    "model's own (--lora FILE).",
  )
  parser.add_argument("--out", type=Path, required=True, help="the file, which must be new")
  parser.add_argument(
    "--dtype", choices=tuple(DTYPES), default="float32", help="of the file (default: %(default)s)"
  )
  given = parser.parse_args(argv)
  with sentences():
    if given.out.exists():
      raise FileExistsError(f"--out {given.out} exists. Choose another name.")
    _, path, adapter = adapter_of(given.run, "export", best=given.best, model=given.model)
    factors = read_factors(adapter)
    write_factors(given.out, factors, open_checkpoint(path), given.dtype)
  say(f"The adapter, of {len(factors)} layers: {given.out}.")
  return 0


class Factors(NamedTuple):
  """One layer's adapter: the weight (out, in) gains ``scale * b @ a``."""

  a: np.ndarray  # (r, in), float32
  b: np.ndarray  # (out, r), float32
  scale: float


def read_factors(folder: Path) -> dict[str, Factors]:
  """The adapter of each layer in a folder of PEFT's.

  Raises:
    ValueError: where it holds more than factors of linear layers, which llama.cpp could not add.
  """
  config = read_json(member(folder, "adapter_config.json"))
  for key, plain in {"use_dora": False, "lora_bias": False, "bias": "none"}.items():
    if config.get(key, plain) != plain:
      raise ValueError(_beyond(folder, f"`{key}` {config[key]!r}"))
  if config.get("modules_to_save"):
    raise ValueError(_beyond(folder, f"`modules_to_save` {config['modules_to_save']!r}"))
  parts: dict[str, dict[str, np.ndarray]] = {}
  with safe_open(folder / "adapter_model.safetensors", framework="np") as file:
    for name in file.keys():
      if name.endswith(".base_layer.weight"):  # PEFT's copy of an adapted head, unchanged
        continue
      match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", name)
      if match is None:
        raise ValueError(_beyond(folder, f"the tensor {name}"))
      parts.setdefault(match[1], {})[match[2]] = file.get_tensor(name).astype(np.float32)
  return {
    name: Factors(pair["A"], pair["B"], _scale(config, name, len(pair["A"])))
    for name, pair in parts.items()
  }


def _beyond(folder: Path, what: str) -> str:
  return (
    f"{folder} has {what}, and a GGUF adapter holds nothing but two factors of each linear layer. "
    f"Make a model of it with `{called('merge')}`, and convert that with llama.cpp."
  )


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
  alpha = config["lora_alpha"]
  for key, value in (config.get("alpha_pattern") or {}).items():
    if re.match(rf"(.*\.)?({key})$", name):  # PEFT takes the first that matches
      alpha = value
      break
  return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def write_factors(
  path: Path, factors: Mapping[str, Factors], base: Checkpoint, dtype: str = "float32"
) -> None:
  """Writes a GGUF adapter of llama.cpp.

  llama.cpp multiplies by one alpha for all layers, over each one's rank. What else a layer's scale
  has in it is multiplied into `b`.

  Args:
    path: the file, written beside itself first.
    factors: by the Hugging Face name of their layer.
    base: the model that the adapter is for; its kind decides the names, and where rows go.
    dtype: of the tensors.

  Raises:
    ValueError: for a layer that has no name in GGUF, a head that is tied to the embedding, and
      numbers that `dtype` does not hold.
  """
  import gguf

  family = FAMILIES[base.model_type]
  architecture = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf)
  names = gguf.get_tensor_name_map(architecture, base.config.num_hidden_layers)
  kind = gguf.GGMLQuantizationType[DTYPES[dtype][0]]
  alphas = collections.Counter(each.scale * len(each.a) for each in factors.values())
  alpha = alphas.most_common(1)[0][0]
  partial = path.with_name(path.name + ".partial")
  writer = gguf.GGUFWriter(partial, family.gguf)
  writer.add_type(gguf.GGUFType.ADAPTER)
  writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype][1]])
  writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
  writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
  for name, (a, b, scale) in factors.items():
    other = names.get_name(name)
    if other is None or (name == "lm_head" and base.config.tie_word_embeddings):
      raise ValueError(
        f"`{name}` has an adapter, and a GGUF file of a {base.model_type!r} has no such layer. "
        f"Make a model of it with `{called('merge')}`, and convert that with llama.cpp."
      )
    if scale * len(a) != alpha:
      b = b * np.float32(scale * len(a) / alpha)
    if family.gguf_adjacent_pairs and name.endswith((".q_proj", ".k_proj")):
      b = by_adjacent_pairs(b, base.config.head_dim)
    for end, value in (("lora_a", a), ("lora_b", b)):
      if dtype == "float16" and np.abs(value).max() > np.finfo(np.float16).max:
        raise ValueError(f"`{name}` holds numbers beyond float16. Choose --dtype bfloat16.")
      encoded = gguf.quantize(np.ascontiguousarray(value), kind)
      writer.add_tensor(f"{other}.weight.{end}", encoded, raw_dtype=kind)
  try:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
