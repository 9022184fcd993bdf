"""What an optimizer costs: state, temporaries, step time and compile time, side by side.

python benchmarks/step.py [--shape 4096 4096] [--repeat 15] [--leaves 300] [--json FILE]

A step is update and apply, compiled, with parameters and state donated, of a gradient that the step
makes itself, the time of which is taken off. Temporaries are those of the update beyond gradients,
updates and state (`temp_size_in_bytes` of the compiled update).
Optimizers take turns of five steps, so that all see the same machine; compare the ratios, not the
milliseconds of another one. The five are dispatched ahead, as a training loop does: waited for one
by one, steps of many small kernels now and then fall to one of two cores for seconds. Peers are
measured where they are installed: bitsandbytes and torchao after all others, in the same process.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_lowmem as lowmem
from _measure import write

AHEAD = 5


def rows() -> dict[str, list[tuple[str, optax.GradientTransformation]]]:
  """What is compared, by family; the first of a family is what the others are measured against."""
  dynamic = {
    "mu": lowmem.Blockwise("dynamic", 256),
    "nu": lowmem.Blockwise("dynamic_unsigned", 256),
  }
  log = {"mu": lowmem.Blockwise("log8"), "nu": lowmem.Blockwise("log8_unsigned")}
  return {
    "adamw": [
      ("optax.adamw", optax.adamw(1e-3)),
      ("adamw, 32 bits", lowmem.adamw(1e-3, bits=32)),
      ("adamw, 8 bits", lowmem.adamw(1e-3)),
      ("adamw, 4 bits", lowmem.adamw(1e-3, bits=4)),
      ("adamw, log codes", lowmem.quantized(optax.adamw(1e-3), storage=log)),
      ("adamw, dynamic map", lowmem.quantized(optax.adamw(1e-3), storage=dynamic)),
    ],
    "lion": [
      ("optax.lion", optax.lion(1e-4)),
      ("lion, 8 bits", lowmem.lion(1e-4)),
      ("lion, 4 bits", lowmem.lion(1e-4, bits=4)),
    ],
    "sgd": [
      ("optax.sgd", optax.sgd(1e-2, momentum=0.9)),
      ("sgd, 8 bits", lowmem.sgd(1e-2, momentum=0.9)),
      ("sgd, 4 bits", lowmem.sgd(1e-2, momentum=0.9, bits=4)),
    ],
    "adafactor": [
      ("optax.adafactor", optax.adafactor(1e-3)),
      ("adafactor, no momentum", lowmem.adafactor(1e-3)),
      ("optax.adafactor, momentum", optax.adafactor(1e-3, momentum=0.9)),
      ("adafactor, 8 bits", lowmem.adafactor(1e-3, momentum=0.9)),
      ("came, 32 bits", lowmem.came(1e-3, bits=32)),
      ("came, 8 bits", lowmem.came(1e-3)),
      ("came, 4 bits", lowmem.came(1e-3, bits=4)),
    ],
    "lamb": [
      ("optax.lamb", optax.lamb(1e-3)),
      ("lamb, 8 bits", lowmem.lamb(1e-3)),
      ("lamb, 4 bits", lowmem.lamb(1e-3, bits=4)),
    ],
  }


def step_of(tx: optax.GradientTransformation) -> jax.stages.Wrapped:
  """Update and apply, to be compiled with parameters and state donated."""

  def step(params, state, thin):
    updates, state = tx.update(gradient(thin, params), state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(step, donate_argnums=(0, 1))


def thin_matrices(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  """Two matrices whose product has as many elements as an array of `shape`."""
  keys = jax.random.split(jax.random.key(1))
  sides = math.prod(shape[:-1]), shape[-1]
  a, b = (jax.random.normal(k, (n, 16)) * 0.02 for k, n in zip(keys, sides, strict=True))
  return a, b


def gradient(thin: tuple[jax.Array, jax.Array], params: jax.Array) -> jax.Array:
  """A gradient that the step makes, as a training step does: an argument would be copied."""
  return (thin[0] @ thin[1].T).reshape(params.shape)


def sizes(tx: optax.GradientTransformation, shape: tuple[int, ...]) -> dict[str, float]:
  """State and temporaries of an array of `shape`, in bytes a parameter."""
  p, size = jax.ShapeDtypeStruct(shape, jnp.float32), math.prod(shape)
  state = jax.eval_shape(tx.init, p)
  update = jax.jit(tx.update, donate_argnums=(0, 1)).lower(p, state, p).compile()
  memory = update.memory_analysis()
  assert memory is not None, "this backend does not count bytes"
  return {
    "state": sum(lowmem.state_bytes(state).values()) / size,
    "temporaries": memory.temp_size_in_bytes / size,
  }


def times(
  family: list[tuple[str, optax.GradientTransformation]], shape: tuple[int, ...], repeat: int
) -> dict[str, dict[str, float]]:
  """Seconds of a step, by name, in turns of `AHEAD` steps, dispatched ahead as training does.

  Those of its gradient, made alone in the same turns, are taken off.
  """
  start = jax.random.normal(jax.random.key(0), shape) * 0.02
  thin = thin_matrices(shape)
  alone = jax.jit(gradient).lower(thin, start).compile()
  steps: dict[str, Any] = {"gradient": lambda params, state, thin: (params, alone(thin, params))}
  carries: dict[str, Any] = {"gradient": [start, None]}
  taken: dict[str, list[float]] = {name: [] for name in ("gradient", *(n for n, _ in family))}
  for name, tx in family:
    carries[name] = [jnp.array(start), jax.jit(tx.init)(start)]
    steps[name] = step_of(tx).lower(*carries[name], thin).compile()
  for turn in range(repeat + 1):
    for name, seconds in taken.items():
      before = time.perf_counter()
      for _ in range(AHEAD):
        carries[name] = steps[name](*carries[name], thin)
      jax.block_until_ready(carries[name])
      if turn:  # the first one is to warm up
        seconds.append((time.perf_counter() - before) / AHEAD)
  off = taken.pop("gradient")
  return {
    k: {"min": min(s) - min(off), "median": statistics.median(s) - statistics.median(off)}
    for k, s in taken.items()
  }


def compile_seconds(tx: optax.GradientTransformation, leaves: int) -> float:
  """Seconds to trace and compile the step of a tree of (256, 256) and (512, 256) arrays."""
  shapes = ((512, 256) if k % 3 == 0 else (256, 256) for k in range(leaves))
  params = {f"{k}": jax.ShapeDtypeStruct(s, jnp.float32) for k, s in enumerate(shapes)}
  state = jax.eval_shape(tx.init, params)

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  before = time.perf_counter()
  many = jax.jit(step, donate_argnums=(0, 1))
  many.lower(params, state, params).compile()
  return time.perf_counter() - before


def peers(shape: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Any]]]:
  """Name and step of the optimizers of PyTorch that are installed."""
  try:
    import torch
  except ImportError:
    return

  def stepper(make):
    p = torch.nn.Parameter(torch.randn(shape) * 0.02)
    p.grad = torch.randn(shape) * 1e-3
    return make([p]).step

  yield "torch.optim.AdamW, fused", lambda: stepper(lambda p: torch.optim.AdamW(p, fused=True))
  try:
    import bitsandbytes

    yield "bitsandbytes AdamW8bit", lambda: stepper(bitsandbytes.optim.AdamW8bit)
  except ImportError:
    pass
  try:
    import torchao.optim

    yield "torchao AdamW8bit", lambda: stepper(torchao.optim.AdamW8bit)
    yield "torchao AdamW4bit", lambda: stepper(torchao.optim.AdamW4bit)
  except ImportError:
    pass


HEAD = [
  "| | state | of (4096, 16) | temporaries | step | against optax |",
  "|---|---|---|---|---|---|",
]


def line(name: str, r: dict[str, Any]) -> str:
  """A rule as a line of the table."""
  sizes = " | ".join(f"{r[key]:.3f} B/param" for key in ("state", "small", "temporaries"))
  return f"| {name} | {sizes} | {1e3 * r['step']['median']:.1f} ms | {r['ratio']:.2f} |"


def tables(found: dict[str, Any]) -> dict[str, list[str]]:
  """The lines of the table of steps, and those of the time to compile, without their head."""
  rows = {name: r for name, r in found["rows"].items() if "ratio" in r}
  taken = {name: r["compile"] for name, r in rows.items() if "compile" in r}
  base = taken.get("optax.adamw", 1.0)
  return {
    "step": [*HEAD, *(line(*one) for one in rows.items())],
    "compile": [f"| {name} | {x:.1f} s | {x / base:.1f} |" for name, x in taken.items()],
  }


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--shape", type=int, nargs="+", default=[4096, 4096])
  parser.add_argument("--repeat", type=int, default=15)
  parser.add_argument("--leaves", type=int, default=300, help="of the tree that is compiled; or 0")
  parser.add_argument("--json", help="also write the result to this file")
  args = parser.parse_args()
  shape = tuple(args.shape)

  jax.block_until_ready(jnp.zeros(1))  # start the backend before a compile is timed
  print(f"one float32 array of shape {shape}, {jax.devices()[0].platform}\n")
  print(*HEAD, sep="\n")
  results: dict[str, Any] = {}
  for family in rows().values():
    seconds = times(family, shape, args.repeat)
    base = seconds[family[0][0]]
    for name, tx in family:
      r = results[name] = sizes(tx, shape) | {"step": seconds[name]}
      r["small"] = sizes(tx, (4096, 16))["state"]
      r["ratio"] = seconds[name]["median"] / base["median"]
      print(line(name, r), flush=True)

  if args.leaves:
    print(f"\n| {args.leaves} arrays | trace and compile | against optax |\n|---|---|---|")
    base = None
    for name, tx in rows()["adamw"][:4]:
      taken = results[name]["compile"] = compile_seconds(tx, args.leaves)
      base = base or taken
      print(f"| {name} | {taken:.1f} s | {taken / base:.1f} |", flush=True)

  base = results["optax.adamw"]["step"]["median"]
  print("\n| peers | step | against optax.adamw |\n|---|---|---|")
  for name, make in peers(shape):
    try:
      step = make()
      step()
      taken = []
      for _ in range(3):
        before = time.perf_counter()
        step()
        taken.append(time.perf_counter() - before)
    except Exception as error:  # a peer that cannot run here is not a reason to stop
      print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0][:80]} | |")
      continue
    results[name] = {"step": {"min": min(taken), "median": statistics.median(taken)}}
    middle = statistics.median(taken)
    print(f"| {name} | {middle * 1e3:.0f} ms | {middle / base:.1f} |", flush=True)
  write(args.json, {"shape": shape, "leaves": args.leaves, "rows": results})


if __name__ == "__main__":
  main()
