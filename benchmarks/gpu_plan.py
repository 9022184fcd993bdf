"""The section "plan" of `gpu.py`: what `lowmem.plan` says of a step, beside the allocator's peak.

A row is a line of JSON. The peak of a process never falls, so that each optimizer has its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_lowmem as lowmem
from compiled import CARDS
from compiled.steps import parameters, training_step
from gpu_steps import report

OPTIMIZERS = {
  "optax.adamw": lambda: optax.adamw(1e-3),
  "adamw, 8 bits": lambda: lowmem.adamw(1e-3),
  "came": lambda: lowmem.came(1e-3),
  "adamw, 8 bits, offloaded": lambda: lowmem.offloaded(lowmem.adamw(1e-3)),
  "master_weights(adamw, 8 bits)": lambda: lowmem.master_weights(lowmem.adamw(1e-3)),
  "stochastic_rounding(adamw, 8 bits)": lambda: lowmem.stochastic_rounding(lowmem.adamw(1e-3), 0),
}


def card() -> str:
  """The card that is here, by its name in plans; where it has none, an H100."""
  words = {*jax.devices()[0].device_kind.lower().replace("-", " ").split()}
  return next((name for name in CARDS if {*name.split("-")} <= words), "h100")


def planned(name: str, width: int, matrices: int) -> dict[str, Any]:
  """One optimizer's plan, and the peak of two steps."""
  tx, shapes = OPTIMIZERS[name](), parameters(matrices, width, jnp.bfloat16)
  step, (_, _, x), donated = training_step(tx, shapes)
  said = lowmem.plan(shapes, tx, step=step, args=(x,), card=card())
  params = {key: jnp.full(p.shape, 1e-3, p.dtype) for key, p in shapes.items()}
  state, batch = tx.init(params), jnp.ones(x.shape, x.dtype)
  run = jax.jit(step, donate_argnums=donated)
  for _ in range(2):
    params, state = run(params, state, batch)
  jax.block_until_ready(params)
  stats = jax.devices()[0].memory_stats() or {}
  peak = stats.get("peak_bytes_in_use")
  row = {"card": card(), "compiler": said.compiler, "plan MB": said.device_bytes / 1e6}
  return row | ({"peak MB": peak / 1e6, "plan / peak": said.device_bytes / peak} if peak else {})


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--section", choices=("plan",))
  parser.add_argument("--params", type=float)
  parser.add_argument("--leaves", type=int)
  parser.add_argument("--repeat", type=int)
  parser.add_argument("--one", choices=OPTIMIZERS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  width = max(64, int((args.params / args.leaves) ** 0.5) // 64 * 64)
  if args.one:
    print(json.dumps(planned(args.one, width, args.leaves)))
    return
  command = [sys.executable, *sys.argv, "--one"]
  for name in OPTIMIZERS:

    def measure(name: str = name) -> dict[str, Any]:
      done = subprocess.run([*command, name], capture_output=True, text=True)
      if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
      return json.loads(done.stdout)

    report(name, measure)


if __name__ == "__main__":
  main()
