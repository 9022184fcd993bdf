"""The QLoRA section of `gpu.py`: the example's own training step. A row is a line of JSON.

Without a model it runs on random weights of the shapes of SmolLM2-135M (the time does not depend on
their values); with one, `examples/qlora/finetune.py` itself is run.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any

EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "qlora"


def random_weights(steps: int) -> dict[str, Any]:
  """Tokens a second and peak memory of `train_step` on random weights and tokens."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from optax_lowmem import nn as lowmem_nn
  from optax_lowmem.qlora.data.dataset import Batch
  from optax_lowmem.qlora.loading.llama import Llama
  from optax_lowmem.qlora.models.llama_config import LlamaConfig
  from optax_lowmem.qlora.run.recipe import adapted, optimizer
  from optax_lowmem.qlora.run.settings import Settings
  from optax_lowmem.qlora.training.step import compiled, split, train_step

  on_gpu = jax.devices()[0].platform == "gpu"
  if on_gpu:
    config = LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 1e-5, 1e5, 8192, True)
    settings = Settings(batch_size=16, seq_len=512, dtype="bfloat16")
  else:
    config = LlamaConfig(256, 64, 160, 2, 4, 2, 16, tie_word_embeddings=True)
    settings = Settings(batch_size=2, seq_len=16, dtype="float32", rank=4)
  model = Llama(config, dtype=jnp.dtype(settings.dtype), rngs=nnx.Rngs(0))
  model = adapted(lowmem_nn.quantize_model(model), settings)
  tx, _ = optimizer(settings)
  graph, state, frozen = split(model, tx.init)
  shape = (1, settings.batch_size, settings.seq_len)
  ids = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size)
  lengths = jnp.full(shape[:2], settings.seq_len, jnp.int32)
  batch = Batch(ids, jnp.roll(ids, -1, -1), jnp.ones(shape, bool), lengths)
  start = time.perf_counter()
  step = compiled(functools.partial(train_step, graph, tx), state, frozen, batch)
  row: dict[str, Any] = {"compile_s": time.perf_counter() - start}
  times, loss = [], float("nan")
  for _ in range(steps + 2):
    start = time.perf_counter()
    state, measured = step(state, frozen, batch)
    loss = float(measured["loss"])  # waits for the step
    times.append(time.perf_counter() - start)
  best = statistics.median(times[2:])
  stats = jax.devices()[0].memory_stats() or {}
  return row | {
    "tokens a step": ids.size,
    "tokens/s": ids.size / best,
    "ms": best * 1e3,
    "peak MiB": stats.get("peak_bytes_in_use", 0) / 2**20 or None,
    "temporaries MiB": step.memory_analysis().temp_size_in_bytes / 2**20,
    "loss": loss,
  }


def finetune(model: str, data: str | None, steps: int) -> dict[str, Any]:
  """Tokens a second of `finetune.py` on a real model."""
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "out"
    command = [sys.executable, str(EXAMPLE / "finetune.py"), "--model", model, "--out", str(out)]
    command += ["--steps", str(steps), "--save-every", "0"] + (["--data", data] if data else [])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
      raise RuntimeError(f"finetune.py failed: {(done.stderr or done.stdout)[-1500:]}")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
  timed = [r for r in records if "seconds" in r][2:]
  seconds, tokens = sum(r["seconds"] for r in timed), sum(r["tokens"] for r in timed)
  return {"tokens/s": tokens / seconds, "steps": len(timed), "said": done.stdout[-800:]}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--section")
  parser.add_argument("--params", type=float)
  parser.add_argument("--leaves", type=int)
  parser.add_argument("--repeat", type=int)
  parser.add_argument("--model")
  parser.add_argument("--data")
  args = parser.parse_args()
  rows = {"random weights": lambda: random_weights(args.repeat)}
  if args.model:
    rows["finetune.py"] = lambda: finetune(args.model, args.data, args.repeat + 2)
  for name, measure in rows.items():
    try:
      row = measure()
    except Exception as error:  # the other row goes on
      row = {"error": "".join(traceback.format_exception(error))[-1500:]}
    print(json.dumps({"name": name} | row), flush=True)


if __name__ == "__main__":
  main()
