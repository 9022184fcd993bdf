"""The section "offload" of `gpu.py`: optimizer state in host memory. A row is a line of JSON."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from gpu_steps import leaves_of, report

import optax_lowmem as lowmem

Measure = Callable[[], dict[str, Any]]


def link(args: argparse.Namespace) -> dict[str, Any]:
  """GB/s from pinned host memory to the device, and back."""
  x = jnp.zeros(max(1 << 20, int(args.params) // 4), jnp.uint32)
  row: dict[str, Any] = {"GB": x.nbytes / 1e9}
  host = jax.device_put(x, jax.memory.Space.Host)
  for name, source, space in (
    ("to device", host, jax.memory.Space.Device),
    ("to host", x, jax.memory.Space.Host),
  ):
    best = float("inf")
    for _ in range(5):
      start = time.perf_counter()
      jax.block_until_ready(jax.device_put(source, space))
      best = min(best, time.perf_counter() - start)
    row[f"{name} GB/s"] = x.nbytes / best / 1e9
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
  stats = jax.local_devices()[0].memory_stats() or {}
  row["peak bytes"] = stats.get("peak_bytes_in_use")
  return row


def offload(args: argparse.Namespace) -> Iterator[tuple[str, Measure]]:
  """The link; then steps with state on the device and on the host, alone and behind products."""
  yield "link", lambda: link(args)
  for work in (0, 4):
    for bits in (8, 32):
      tx = lowmem.adamw(1e-3, bits=bits)
      for name, made in (("device", tx), ("host", lowmem.offloaded(tx))):
        yield (
          f"adamw, {bits} bits, {name}, {work} products",
          lambda made=made, work=work: cost(made, args, work),
        )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--section", choices=("offload",))
  parser.add_argument("--params", type=float)
  parser.add_argument("--leaves", type=int)
  parser.add_argument("--repeat", type=int)
  args = parser.parse_args()
  for name, measure in offload(args):
    report(name, measure)


if __name__ == "__main__":
  main()
