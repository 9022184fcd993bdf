"""Parameters in bfloat16: what they cost, compiled for an H100.

python benchmarks/bf16.py [--json FILE]

A training step of 16 matrices of 2048 x 2048 with gradients from a backward pass of 256 rows
(`benchmarks/compiled` says what is needed). Bytes a parameter are all that is on the device:
parameters, state, gradients, activations.
"""

from __future__ import annotations

import argparse

import jax.numpy as jnp
import optax

import optax_lowmem as lowmem
from _measure import write
from compiled import compile_for
from compiled.steps import parameters, training_step


def memory() -> dict[str, dict[str, float]]:
  """Bytes a parameter on the device and of temporaries, launches and traffic, by optimizer."""
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
  """Prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--json", help="also write the result to this file")
  write(parser.parse_args().json, memory())


if __name__ == "__main__":
  main()
