"""``finetune.py merge RUN --out DIR``: a model without adapters, as Hugging Face loads it."""

import argparse
import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from chat import ChatTokenizer
from checkpoints import replacing
from llama import load_llama
from llama_config import LlamaConfig
from optax_lowmem import nn as lowmem_nn
from talking import of_run
from terminal import say, sentences
from weights import expected_shapes, open_checkpoint

SHARD_BYTES = 4 << 30
# Files of a Hugging Face directory that are not weights, and belong to the merged model too.
COMPANIONS = ("generation_config.json", "chat_template.jinja", "special_tokens_map.json")
COMPANIONS += ("vocab.json", "merges.txt", "added_tokens.json")


def merge(argv: Sequence[str]) -> int:
  """Writes base model plus adapter, the base as it was before it was packed."""
  parser = argparse.ArgumentParser(
    prog="finetune.py merge",
    description="Take a run's adapter into its base model's original weights, in one model that "
    "needs no adapter.",
  )
  parser.add_argument("run", type=Path, help="the run's folder")
  parser.add_argument("--out", type=Path, required=True, help="folder for the model, new or empty")
  parser.add_argument("--best", action="store_true", help="the best adapter, not the last")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
  given = parser.parse_args(argv)
  with sentences():
    s, path, adapter = of_run(given.run, best=given.best)
    if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
      raise FileExistsError(f"--out {given.out} exists and is not empty. Choose another folder.")
    checkpoint = open_checkpoint(path)
    tokenizer = ChatTokenizer.from_model(path, s.chat_template)
    # In float32: the sum is rounded once, when it is written.
    model = lowmem_nn.load_peft(load_llama(checkpoint, None, dtype=jnp.float32), adapter)
    model = lowmem_nn.merge_lora(model)
  with replacing(given.out) as folder:
    write_companions(folder, path, checkpoint.config, tokenizer, given.dtype)
    write_shards(folder, model, checkpoint.config, jnp.dtype(given.dtype))
  say(f"The merged model, of {checkpoint.config.parameter_count():,} parameters: {given.out}.")
  return 0


def tensor_of(model: Any, name: str) -> np.ndarray:
  """A weight of a Llama without adapters, float32, under its Hugging Face name."""
  *parts, kind = name.split(".")
  layer = next((int(part) for part in parts if part.isdigit()), None)
  module = model
  for part in parts:
    module = module if part.isdigit() else getattr(module, part)
  if kind == "bias":
    value, transposed = module.bias[...], False
  else:
    field = next(f for f in ("kernel", "embedding", "scale") if hasattr(module, f))
    value, transposed = getattr(module, field)[...], field == "kernel"
  value = np.asarray(value if layer is None else value[layer], np.float32)
  return value.T if transposed else value


def write_shards(folder: Path, model: Any, config: LlamaConfig, dtype: Any) -> None:
  """Writes the weights as ``model.safetensors``, or as several files with an index."""
  shards: list[list[str]] = [[]]
  size = total = 0
  for name, shape in expected_shapes(config).items():
    bytes_ = math.prod(shape) * dtype.itemsize
    if shards[-1] and size + bytes_ > SHARD_BYTES:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size, total = size + bytes_, total + bytes_
  files = {}
  for number, names in enumerate(shards, 1):
    file = f"model-{number:05}-of-{len(shards):05}.safetensors"
    file = file if len(shards) > 1 else "model.safetensors"
    tensors = {name: np.ascontiguousarray(tensor_of(model, name), dtype) for name in names}
    save_file(tensors, folder / file, metadata={"format": "pt"})
    files |= dict.fromkeys(names, file)
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_companions(
  folder: Path, path: Path, config: LlamaConfig, tokenizer: ChatTokenizer, dtype: str
) -> None:
  """Writes the configuration and the tokenizer; those of a directory are copied."""
  if path.is_dir():
    for name in (*COMPANIONS, *(p.name for p in path.glob("tokenizer*"))):
      if (path / name).is_file():
        shutil.copy(path / name, folder / name)
    settings = json.loads((path / "config.json").read_text("utf-8"))
    settings = {k: v for k, v in settings.items() if k not in ("torch_dtype", "dtype")}
  else:
    settings = config_of(config) | {"eos_token_id": tokenizer.eos_id}
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.eos}
    about |= {"pad_token": tokenizer.backend.id_to_token(tokenizer.pad_id)}
    about |= {"chat_template": tokenizer.template.source}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
  settings |= {"torch_dtype": dtype}
  (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def config_of(config: LlamaConfig) -> dict[str, Any]:
  """The ``config.json`` of a model that came in a GGUF file.

  Raises:
    ValueError: where the model is not one of the plain kinds.
  """
  if config.rope_scaling or any(config.windows) or config.o_bias or config.mlp_bias:
    raise ValueError(
      "A GGUF model with rope scaling, sliding windows or unusual biases is not merged. Train from "
      "its Hugging Face directory instead."
    )
  kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
  names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
  plain = ("rope_scaling", "windows", "qkv_bias", "o_bias", "mlp_bias", "qk_norm")
  sizes = {k: v for k, v in dataclasses.asdict(config).items() if k not in plain}
  return {"model_type": kind, "architectures": [names[kind]], "hidden_act": "silu", **sizes}
