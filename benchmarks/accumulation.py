"""Accumulated gradients in few bits: the error of their mean, and what they cost on an H100.

python benchmarks/accumulation.py [--only temporaries …] [--json FILE]

Error: 64 or 1,024 gradients of 2^17 elements, root of the mean square of their mean's error, as a
part of that of the mean; and the mean of the errors, in standard errors, where more than 4 is a
bias.
*Noise* are gradients of spread 1 about means of spread 0.05, *signal* of spread 0.3 about means of
spread 1; *decades* is noise whose elements differ in size by e^1.5 (one standard deviation), each
element's error as a part of its own size; *constant* the same gradient 64 times; *fading* is
signal, of which the second half has no mean.

Cost: a training step of 16 matrices of 2048 x 2048 with gradients from a backward pass of 256 rows,
8-bit AdamW (`benchmarks/compiled` says what is needed). Temporaries: of an update of one array, by
the CPU's compiler, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_lowmem as lowmem
from _measure import write
from compiled import compile_for, missing
from compiled.steps import parameters, training_step

SHAPE = (256, 512)
FLOATS = (  # of which many gradients are summed, too
  "`optax.MultiSteps`, bfloat16",
  "**`bits=16`**: bfloat16, at random",
  "**`bits=8`**: `sum8`",
)
KINDS = ("noise", "signal", "decades", "constant")
MANY = ("signal", "fading")


def gradients(kind: str, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Gradients, and what their elements' errors are measured by."""
  rng = np.random.default_rng(0)
  size = np.exp(1.5 * rng.standard_normal(SHAPE)) if kind == "decades" else np.ones(SHAPE)
  mean = rng.standard_normal(SHAPE) * (0.05 if kind in ("noise", "decades") else 1.0)
  spread = {"signal": 0.3, "fading": 0.3, "constant": 0.0}.get(kind, 1.0)
  stack = size * (mean + spread * rng.standard_normal((count, *SHAPE)))
  if kind == "fading":
    stack[count // 2 :] -= mean
  return stack.astype(np.float32), size


def by(tx: Any) -> Callable[[jax.Array], jax.Array]:
  """The mean that a transformation around nothing emits."""

  @jax.jit
  def run(stack):
    def body(state, g):
      updates, state = tx.update(g, state)
      return state, updates

    return jax.lax.scan(body, tx.init(stack[0]), stack)[1][-1]

  return run


def held_in(book: Any) -> Callable[[jax.Array], jax.Array]:
  """The mean by a sum in codes of a codebook, in blocks of 64."""
  storage = lowmem.Blockwise(book, 64)

  @jax.jit
  def run(stack):
    def body(total, g):
      return storage.load(storage.store(total + g)), None

    first = storage.load(storage.store(stack[0]))
    total, _ = jax.lax.scan(body, first, stack[1:-1])
    return (total + stack[-1]) / len(stack)

  return run


def in_24_bits(stack: jax.Array) -> jax.Array:
  """The mean by a sum in bfloat16 and 8 bits, rounded at random."""

  def rounded(x, key):
    pattern = jax.lax.bitcast_convert_type(x, jnp.int32)
    pattern = (pattern + jax.random.randint(key, x.shape, 0, 256)) & ~0xFF
    return jax.lax.bitcast_convert_type(pattern, jnp.float32)

  def body(total, x):
    return rounded(total + x[0], x[1]), None

  keys = jax.random.split(jax.random.key(0), len(stack) - 1)
  total, _ = jax.lax.scan(body, jnp.zeros_like(stack[0]), (stack[:-1], keys))
  return (total + stack[-1]) / len(stack)


def candidates(count: int) -> dict[str, tuple[float, Callable[[jax.Array], jax.Array]]]:
  """Bytes a parameter, and what makes a mean of gradients."""
  book = lowmem.get_codebook("sum8")
  other = functools.partial(dataclasses.replace, book, name="other")
  nearest = optax.MultiSteps(optax.identity(), count, accumulator_dtype=jnp.bfloat16)
  return {
    "`optax.MultiSteps`, float32": (4, by(optax.MultiSteps(optax.identity(), count))),
    "bfloat16 and 8 bits, at random": (3, jax.jit(in_24_bits)),
    "`optax.MultiSteps`, bfloat16": (2, by(nearest)),
    "**`bits=16`**: bfloat16, at random": (2, by(lowmem.multi_steps(optax.identity(), count))),
    "**`bits=8`**: `sum8`": (1.0625, by(lowmem.multi_steps(optax.identity(), count, bits=8))),
    "`sum8` to the nearest": (1.0625, held_in(other(dithered=False))),
    "`sum8` with w = 0.75, as `power8`": (1.0625, held_in(other(fourth=0.75))),
    "`sum8` with w = 0": (1.0625, held_in(other(fourth=0.0))),
    "`linear`, to the nearest": (1.0625, held_in("linear")),
  }


def errors(count: int, kinds: Sequence[str], names: Sequence[str] | None = None) -> dict[str, Any]:
  """The error of each candidate."""
  found: dict[str, Any] = {}
  data = {kind: gradients(kind, count) for kind in kinds}
  for name, (held, run) in candidates(count).items():
    if names is not None and name not in names:
      continue
    sizes, biases = [], []
    for stack, scale in data.values():
      exact = stack.astype(np.float64).mean(0) / scale
      error = np.asarray(run(jnp.asarray(stack)), np.float64) / scale - exact
      size = math.sqrt((error**2).mean())
      sizes.append(size / math.sqrt((exact**2).mean()))
      along = (error * np.sign(exact)).mean()
      if size:
        biases.append(max(abs(error.mean()), abs(along)) / size * math.sqrt(error.size))
    found[name] = {"bytes": held, "errors": sizes, "biases": biases}
  return found


def memory() -> dict[str, Any]:
  """Bytes a parameter, launches and traffic of a training step."""
  matrices, width = 16, 2048
  adamw = functools.partial(lowmem.adamw, 1e-4)
  rules = {
    "adamw alone": adamw(),
    "multi_steps, bits=8": lowmem.multi_steps(adamw(), 4, bits=8),
    "multi_steps, bits=16": lowmem.multi_steps(adamw(), 4),
    "optax.MultiSteps": optax.MultiSteps(adamw(), 4),
    "loss_scaling": lowmem.loss_scaling(adamw()),
    "loss_scaling(multi_steps, bits=8)": lowmem.loss_scaling(
      lowmem.multi_steps(adamw(), 4, bits=8)
    ),
    "optax.MultiSteps(optax.adamw)": optax.MultiSteps(optax.adamw(1e-4), 4),
    "multi_steps(optax.adamw), bits=8": lowmem.multi_steps(optax.adamw(1e-4), 4, bits=8),
  }
  found = {}
  size = matrices * width**2
  for name, tx in rules.items():
    compiled: Any = compile_for(*training_step(tx, parameters(matrices, width)))
    found[name] = {
      "all": compiled.device_bytes / size,
      "temporaries": compiled.temp_bytes / size,
      "moved": compiled.traffic.hbm / size,
      "launches": compiled.kernels,
    }
  return found


def temporaries() -> dict[str, dict[str, float]]:
  """Bytes a parameter that an update of one array needs beside its arguments and results.

  Gradients in bfloat16 are not donated: nothing that is returned can take their place.
  """
  ours, theirs = lowmem.adamw(1e-4), optax.adamw(1e-4)
  cases: dict[str, tuple[Any, Any, int]] = {}
  for dtype, said in ((jnp.float32, ""), (jnp.bfloat16, ", gradients in bfloat16")):
    for name, inner in (("adamw", ours), ("optax.adamw", theirs)):
      for bits in (8, 16):
        tx = lowmem.multi_steps(inner, 4, bits=bits)
        cases[f"`multi_steps({name}), bits={bits}`{said}"] = tx, dtype, 2048
  cases["`loss_scaling(adamw)`"] = lowmem.loss_scaling(ours), jnp.float32, 2048
  cases["`loss_scaling(optax.adamw)`"] = lowmem.loss_scaling(theirs), jnp.float32, 2048
  small = ", 1024 x 1024"
  bare = lowmem.multi_steps(optax.identity(), 4, bits=8)
  cases[f"`multi_steps(optax.identity()), bits=8`{small}"] = bare, jnp.float32, 1024
  cases[f"`adamw` alone{small}"] = ours, jnp.float32, 1024
  found = {}
  for name, (tx, dtype, side) in cases.items():
    params, grads = ({"w": jax.ShapeDtypeStruct((side, side), d)} for d in (jnp.float32, dtype))
    args = grads, jax.eval_shape(tx.init, params), params
    donated = (0, 1) if dtype == jnp.float32 else (1,)
    here: Any = jax.jit(tx.update, donate_argnums=donated).lower(*args).compile().memory_analysis()
    there = compile_for(tx.update, args, donated)
    found[name] = {
      "cpu": here.temp_size_in_bytes / side**2,
      "h100": there.temp_bytes / side**2,
    }
  return found


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
  "64": lambda: errors(64, KINDS),
  "1024": lambda: errors(1024, MANY, FLOATS),
  "memory": memory,
  "temporaries": temporaries,
}
_COMPILED = ("memory", "temporaries")


def _head(*columns: str) -> list[str]:
  return [f"| {' | '.join(columns)} |".replace("|  |", "| |"), "|---" * len(columns) + "|"]


def tables(found: dict[str, Any]) -> dict[str, list[str]]:
  """The lines of each section's table."""
  made: dict[str, list[str]] = {}
  for section, kinds in (("64", KINDS), ("1024", MANY)):
    name, last = f"mean of {int(section):,}", "mean error, standard errors"
    made[section] = _head(name, "B/param", *kinds, last)
    for name, one in found.get(section, {}).items():
      sizes = " | ".join(f"{100 * x:.2g} %" for x in one["errors"])
      made[section].append(f"| {name} | {one['bytes']:.4g} | {sizes} | {max(one['biases']):.1f} |")
  made["memory"] = _head("", "all, B/param", "of it temporaries", "moved, B/param", "launches")
  for name, one in found.get("memory", {}).items():
    cells = f"{one['all']:.2f} | {one['temporaries']:.2f} | {one['moved']:.0f} | {one['launches']}"
    made["memory"].append(f"| `{name}` | {cells} |")
  made["temporaries"] = _head("", "on a CPU", "on an H100")
  for name, one in found.get("temporaries", {}).items():
    made["temporaries"].append(f"| {name} | {one['cpu']:.2f} | {one['h100']:.2f} |")
  return made


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS))
  parser.add_argument("--json", help="also write the result to this file")
  arguments = parser.parse_args()
  found: dict[str, Any] = {}
  for name in arguments.only:
    if name in _COMPILED and missing() is not None:
      continue
    found[name] = SECTIONS[name]()
    print("", *tables(found)[name], sep="\n", flush=True)
  write(arguments.json, found)


if __name__ == "__main__":
  main()
