"""What an optimizer costs: state, temporaries, step time and compile time, side by side.

python benchmarks/step.py [--shape 4096 4096] [--repeat 15] [--json FILE]

A step is update and apply, compiled, with parameters and state donated. Temporaries are those of
the update beyond gradients, updates and state (`temp_size_in_bytes` of the compiled update).
Times are of one run: compare the ratios, not the milliseconds of another machine.
"""

from __future__ import annotations

import argparse
import math
import time

import jax
import jax.numpy as jnp
import optax
from _measure import seconds, write

import optax_lowmem as lowmem


def rows():
  """What is compared; the first of a family is what the others are measured against."""
  dynamic = {
    "mu": lowmem.Blockwise("dynamic", 256),
    "nu": lowmem.Blockwise("dynamic_unsigned", 256),
  }
  return [
    ("optax.adamw", optax.adamw(1e-3)),
    ("adamw, 32 bits", lowmem.adamw(1e-3, bits=32)),
    ("adamw, 8 bits", lowmem.adamw(1e-3)),
    ("adamw, dynamic map", lowmem.quantized(optax.adamw(1e-3), storage=dynamic)),
    ("optax.lion", optax.lion(1e-4)),
    ("lion, 8 bits", lowmem.lion(1e-4)),
    ("optax.sgd", optax.sgd(1e-2, momentum=0.9)),
    ("sgd, 8 bits", lowmem.sgd(1e-2, momentum=0.9)),
  ]


def measure(tx: optax.GradientTransformation, shape: tuple[int, ...], repeat: int):
  """Costs of one transformation on one array of `shape`, in bytes a parameter and seconds."""
  size = math.prod(shape)
  keys = jax.random.split(jax.random.key(0))
  params = jax.random.normal(keys[0], shape) * 0.02
  grads = jax.random.normal(keys[1], shape) * 1e-3
  state = jax.jit(tx.init)(params)
  state_bytes = sum(lowmem.state_bytes(state).values()) / size

  update = jax.jit(tx.update, donate_argnums=(0, 1))
  temporaries = update.lower(grads, state, params).compile().memory_analysis().temp_size_in_bytes

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  start = time.perf_counter()
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
  compile_seconds = time.perf_counter() - start
  carry = [params, state]

  def run():
    carry[:] = compiled(*carry, grads)
    return carry

  return {
    "state": state_bytes,
    "temporaries": temporaries / size,
    "step": seconds(run, repeat),
    "compile": compile_seconds,
  }


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--shape", type=int, nargs="+", default=[4096, 4096])
  parser.add_argument("--repeat", type=int, default=15)
  parser.add_argument("--json", help="also write the result to this file")
  args = parser.parse_args()
  shape = tuple(args.shape)

  jax.block_until_ready(jnp.zeros(1))  # start the backend before the first compile is timed
  print(f"one float32 array of shape {shape}, {jax.devices()[0].platform}\n")
  print("| | state | temporaries | step | against optax | compile |")
  print("|---|---|---|---|---|---|")
  results, base = {}, None
  for name, tx in rows():
    r = results[name] = measure(tx, shape, args.repeat)
    base = r["step"]["min"] if name.startswith("optax.") else base
    r["ratio"] = r["step"]["min"] / base
    print(
      f"| {name} | {r['state']:.3f} B/param | {r['temporaries']:.3f} B/param "
      f"| {r['step']['min'] * 1e3:.1f} ms | {r['ratio']:.2f} | {r['compile']:.2f} s |",
      flush=True,
    )
  write(args.json, {"shape": shape, "rows": results})


if __name__ == "__main__":
  main()
