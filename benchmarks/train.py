"""Does 8-bit state train as well as float32? A small transformer on real text, seed by seed.

python benchmarks/train.py [--steps 600] [--seeds 3] [--json FILE]

A byte-level causal transformer (2 layers, width 64, 137,000 parameters) learns the Chit-Chat
dialogues, the default data of the QLoRA example. Each seed draws one initialization and one order
of batches, which all optimizers share. The loss is that of 64 held-out batches.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import write

import optax_lowmem as lowmem

WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 64, 2, 4, 64, 16
LR = 8e-3  # the best of 2, 4, 8 and 16e-3 for float32 (seed 0, 600 steps)


def optimizers(steps: int) -> dict[str, optax.GradientTransformation]:
  """What is compared; the first is the reference."""
  lr = optax.warmup_cosine_decay_schedule(0.0, LR, steps // 10, steps)
  dynamic = {
    "mu": lowmem.Blockwise("dynamic", 256),
    "nu": lowmem.Blockwise("dynamic_unsigned", 256),
  }
  return {
    "optax.adamw": optax.adamw(lr),
    "adamw, 8 bits": lowmem.adamw(lr),
    "adamw, dynamic map": lowmem.quantized(optax.adamw(lr), storage=dynamic),
  }


def text() -> tuple[np.ndarray, np.ndarray]:
  """Bytes to learn from, and bytes held out."""
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples" / "qlora"))
  from fetch import default_data

  rows = [json.loads(line) for line in default_data().read_text("utf-8").splitlines()]
  lines = "\n\n".join("\n".join(m["content"] for m in row["messages"]) for row in rows)
  data = np.frombuffer(lines.encode(), np.uint8)
  cut = len(data) * 9 // 10
  return data[:cut], data[cut:]


def init(key: jax.Array) -> dict[str, jax.Array]:
  """The transformer's parameters, its layers stacked."""
  keys = iter(jax.random.split(key, 8))

  def matrix(*shape):
    return jax.random.normal(next(keys), shape) / np.sqrt(shape[-2])

  return {
    "embed": 0.02 * jax.random.normal(next(keys), (256, WIDTH)),
    "position": 0.02 * jax.random.normal(next(keys), (CONTEXT, WIDTH)),
    "qkv": matrix(LAYERS, WIDTH, 3 * WIDTH),
    "out": matrix(LAYERS, WIDTH, WIDTH),
    "up": matrix(LAYERS, WIDTH, 4 * WIDTH),
    "down": matrix(LAYERS, 4 * WIDTH, WIDTH),
    "norms": jnp.ones((LAYERS, 2, WIDTH)),
    "head": matrix(WIDTH, 256),
  }


def loss_of(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
  """Mean next-byte cross-entropy of (batch, context + 1) tokens."""

  def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale

  def layer(x, p):
    q, k, v = jnp.split(norm(x, p["norms"][0]) @ p["qkv"], 3, -1)
    heads = (*x.shape[:-1], HEADS, WIDTH // HEADS)
    q, k, v = (a.reshape(heads) for a in (q, k, v))
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + attended.reshape(x.shape) @ p["out"]
    return x + jax.nn.gelu(norm(x, p["norms"][1]) @ p["up"]) @ p["down"], None

  x = params["embed"][tokens[:, :-1]] + params["position"]
  stacked = {k: params[k] for k in ("qkv", "out", "up", "down", "norms")}
  x, _ = jax.lax.scan(layer, x, stacked)
  logits = norm(x, 1.0) @ params["head"]
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def batches(data: np.ndarray, count: int, seed: int) -> np.ndarray:
  """(count, batch, context + 1) tokens from random places."""
  starts = np.random.default_rng(seed).integers(0, len(data) - CONTEXT - 1, (count, BATCH))
  return data[starts[..., None] + np.arange(CONTEXT + 1)].astype(np.int32)


def train(tx: optax.GradientTransformation, params, tokens):
  """Trains over (steps, batch, context + 1) tokens; returns parameters and state."""

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, batch):
    grads = jax.grad(loss_of)(params, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for batch in tokens:
    params, state = step(params, state, batch)
  return params, state


def run(steps: int, seeds: int) -> dict[str, list[float]]:
  """Held-out loss by optimizer and seed."""
  learn, held = text()
  held_tokens = batches(held, 64, seed=10_000)
  result: dict[str, list[float]] = {}
  print(f"{steps} steps of {BATCH} x {CONTEXT} bytes, {seeds} seeds\n")
  print("| | held-out loss, by seed | mean | against the first | state |")
  print("|---|---|---|---|---|")
  for name, tx in optimizers(steps).items():
    losses, held_bytes = [], 0
    for seed in range(seeds):
      tokens = batches(learn, steps, seed)
      params, state = train(tx, init(jax.random.key(seed)), tokens)
      each = jax.lax.map(functools.partial(loss_of, params), held_tokens)
      losses.append(float(each.mean()))
      held_bytes = sum(lowmem.state_bytes(state).values())
    result[name] = losses
    mean = np.mean(losses)
    first = np.mean(next(iter(result.values())))
    print(
      f"| {name} | {', '.join(f'{x:.4f}' for x in losses)} | {mean:.4f} "
      f"| {100 * (mean / first - 1):+.2f} % | {held_bytes / 1e6:.2f} MB |",
      flush=True,
    )
  return result


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--steps", type=int, default=600)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--json", help="also write the result to this file")
  args = parser.parse_args()
  write(args.json, {"steps": args.steps, "held_out_loss": run(args.steps, args.seeds)})


if __name__ == "__main__":
  main()
