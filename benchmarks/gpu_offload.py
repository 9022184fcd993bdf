"""The section "offload" of `gpu.py`: optimizer state in host memory. A row is a line of JSON.

The link bounds a step from below: all of the state comes and goes, both ways at once at best. A row
says that bound, and how much of the link's time is hidden behind the step's own work:
1 - (ms - ms with the state on the device) / bound.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_lowmem as lowmem
from gpu_steps import leaves_of, report

Measure = Callable[[], dict[str, Any]]
ADAMW = lowmem.adamw(1e-3, bits=32)
STREAM = 256 << 20  # the bytes of state that `offloaded` has on the device at any time
WAYS = ("to device GB/s", "to host GB/s")


def link(args: argparse.Namespace) -> dict[str, Any]:
  """GB/s from pinned host memory to the device, and back."""
  x = jnp.zeros(max(1 << 20, int(args.params) // 4), jnp.uint32)
  row: dict[str, Any] = {"GB": x.nbytes / 1e9}
  host = jax.device_put(x, jax.memory.Space.Host)
  spaces = (host, jax.memory.Space.Device), (x, jax.memory.Space.Host)
  for name, (source, space) in zip(WAYS, spaces, strict=True):
    best = float("inf")
    for _ in range(5):
      start = time.perf_counter()
      jax.block_until_ready(jax.device_put(source, space))
      best = min(best, time.perf_counter() - start)
    row[name] = x.nbytes / best / 1e9
  return row


def cost(tx: optax.GradientTransformation, args: argparse.Namespace, work: int) -> dict[str, Any]:
  """Time of a step behind `work` matrix products a leaf, as a backward pass has, and its memory."""
  params = leaves_of(args.params, args.leaves, 0, 0.02)
  state = tx.init(params)

  def step(params, state, x):
    def loss(params):
      h = x
      for p in params:
        for _ in range(work):
          h = jnp.tanh(h @ p)
      return jnp.sum(h.astype(jnp.float32) ** 2) + sum(
        jnp.sum(p.astype(jnp.float32)) for p in params
      )

    grads = jax.grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  x = jnp.ones((2048, params[0].shape[0]), jnp.bfloat16)
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x).compile()
  memory = compiled.memory_analysis()
  assert memory is not None, "this backend does not count bytes"
  row: dict[str, Any] = {
    "state": lowmem.state_bytes(state),
    "device temporaries": memory.temp_size_in_bytes,
    "host temporaries": getattr(memory, "host_temp_size_in_bytes", None),
  }
  for _ in range(2):
    params, state = compiled(params, state, x)
  jax.block_until_ready((params, state))
  start = time.perf_counter()
  for _ in range(args.repeat):
    params, state = compiled(params, state, x)
  jax.block_until_ready((params, state))
  row["ms"] = (time.perf_counter() - start) / args.repeat * 1e3
  return row


def fits(tx: optax.GradientTransformation, args: argparse.Namespace) -> dict[str, Any]:
  """Steps of `tx`, or the error that ends them, and the peak of this process."""
  params, grads = (leaves_of(args.params, args.leaves, k, 0.02) for k in (0, 1))
  params = jax.device_put(params, jax.devices()[0])  # committed, as pages are: compiled once

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  step, state = jax.jit(step, donate_argnums=(0, 1)), tx.init(params)
  for _ in range(3):
    params, state = step(params, state, grads)
  jax.block_until_ready((params, state))
  stats = jax.local_devices()[0].memory_stats() or {}
  return {"done": True, "peak bytes": stats.get("peak_bytes_in_use")}


def capped(place: str, args: argparse.Namespace) -> dict[str, Any]:
  """`fits` in a process that may use what a step needs beside its state, and half of the state."""
  params = jax.eval_shape(lambda: leaves_of(args.params, args.leaves, 0, 0.02))
  state = sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(ADAMW.init, params))
  )
  # Parameters, gradients, updates; what `offloaded` has of the state on the device at any time.
  beside = 3 * sum(x.size * x.dtype.itemsize for x in params) + min(state, STREAM)
  limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
  row: dict[str, Any] = {"state GB": state / 1e9}
  environment = dict(os.environ)
  if limit:  # of a GPU; JAX takes three quarters of it unless told
    row["cap GB"] = (beside + state / 2) / 1e9
    environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{(beside + state / 2) / (limit / 0.75):.6f}"
  command = [sys.executable, __file__, "--fits", place, "--params", str(args.params)]
  command += ["--leaves", str(args.leaves), "--repeat", "1"]
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
  if done.returncode or not lines:
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return row | {"done": False, "why": last[:200]}
  return row | json.loads(lines[-1])


def offload(args: argparse.Namespace) -> Iterator[tuple[str, Measure]]:
  """The link; steps with state on the device and on the host, alone and behind products; a cap."""
  known: dict[str, Any] = {}

  def linked() -> dict[str, Any]:
    known.update(link(args))
    return {key: value for key, value in known.items() if key != "ms"}

  def measured(tx: optax.GradientTransformation, place: str, work: int) -> dict[str, Any]:
    row = cost(lowmem.offloaded(tx) if place == "host" else tx, args, work)
    if place == "device":
      known["ms"] = row["ms"]
    elif {"ms", *WAYS} <= known.keys():
      row["bound ms"] = row["state"]["pinned_host"] / min(known[way] for way in WAYS) / 1e6
      if row["bound ms"]:
        row["hidden"] = 1 - (row["ms"] - known["ms"]) / row["bound ms"]
    return row

  yield "link", linked
  for work in (0, 4):
    for bits in (8, 32):
      tx = lowmem.adamw(1e-3, bits=bits)
      for place in ("device", "host"):
        yield (
          f"adamw, {bits} bits, {place}, {work} products",
          lambda tx=tx, place=place, work=work: measured(tx, place, work),
        )
  for place in ("device", "host"):
    yield f"does not fit, {place}", lambda place=place: capped(place, args)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--section", choices=("offload",))
  parser.add_argument("--params", type=float)
  parser.add_argument("--leaves", type=int)
  parser.add_argument("--repeat", type=int)
  parser.add_argument("--fits", choices=("device", "host"), help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.fits:
    tx = lowmem.offloaded(ADAMW) if args.fits == "host" else ADAMW
    print(json.dumps(fits(tx, args)))
    return
  for name, measure in offload(args):
    report(name, measure)


if __name__ == "__main__":
  main()
