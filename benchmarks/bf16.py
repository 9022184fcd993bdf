"""Parameters in bfloat16: what they cost, compiled for an H100.

python benchmarks/bf16.py [--only step cpu] [--json FILE]

A training step of 16 matrices of 2048 x 2048 with gradients from a backward pass of 256 rows
(`benchmarks/compiled` says what is needed). Bytes a parameter are all that is on the device:
parameters, state, gradients, activations. On a CPU: what an update of one array takes beside
gradient, update and state.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import jax
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


def with_8_bits(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  return MASTERS(tx, bits=8)


ON_A_CPU = {
  "stochastic_rounding(adamw)": RULES["stochastic_rounding(adamw)"],
  "master_weights(adamw)": RULES["master_weights(adamw)"],
  "master_weights(adamw, bits=8)": RULES["master_weights(adamw, bits=8)"],
  "master_weights(optax.adamw)": RULES["master_weights(optax.adamw)"],
  "master_weights(optax.adamw, bits=8)": with_8_bits(optax.adamw(1e-5)),
  "came, bfloat16 alone": RULES["came, bfloat16 alone"],
  "master_weights(came)": RULES["master_weights(came)"],
  "master_weights(came, bits=8)": with_8_bits(lowmem.came(1e-5)),
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


def on_a_cpu(name: str) -> Row:
  """Temporaries of an update, in bytes a parameter, by the CPU's compiler."""
  params = parameters(1, WIDTH, jnp.bfloat16)
  tx = ON_A_CPU[name]
  update = jax.jit(tx.update, donate_argnums=(0, 1))
  compiled: Any = update.lower(params, jax.eval_shape(tx.init, params), params).compile()
  return {"temporaries": compiled.memory_analysis().temp_size_in_bytes / WIDTH**2}


# Of each section: the rules, what is measured of one, the head of the table, and the columns.
SECTIONS: dict[str, tuple[Any, Callable[[str], Row], str, str]] = {
  "step": (
    RULES,
    measured,
    "| all, B/param | of it temporaries | moved, B/param | launches",
    "{all:.2f} | {temporaries:.2f} | {moved:.1f} | {launches}",
  ),
  "cpu": (ON_A_CPU, on_a_cpu, "| on a CPU: temporaries, B/param", "{temporaries:.2f}"),
}


def head(section: str) -> list[str]:
  """The first lines of a section's table."""
  columns = SECTIONS[section][2]
  return [f"| {columns} |", "|---" * (columns.count("| ") + 1) + "|"]


def line(section: str, name: str, one: Row) -> str:
  """A rule as a line of a section's table."""
  return f"| {name} | {SECTIONS[section][3].format_map(one)} |"


def tables(found: dict[str, Any]) -> dict[str, list[str]]:
  """The lines of each section's table."""
  return {
    section: [*head(section), *(line(section, *one) for one in found[section].items())]
    for section in SECTIONS
    if section in found
  }


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS))
  parser.add_argument("--json", help="also write the result to this file")
  arguments = parser.parse_args()
  found: dict[str, dict[str, Row]] = {}
  for section in arguments.only:
    rules, measure, *_ = SECTIONS[section]
    print("", *head(section), sep="\n", flush=True)
    found[section] = {}
    for name in rules:
      found[section][name] = measure(name)
      print(line(section, name, found[section][name]), flush=True)
  write(arguments.json, found)


if __name__ == "__main__":
  main()
