"""Parameters in bfloat16: what they cost, compiled for an H100.

python benchmarks/bf16.py [--json FILE]

A training step of 16 matrices of 2048 x 2048 with gradients from a backward pass of 256 rows
(`benchmarks/compiled` says what is needed). Bytes a parameter are all that is on the device:
parameters, state, gradients, activations.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

import optax_lowmem as lowmem
from _measure import write
from compiled import compile_for
from compiled.steps import parameters, training_step

MATRICES, WIDTH = 16, 2048
MASTERS, CLIP = lowmem.master_weights, optax.clip_by_global_norm(1.0)
RULES = {
  "optax.adamw, float32": optax.adamw(1e-5),
  "optax.adamw, bfloat16 alone": optax.adamw(1e-5),
  "adamw, bfloat16 alone": lowmem.adamw(1e-5),
  "stochastic_rounding(adamw)": lowmem.stochastic_rounding(lowmem.adamw(1e-5), seed=0),
  "master_weights(adamw, bits=8)": MASTERS(lowmem.adamw(1e-5), bits=8),
  "the same, adamw with bits=4": MASTERS(lowmem.adamw(1e-5, bits=4), bits=8),
  "master_weights(adamw)": MASTERS(lowmem.adamw(1e-5)),
  "the same, with a clip within": MASTERS(optax.chain(CLIP, lowmem.adamw(1e-5))),
  "the same, with the clip before it": optax.chain(CLIP, MASTERS(lowmem.adamw(1e-5))),
  "master_weights(lion)": MASTERS(lowmem.lion(1e-5)),
  "came, bfloat16 alone": lowmem.came(1e-5),
  "master_weights(came)": MASTERS(lowmem.came(1e-5)),
  "master_weights(optax.adamw)": MASTERS(optax.adamw(1e-5)),
}

Row = Mapping[str, float]


def measured(name: str) -> Row:
  """Bytes a parameter on the device and of temporaries, launches and traffic."""
  dtype = jnp.float32 if "float32" in name else jnp.bfloat16
  compiled = compile_for(*training_step(RULES[name], parameters(MATRICES, WIDTH, dtype)))
  size = MATRICES * WIDTH**2
  return {
    "all": compiled.device_bytes / size,
    "temporaries": compiled.temp_bytes / size,
    "moved": compiled.traffic.hbm / size,
    "launches": compiled.kernels,
  }


HEAD = [
  "| | all, B/param | of it temporaries | moved, B/param | launches |",
  "|---|---|---|---|---|",
]


def line(name: str, one: Row) -> str:
  cells = f"{one['all']:.2f} | {one['temporaries']:.2f} | {one['moved']:.1f} | {one['launches']}"
  return f"| {name} | {cells} |"


def tables(found: dict[str, Any]) -> dict[str, list[str]]:
  """The lines of the page's table."""
  return {"step": [*HEAD, *(line(*one) for one in found["step"].items())]}


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--json", help="also write the result to this file")
  arguments = parser.parse_args()
  print("\n".join(HEAD), flush=True)
  found = {}
  for name in RULES:
    found[name] = measured(name)
    print(line(name, found[name]), flush=True)
  write(arguments.json, {"step": found})


if __name__ == "__main__":
  main()
