"""The JAX sections of `gpu.py`: correctness, bandwidth, steps, tiles. A row is a line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_lowmem as lowmem

ON_GPU = jax.devices()[0].platform == "gpu"
KERNEL = "pallas" if ON_GPU else "interpret"
NAME = "optax_lowmem_update"  # of the kernel, in the lowered program


def report(name: str, measure: Callable[[], dict[str, Any]]) -> None:
  """Prints what `measure` returns, or its error, as one line."""
  try:
    row = measure()
  except Exception as error:  # whatever it is, the other rows go on
    detail = "".join(traceback.format_exception(error))
    row = {"error": detail[-1500:]}
  print(json.dumps({"name": name} | row), flush=True)


def leaves_of(params: float, leaves: int, key: int, scale: float) -> list[jax.Array]:
  """Square bf16 arrays of about `params` elements in all."""
  side = max(64, round((params / leaves) ** 0.5 / 64) * 64)
  make = jax.jit(lambda k: (jax.random.normal(k, (side, side)) * scale).astype(jnp.bfloat16))
  return [make(k) for k in jax.random.split(jax.random.key(key), leaves)]


def nbytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def cost(tx: optax.GradientTransformation, mode: str, args: argparse.Namespace) -> dict[str, Any]:
  """Time, bytes and temporaries of a step of `tx` with kernels as `mode` says."""
  os.environ["OPTAX_LOWMEM_KERNELS"] = mode  # read when the step is traced, below
  params, grads = (leaves_of(args.params, args.leaves, k, s) for k, s in ((0, 0.02), (1, 1e-3)))
  state = jax.jit(tx.init)(params)
  size = sum(p.size for p in params)
  row = {"B/param": nbytes(state) / size}
  row["moved"] = nbytes(grads) + 2 * nbytes(params) + 2 * nbytes(state)

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  start = time.perf_counter()
  lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads)
  kernels = lowered.as_text().count(NAME)
  if mode == "pallas" and not kernels:
    raise RuntimeError("the kernel was asked for, and the program has none")
  row["trace_s"] = time.perf_counter() - start
  start = time.perf_counter()
  compiled = lowered.compile()
  row["compile_s"] = time.perf_counter() - start
  memory = compiled.memory_analysis()
  assert memory is not None, "this backend does not count bytes"
  row["temp B/param"] = memory.temp_size_in_bytes / size
  for _ in range(2):
    params, state = compiled(params, state, grads)
  jax.block_until_ready(params)
  times = []
  for _ in range(3):  # steps follow each other without a wait, as in training
    start = time.perf_counter()
    for _ in range(args.repeat):
      params, state = compiled(params, state, grads)
    jax.block_until_ready((params, state))
    times.append((time.perf_counter() - start) / args.repeat)
  row["step_s"] = min(times)
  row["ms"] = min(times) * 1e3
  return row


def steps(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
  """The optimizers, each by XLA and, where its state is quantized, by the kernel."""
  # Optax's own moments would be bf16, as the parameters are; `bits=32` is optax.adamw in float32.
  yield "adamw, float32 state", lambda: cost(lowmem.adamw(1e-3, bits=32), "xla", args)
  yield "optax.adamw, bf16 state", lambda: cost(optax.adamw(1e-3), "xla", args)
  for bits in (8, 4):
    for mode in ("xla", KERNEL):
      yield (
        f"adamw, {bits} bits, {mode}",
        lambda bits=bits, mode=mode: cost(lowmem.adamw(1e-3, bits=bits), mode, args),
      )
  for mode in ("xla", KERNEL):
    yield f"lion, 8 bits, {mode}", lambda mode=mode: cost(lowmem.lion(1e-4), mode, args)


def tiles(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
  """8-bit AdamW by the kernel with other tiles, on a quarter of the leaves."""
  from optax_lowmem.kernels import _pallas

  args.leaves, args.params = max(1, args.leaves // 4), args.params / 4

  def one(tile, warps):
    _pallas.TILE, _pallas.WARPS = tile, warps
    return cost(lowmem.adamw(1e-3), KERNEL, args)

  pairs = [(1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8)]
  for tile, warps in pairs if ON_GPU else pairs[:1]:
    yield f"tile {tile}, {warps} warps", lambda tile=tile, warps=warps: one(tile, warps)


def bandwidth(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
  """What a copy moves: as many bytes as the parameters, read and written."""

  def measure():
    # Exclusive or, because XLA would give a plain copy back as the same buffer.
    copy = jax.jit(lambda x: x ^ 1)
    x = jnp.zeros(max(1 << 16, int(args.params) // 2), jnp.uint32)
    jax.block_until_ready(copy(x))
    best = float("inf")
    for _ in range(10):
      start = time.perf_counter()
      jax.block_until_ready(copy(x))
      best = min(best, time.perf_counter() - start)
    return {"GB": 2 * x.nbytes / 1e9, "ms": best * 1e3, "GB/s": 2 * x.nbytes / best / 1e9}

  yield "copy", measure


def correctness(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
  """The kernel against XLA, bit by bit: 20 steps, each of both from XLA's state.

  The two compilers may contract a product and a sum differently; what then differs is a scale by
  its last bit, and a code where a value lies between two.
  """
  del args
  shapes = {"whole tiles": (64, 512), "a masked tile": (37, 192)}
  optimizers = {
    "adamw, 8 bits": lambda: lowmem.adamw(1e-3),
    "adamw, 4 bits": lambda: lowmem.adamw(1e-3, bits=4),
    "lion, 8 bits": lambda: lowmem.lion(1e-4),
  }

  def compare(make):
    tx = make()
    params: Any
    keys = jax.random.split(jax.random.key(3), len(shapes))
    params = {
      name: (jax.random.normal(key, shape) * 0.02).astype(jnp.bfloat16)
      for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    state = tx.init(params)
    both = {}
    for mode in ("xla", KERNEL):
      os.environ["OPTAX_LOWMEM_KERNELS"] = mode
      # A function of its own: a cached trace would be that of the other mode.
      lowered = jax.jit(lambda *x: tx.update(*x)).lower(params, state, params)
      both[mode] = lowered.compile()
    if KERNEL == "pallas" and NAME not in lowered.as_text():
      raise RuntimeError("the kernel was asked for, and the program has none")
    different, total, worst = {}, {}, 0.0
    for i in range(20):
      draw = jax.random.split(jax.random.key(i), len(params))
      grads = {
        name: (jax.random.normal(k, p.shape) * 1e-3).astype(p.dtype)
        for k, (name, p) in zip(draw, params.items(), strict=True)
      }
      (a, state), (b, other) = (both[m](grads, state, params) for m in ("xla", KERNEL))
      for x, y in zip(jax.tree.leaves((a, state)), jax.tree.leaves((b, other)), strict=True):
        kind = str(x.dtype)
        different[kind] = different.get(kind, 0) + int((x != y).sum())
        total[kind] = total.get(kind, 0) + x.size
        if kind == "float32":
          worst = max(worst, float(jnp.max(jnp.abs(x - y) / jnp.maximum(x, 1e-37))))
      params = optax.apply_updates(params, a)
    return {
      "equal": not any(different.values()),
      "codes": f"{different['uint8']} of {total['uint8']}",
      "scales": f"{different['float32']} of {total['float32']}",
      "updates": f"{different['bfloat16']} of {total['bfloat16']}",
      "scales differ by at most": worst,
    }

  for name, make in optimizers.items():
    yield name, lambda make=make: compare(make)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--section", choices=("correctness", "bandwidth", "steps", "tiles"))
  parser.add_argument("--params", type=float)
  parser.add_argument("--leaves", type=int)
  parser.add_argument("--repeat", type=int)
  args = parser.parse_args()
  for name, measure in globals()[args.section](args):
    report(name, measure)


if __name__ == "__main__":
  main()
