"""This library's sides of `qlora_vs_peft.py`, and what all sides are given.

`qlora_jax.py prepare` writes the model, a fresh adapter and the batches into a folder;
`qlora_jax.py side` takes the training step of `examples/qlora/finetune.py` on them.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file

from _turns import arguments, resident, serve
from optax_lowmem import nn as lowmem_nn
from optax_lowmem.qlora.data.dataset import Batch, load
from optax_lowmem.qlora.files.fetch import default_data, default_model
from optax_lowmem.qlora.loading.config_files import config_to_hf
from optax_lowmem.qlora.loading.llama import load_llama
from optax_lowmem.qlora.loading.weights import expected_shapes, open_checkpoint
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer
from optax_lowmem.qlora.training.step import compiled, split, train_step

# vocabulary, width, ff, layers, heads, key-value heads, head, eps, rope base, positions, tied
SHAPES = {
  "tiny": (256, 64, 192, 2, 4, 2, 16, 1e-5, 1e4, 2048, True),
  "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 64, 1e-5, 1e5, 8192, True),
  "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, 64, 1e-5, 5e5, 8192, True),
  "llama-2-7b": (32000, 4096, 11008, 32, 32, 32, 128, 1e-5, 1e4, 4096, False),
}
RANK, ALPHA, TARGETS = 16, 32, "[qkvo]_proj|gate_proj|up_proj|down_proj"


def write_model(
  folder: pathlib.Path, config: Any, read: Callable[[str], np.ndarray], dtype: Any
) -> None:
  """A Hugging Face directory, a file for each layer."""
  (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
  parts: dict[str, list[str]] = {}
  for name in expected_shapes(config):
    part = name.split(".")[2] if ".layers." in name else "rest"
    parts.setdefault(f"model-{part}.safetensors", []).append(name)
  for file, names in parts.items():
    tensors = {name: np.ascontiguousarray(read(name), dtype) for name in names}
    save_file(tensors, folder / file, metadata={"format": "pt"})
  index = {"metadata": {}, "weight_map": {n: file for file, names in parts.items() for n in names}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_tensors(config: Any) -> Callable[[str], np.ndarray]:
  """Normal weights of standard deviation 0.02, cut at random places out of one long run of them.

  Drawing 7e9 numbers would take longer than the measurement.
  """
  rng, shapes = np.random.default_rng(0), expected_shapes(config)
  run = rng.standard_normal(2**24, np.float32) * np.float32(0.02)

  def read(name: str) -> np.ndarray:
    shape = shapes[name]
    if len(shape) == 1:
      return np.ones(shape, np.float32)
    return np.resize(np.roll(run, int(rng.integers(len(run)))), shape)

  return read


def prepare(args: argparse.Namespace) -> None:
  """Writes the model where there is none, a fresh adapter, and the batches (N, batch, T + 1)."""
  folder, dtype = pathlib.Path(args.folder), jnp.dtype(args.dtype)
  directory, shape = folder / "model", (args.batches, args.batch, args.tokens + 1)
  ids = None
  if args.model:
    path = default_model() if args.model == "default" else pathlib.Path(args.model)
    data = args.data or (default_data() if args.model == "default" else None)
    checkpoint = open_checkpoint(path)
    if path.is_dir():
      directory.symlink_to(path.resolve(), target_is_directory=True)
    else:
      directory.mkdir()
      write_model(directory, checkpoint.config, checkpoint.read, dtype)
    if data:  # one stream of tokens, all of them learned
      rows = load(data, ChatTokenizer.from_model(path), 2**20).rows
      stream = np.concatenate([row.ids for row in rows])
      ids = np.resize(stream, shape)
    config = checkpoint.config
  else:
    config = LlamaConfig(*SHAPES[args.shapes])
    directory.mkdir()
    write_model(directory, config, random_tensors(config), dtype)
  if ids is None:  # four batches again and again: there is nothing else to learn
    ids = np.random.default_rng(1).integers(0, config.vocab_size, shape)
    ids = ids[np.arange(args.batches) % 4]
  np.save(folder / "ids.npy", ids.astype(np.int32))
  model = load_llama(directory, "nf4", dtype=dtype)
  model = lowmem_nn.add_lora(model, RANK, ALPHA, TARGETS, rngs=nnx.Rngs(0))
  lowmem_nn.save_peft(model, folder / "adapter")


def ours(args: argparse.Namespace) -> None:
  """Serves the step of the example."""
  jax.devices()  # what the backend needs is not the model's
  before, folder = resident(), pathlib.Path(args.folder)
  ids = np.load(folder / "ids.npy")
  quantize = "nf4" if args.side.endswith("nf4") else None
  model = load_llama(args.model, quantize, dtype=jnp.dtype(args.dtype))
  model = lowmem_nn.load_peft(model, folder / "adapter")
  tx = optax.adamw(args.lr, weight_decay=1e-4)
  graph, state, frozen = split(model, tx.init)
  del model
  learned = np.ones((1, ids.shape[1], ids.shape[2] - 1), bool)
  lengths = np.full(learned.shape[:2], learned.shape[-1], np.int32)

  def batch(i: int) -> Any:
    return Batch(ids[i][None, :, :-1], ids[i][None, :, 1:], learned, lengths)

  step = compiled(functools.partial(train_step, graph, tx), state, frozen, batch(0))

  def one(i: int) -> float:
    nonlocal state
    state, measured = step(state, frozen, batch(i))
    loss = float(measured["loss"])
    jax.block_until_ready(state)
    return loss

  def memory() -> dict[str, Any]:
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = {"device peak": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}
    return peak | {"temporaries": step.memory_analysis().temp_size_in_bytes}

  serve(one, before, memory)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  commands = parser.add_subparsers(required=True)
  side = arguments(commands.add_parser("side"))
  side.set_defaults(run=ours)
  parts = commands.add_parser("prepare")
  parts.add_argument("--folder", required=True)
  parts.add_argument("--dtype", required=True)
  parts.add_argument("--shapes", required=True, choices=SHAPES)
  parts.add_argument("--model")
  parts.add_argument("--data")
  for name in ("--batches", "--batch", "--tokens"):
    parts.add_argument(name, type=int, required=True)
  parts.set_defaults(run=prepare)
  args = parser.parse_args()
  args.run(args)


if __name__ == "__main__":
  main()
