"""The update in the backward pass beside the ordinary step, compiled for an H100.

python benchmarks/backward.py [--only stacked unrolled cut paged] [--json FILE]

24 layers of a language model (1.2 G parameters, `compiled/layers.py`), 64 tokens, so that
activations are small (`benchmarks/compiled` says what is needed). Bytes a parameter are all that is
on the device: parameters, state, gradients, activations. `unrolled` are layers that are not
stacked; `cut` is what it helps that each trip of the loop is cut, by the CPU's compiler, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_lowmem as lowmem
from _measure import write
from compiled import compile_for
from compiled.layers import (
  LAYER_SIZE,
  LAYERS,
  SIZE,
  as_one_program,
  in_backward,
  ordinary,
  unrolled,
)

MASTERS = lowmem.master_weights
RULES = {
  "optax.adamw, float32": (optax.adamw(1e-5), jnp.float32),
  "adamw, float32": (lowmem.adamw(1e-5), jnp.float32),
  "optax.sgd, bfloat16": (optax.sgd(1e-5), jnp.bfloat16),
  "adamw, bfloat16 alone": (lowmem.adamw(1e-5), jnp.bfloat16),
  "stochastic_rounding(adamw)": (
    lowmem.stochastic_rounding(lowmem.adamw(1e-5), seed=0),
    jnp.bfloat16,
  ),
  "master_weights(adamw)": (MASTERS(lowmem.adamw(1e-5)), jnp.bfloat16),
  "master_weights(adamw, bits=8)": (MASTERS(lowmem.adamw(1e-5), bits=8), jnp.bfloat16),
  "the same, adamw with bits=4": (MASTERS(lowmem.adamw(1e-5, bits=4), bits=8), jnp.bfloat16),
  "master_weights(lion)": (MASTERS(lowmem.lion(1e-5)), jnp.bfloat16),
  "master_weights(adafactor)": (MASTERS(lowmem.adafactor(1e-5)), jnp.bfloat16),
  "master_weights(came)": (MASTERS(lowmem.came(1e-5)), jnp.bfloat16),
  "master_weights(optax.adamw)": (MASTERS(optax.adamw(1e-5)), jnp.bfloat16),
}


def measured(step: Any, dtype: Any) -> dict[str, float]:
  """Bytes a parameter, temporaries in gradients of a layer, and launches."""
  compiled = compile_for(*step)
  return {
    "all": compiled.device_bytes / SIZE,
    "temporaries": compiled.temp_bytes / SIZE,
    "layers' gradients": compiled.temp_bytes / (LAYER_SIZE * jnp.dtype(dtype).itemsize),
    "moved": compiled.traffic.hbm / SIZE,
    "launches": compiled.kernels,
  }


def stacked() -> Iterator[tuple[str, dict[str, Any]]]:
  """Each rule both ways."""
  for name, (tx, dtype) in RULES.items():
    ways = {"ordinary": ordinary(tx, dtype), "in backward": in_backward(tx, dtype)}
    if name == "master_weights(adamw)":
      ways["clip_norm"] = in_backward(tx, dtype, clip_norm=1.0)
    yield name, {way: measured(step, dtype) for way, step in ways.items()}


def not_stacked() -> Iterator[tuple[str, dict[str, Any]]]:
  """The ordinary step of layers that are not stacked."""
  for name in ("optax.adamw, float32", "optax.sgd, bfloat16", "master_weights(adamw)"):
    tx, dtype = RULES[name]
    yield name, measured(unrolled(tx, dtype), dtype)


def cut() -> Iterator[tuple[str, dict[str, Any]]]:
  """Temporaries in gradients of a layer: an ordinary step, in the backward pass uncut, and cut."""
  ways = {"ordinary": ordinary, "as one program": as_one_program, "cut": in_backward}
  for name in ("optax.adamw, float32", "adamw, float32", "master_weights(adamw)"):
    tx, dtype = RULES[name]
    found: dict[str, Any] = {"h100": {}, "cpu": {}}
    for way, make in ways.items():
      step, args, donate = make(tx, dtype)
      compiled: Any = jax.jit(step, donate_argnums=donate).lower(*args).compile()
      held = compiled.memory_analysis().temp_size_in_bytes
      found["cpu"][way] = held / (LAYER_SIZE * jnp.dtype(dtype).itemsize)
      found["h100"][way] = measured((step, args, donate), dtype)[TEMPORARIES]
    yield name, found


PAGED = [
  "optax.adamw, float32",
  "adamw, float32",
  "stochastic_rounding(adamw)",
  "master_weights(adamw)",
  "master_weights(adamw, bits=8)",
  "the same, adamw with bits=4",
  "master_weights(adafactor)",
  "master_weights(came)",
  "master_weights(optax.adamw)",
]


def paged() -> Iterator[tuple[str, dict[str, Any]]]:
  """The update in the backward pass, state on the device and in host memory, B/param."""
  for name in PAGED:
    tx, dtype = RULES[name]
    plain = compile_for(*in_backward(tx, dtype))
    step = in_backward(lowmem.offloaded(tx), dtype)
    ours, state = compile_for(*step), lowmem.state_bytes(step[1][1])["pinned_host"]
    yield (
      name,
      {
        "plain": plain.device_bytes / SIZE,
        "paged": ours.device_bytes / SIZE,
        "bound": (plain.device_bytes - state + 2 * state / LAYERS) / SIZE,
        "host": ours.host_bytes / SIZE,
        "host temporaries": ours.host_temp_bytes / SIZE,
        "launches": plain.kernels,
        "launches, paged": ours.kernels,
      },
    )


TEMPORARIES = "layers' gradients"
SECTIONS = {"stacked": stacked, "unrolled": not_stacked, "cut": cut, "paged": paged}
HEADS = {
  "stacked": "| all, B/param: ordinary | in backward | temporaries, in gradients of a layer "
  "| moved, B/param | launches",
  "unrolled": "layers not stacked | all, B/param | temporaries, in gradients of a layer",
  "cut": "temporaries, in gradients of a layer | ordinary | in backward, as one program | cut",
  "paged": "| on the device, B/param | with `offloaded` | the bound | on the host | launches",
}


def head(section: str) -> list[str]:
  """The first lines of a section's table."""
  columns = HEADS[section]
  return [f"| {columns} |", "|---" * (columns.count("| ") + 1) + "|"]


def lines(section: str, name: str, one: dict[str, Any]) -> list[str]:
  """A rule's lines of a section's table."""
  if section == "unrolled":
    return [f"| {name} | {one['all']:.2f} | {one[TEMPORARIES]:.1f} |"]
  if section == "paged":
    held = f"{one['plain']:.2f} | **{one['paged']:.2f}** | {one['bound']:.2f} | {one['host']:.2f}"
    return [f"| {name} | {held} | {one['launches']} → {one['launches, paged']} |"]
  if section == "cut":
    wheres = {"h100": "an H100", "cpu": "a CPU"}
    return [
      f"| {name}, {where} | {' | '.join(f'{x:.1f}' for x in one[key].values())} |"
      for key, where in wheres.items()
    ]
  old, made = one["ordinary"], []
  for way, new in list(one.items())[1:]:
    label = name if way == "in backward" else f"{name}, {way}"
    made.append(
      f"| {label} | {old['all']:.2f} | {new['all']:.2f} "
      f"| {old[TEMPORARIES]:.1f} → {new[TEMPORARIES]:.1f} | {old['moved']:.0f} → "
      f"{new['moved']:.0f} | {old['launches']} → {new['launches']} |"
    )
  return made


def tables(found: dict[str, Any]) -> dict[str, list[str]]:
  """The lines of each section's table."""
  made = {}
  for section in (name for name in SECTIONS if name in found):
    made[section] = head(section)
    for name, one in found[section].items():
      made[section] += lines(section, name, one)
  return made


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS))
  parser.add_argument("--json", help="also write the result to this file")
  arguments = parser.parse_args()
  result: dict[str, Any] = {}
  for section in arguments.only:
    result[section] = {}
    print("", *head(section), sep="\n", flush=True)
    for name, one in SECTIONS[section]():
      result[section][name] = one
      print(*lines(section, name, one), sep="\n", flush=True)
  write(arguments.json, result)


if __name__ == "__main__":
  main()
