"""The update in the backward pass beside the ordinary step, compiled for an H100.

python benchmarks/backward.py [--unrolled] [--only {stacked,paged}] [--json FILE]

24 layers of a language model (1.2 G parameters, `compiled/layers.py`), 64 tokens, so that
activations are small (`benchmarks/compiled` says what is needed). Bytes a parameter are all that is
on the device: parameters, state, gradients, activations.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax.numpy as jnp
import optax

import optax_lowmem as lowmem
from _measure import write
from compiled import compile_for
from compiled.layers import LAYER_SIZE, LAYERS, SIZE, in_backward, ordinary, unrolled

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


def both() -> dict[str, dict[str, dict[str, float]]]:
  """Each rule both ways."""
  print(
    "| | all, B/param: ordinary | in backward | temporaries, in gradients of a layer | ", end=""
  )
  print("moved, B/param | launches |\n|---|---|---|---|---|---|")
  found = {}
  for name, (tx, dtype) in RULES.items():
    ways = {"ordinary": ordinary(tx, dtype), "in backward": in_backward(tx, dtype)}
    if name == "master_weights(adamw)":
      ways["clip_norm"] = in_backward(tx, dtype, clip_norm=1.0)
    found[name] = {way: measured(step, dtype) for way, step in ways.items()}
    old = found[name]["ordinary"]
    for way, new in list(found[name].items())[1:]:
      label = name if way == "in backward" else f"{name}, {way}"
      print(
        f"| {label} | {old['all']:.2f} | {new['all']:.2f} "
        f"| {old[TEMPORARIES]:.1f} → {new[TEMPORARIES]:.1f} | {old['moved']:.0f} → "
        f"{new['moved']:.0f} | {old['launches']} → {new['launches']} |",
        flush=True,
      )
  return found


TEMPORARIES = "layers' gradients"


def not_stacked() -> dict[str, dict[str, float]]:
  """The ordinary step of layers that are not stacked."""
  print("\n| layers not stacked | all, B/param | temporaries, in gradients of a layer |")
  print("|---|---|---|")
  found = {}
  for name in ("optax.adamw, float32", "optax.sgd, bfloat16", "master_weights(adamw)"):
    tx, dtype = RULES[name]
    one = found[name] = measured(unrolled(tx, dtype), dtype)
    print(f"| {name} | {one['all']:.2f} | {one[TEMPORARIES]:.1f} |", flush=True)
  return found


def paged() -> dict[str, dict[str, float]]:
  """The update in the backward pass, state on the device and in host memory, B/param."""
  print("\n| | on the device, B/param | with `offloaded` | the bound | on the host | launches |")
  print("|---|---|---|---|---|---|")
  found = {}
  for name in PAGED:
    tx, dtype = RULES[name]
    plain = compile_for(*in_backward(tx, dtype))
    step = in_backward(lowmem.offloaded(tx), dtype)
    ours, state = compile_for(*step), lowmem.state_bytes(step[1][1])["pinned_host"]
    one = found[name] = {
      "plain": plain.device_bytes / SIZE,
      "paged": ours.device_bytes / SIZE,
      "bound": (plain.device_bytes - state + 2 * state / LAYERS) / SIZE,
      "host": ours.host_bytes / SIZE,
      "host temporaries": ours.host_temp_bytes / SIZE,
      "launches": plain.kernels,
      "launches, paged": ours.kernels,
    }
    print(
      f"| {name} | {one['plain']:.2f} | **{one['paged']:.2f}** | {one['bound']:.2f} "
      f"| {one['host']:.2f} | {plain.kernels} → {ours.kernels} |",
      flush=True,
    )
  return found


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


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--unrolled", action="store_true", help="layers not stacked, too: minutes")
  parser.add_argument("--json", help="also write the result to this file")
  parser.add_argument("--only", choices=["stacked", "paged"], help="one of the tables")
  arguments = parser.parse_args()
  result: dict[str, Any] = {}
  if arguments.only != "paged":
    result["stacked"] = both()
  if arguments.only != "stacked":
    result["paged"] = paged()
  if arguments.unrolled:
    result["unrolled"] = not_stacked()
  write(arguments.json, result)


if __name__ == "__main__":
  main()
