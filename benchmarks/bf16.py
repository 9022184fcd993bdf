"""Parameters in bfloat16: what they cost compiled for an H100, and whether they train.

python benchmarks/bf16.py [train | memory] [--steps 2000] [--seeds 3] [--lr 1e-5] [--json FILE]

`train`: the byte-level transformer of `train.py` learns real text in float32 for 200 steps, is
rounded to bfloat16, and is trained on with AdamW at a small, constant learning rate. Each seed
draws one initialization and one order of batches, which all share. The loss is that of 64 held-out
batches, with the parameters as they are: in bfloat16, but for float32's.

`memory`: a training step of 16 matrices of 2048 x 2048 with gradients from a backward pass of 256
rows, compiled for an H100 (`benchmarks/compiled` says what that needs). Bytes a parameter are all
that is on the device: parameters, state, gradients, activations.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_lowmem as lowmem
from _measure import write
from train import LR, batches, init, loss_of, text

BEFORE = 200


def compared(lr: float, seed: int) -> dict[str, optax.GradientTransformation]:
  """What is trained; the first in float32, the others in bfloat16."""
  adamw = optax.adamw(lr)
  return {
    "float32": adamw,
    "bfloat16": lowmem.quantized(adamw, bits=32),  # moments in float32: only parameters stall
    "bfloat16, stochastic rounding": lowmem.stochastic_rounding(adamw, seed),
    "bfloat16, masters of 24 bits": lowmem.master_weights(adamw, bits=8),
    "bfloat16, masters of 32 bits": lowmem.master_weights(adamw),
    "the same, state in 8 bits": lowmem.master_weights(lowmem.adamw(lr)),
  }


def training(steps: int, seeds: int, lr: float) -> dict[str, list[float]]:
  """Held-out loss by run and seed, before and after."""
  learn, held_out = text()
  held = batches(held_out, 64, seed=10_000)
  result: dict[str, list[float]] = {"before": []}
  for seed in range(seeds):
    tokens = batches(learn, BEFORE + steps, seed)
    weights = trained(optax.adamw(LR), init(jax.random.key(seed)), tokens[:BEFORE])
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), weights)
    result["before"].append(float(held_out_loss(narrow, held)))
    for name, tx in compared(lr, seed).items():
      begin = in_float32(narrow) if name == "float32" else narrow
      end = trained(tx, begin, tokens[BEFORE:])
      result.setdefault(name, []).append(float(held_out_loss(end, held)))
  print(f"{steps} steps of AdamW at {lr:g} after {BEFORE} at {LR:g}, {seeds} seeds\n")
  print("| | held-out loss, by seed | against float32, by seed |")
  print("|---|---|---|")
  for name, losses in result.items():
    change = 100 * (np.array(losses) / np.array(result["float32"]) - 1)
    print(
      f"| {name} | {', '.join(f'{x:.4f}' for x in losses)} "
      f"| {', '.join(f'{x:+.3f}' for x in change)} % |"
    )
  return result


def in_float32(params):
  """What the model computes with: activations are float32 in every run."""
  return jax.tree.map(lambda p: p.astype(jnp.float32), params)


@functools.partial(jax.jit, static_argnums=0)
def trained(tx, params, tokens):
  """Parameters after a step on each batch."""

  def step(carry, batch):
    params, state = carry
    grads = jax.grad(lambda p: loss_of(in_float32(p), batch))(params)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, tx.init(params)), tokens)[0][0]


@jax.jit
def held_out_loss(params, held):
  return jax.lax.map(functools.partial(loss_of, in_float32(params)), held).mean()


def memory() -> dict[str, dict[str, float]]:
  """Bytes a parameter on the device and of temporaries, launches and traffic, by optimizer."""
  from compiled import compile_for
  from compiled.steps import parameters, training_step

  matrices, width = 16, 2048
  rules = {
    "optax.adamw, float32": optax.adamw(1e-5),
    "optax.adamw, bfloat16 alone": optax.adamw(1e-5),
    "adamw, bfloat16 alone": lowmem.adamw(1e-5),
    "stochastic_rounding(adamw)": lowmem.stochastic_rounding(lowmem.adamw(1e-5), seed=0),
    "master_weights(adamw, bits=8)": lowmem.master_weights(lowmem.adamw(1e-5), bits=8),
    "the same, adamw with bits=4": lowmem.master_weights(lowmem.adamw(1e-5, bits=4), bits=8),
    "master_weights(adamw)": lowmem.master_weights(lowmem.adamw(1e-5)),
    "master_weights(lion)": lowmem.master_weights(lowmem.lion(1e-5)),
    "master_weights(came)": lowmem.master_weights(lowmem.came(1e-5)),
    "master_weights(optax.adamw)": lowmem.master_weights(optax.adamw(1e-5)),
  }
  found = {}
  print("| | all, B/param | of it temporaries | moved, B/param | launches |")
  print("|---|---|---|---|---|")
  for name, tx in rules.items():
    dtype = jnp.float32 if "float32" in name else jnp.bfloat16
    compiled = compile_for(*training_step(tx, parameters(matrices, width, dtype)))
    size = matrices * width**2
    found[name] = {
      "all": compiled.device_bytes / size,
      "temporaries": compiled.temp_bytes / size,
      "moved": compiled.traffic.hbm / size,
      "launches": compiled.kernels,
    }
    one = found[name]
    print(
      f"| {name} | {one['all']:.2f} | {one['temporaries']:.2f} | {one['moved']:.1f} "
      f"| {one['launches']} |",
      flush=True,
    )
  return found


def main() -> None:
  """Prints a table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("what", nargs="?", choices=("train", "memory"), default="train")
  parser.add_argument("--steps", type=int, default=2000, help="at `--lr`")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--lr", type=float, default=1e-5)
  parser.add_argument("--json", help="also write the result to this file")
  args = parser.parse_args()
  if args.what == "memory":
    write(args.json, memory())
    return
  result = training(args.steps, args.seeds, args.lr)
  write(args.json, {"steps": args.steps, "learning_rate": args.lr, "held_out_loss": result})


if __name__ == "__main__":
  main()
