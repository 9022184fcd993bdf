"""A Llama of 1.1 billion parameters trained whole on a CPU: the process's memory beside the plan.

    python benchmarks/one_billion.py [--only "adamw, 8 bits"] [--tokens 32] [--steps 2]
        [--limit 12GB] [--json results/one-billion-cpu.json]

The shape of TinyLlama 1.1B in bfloat16, with weights at random: nothing is fetched. Each optimizer
trains in a process of its own, on one row of random tokens again and again, so that the loss must
fall. The program is compiled first; the plan is what its compiler says of it, and what is above
`--limit` is planned and not run. Beside it stands how much the process has grown since before the
first array was made, at its peak (`ru_maxrss`).

On a CPU host and device are one memory: pages count with the rest, and `offloaded` lowers nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optax_lowmem as lowmem
from _measure import write
from optax_lowmem._arguments.sizes import bytes_of
from optax_lowmem.qlora.loading.llama import abstract_llama
from optax_lowmem.qlora.planning.model_source import config_of

GB = 10**9
MODEL, LR = "tinyllama-1.1b", 1e-3
# A CPU multiplies in float32, and XLA would widen the weights of all layers before the loop over
# them: 16.6 GB in the place of 13.2 with Llama 3.2 1B.
FLAGS = (
  "--xla_disable_hlo_passes=while-loop-invariant-code-motion,"
  "while-loop-expensive-invariant-code-motion"
)
OPTIMIZERS: dict[str, Callable[[], Any]] = {
  "adamw, 8 bits": lambda: lowmem.adamw(LR),
  "offloaded(adamw, 8 bits)": lambda: lowmem.offloaded(lowmem.adamw(LR)),
  "offloaded(adamw, 4 bits)": lambda: lowmem.offloaded(lowmem.adamw(LR, bits=4)),
  "master_weights(adamw, 8 bits)": lambda: lowmem.master_weights(lowmem.adamw(LR)),
  "master_weights(adamw, 4 bits)": lambda: lowmem.master_weights(lowmem.adamw(LR, bits=4)),
  "adamw, 4 bits": lambda: lowmem.adamw(LR, bits=4),
  "came, 8 bits": lambda: lowmem.came(LR),
  "adamw, 32 bits": lambda: lowmem.adamw(LR, bits=32),
}


def weights(shapes: Any) -> Any:
  """Weights at random for these shapes, a row at a time; norms are ones."""
  rng = np.random.default_rng(0)

  def made(path, x):
    if "norm" in jax.tree_util.keystr(path):
      return jnp.ones(x.shape, x.dtype)
    found = np.empty(x.shape, x.dtype)
    rows: Any = found if x.ndim > 2 else np.array_split(found, 16)
    for row in rows:
      row[:] = 0.02 * rng.standard_normal(row.shape, np.float32)
    return jnp.asarray(found)

  return jax.tree_util.tree_map_with_path(made, shapes)


def grown() -> int:
  """The process's peak of memory so far, in bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(name: str, tokens: int, steps: int, limit: int) -> dict[str, Any]:
  """Compiles the step of an optimizer, runs it if it is below the limit, and measures."""
  tx = OPTIMIZERS[name]()
  model = abstract_llama(config_of(MODEL), None, jnp.dtype("bfloat16"), "chunked")
  graph, shapes, rest = nnx.split(model, nnx.Param, ...)
  count = sum(x.size for x in jax.tree.leaves(shapes))

  def step(params, state, ids):
    def loss_of(params):
      logits = nnx.merge(graph, params, rest)(ids[:, :-1]).astype(jnp.float32)
      return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  ids = jax.random.randint(jax.random.key(1), (1, tokens + 1), 0, 1000)
  plan = lowmem.plan(shapes, tx)
  state_shapes = jax.eval_shape(tx.init, shapes)
  if plan.host_bytes:
    state_shapes = lowmem.paged(state_shapes)
  begun = time.perf_counter()
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(shapes, state_shapes, ids).compile()
  took = time.perf_counter() - begun
  stats: Any = compiled.memory_analysis()
  planned = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
  planned += stats.temp_size_in_bytes
  found: dict[str, Any] = {
    "optimizer": name,
    "parameters": count,
    "weights GB": plan.of("weights") / GB,
    "state GB": sum(plan.state_bytes.values()) / GB,
    "gradients GB": plan.of("gradients") / GB,
    "planned GB": planned / GB,
  }
  if planned > limit:
    return found | {"grown GB": None, "error %": None, "seconds a step": None, "losses": []}
  before = grown()
  params = weights(shapes)
  state = jax.block_until_ready(tx.init(params))
  print(f"{name}: made at {grown() / GB:.2f} GB", file=sys.stderr, flush=True)
  losses, times = [], []
  for _ in range(steps):
    begun = time.perf_counter()
    params, state, loss = compiled(params, state, ids)
    losses.append(float(loss))
    times.append(time.perf_counter() - begun)
    print(
      f"{losses[-1]:.3f}, {times[-1]:.0f} s, {grown() / GB:.2f} GB", file=sys.stderr, flush=True
    )
  peak = grown() - before
  return found | {
    "grown GB": peak / GB,
    "error %": 100 * (planned / peak - 1),
    "seconds a step": min(times),
    "losses": losses,
    "before GB": before / GB,
    "seconds to compile": took,
  }


HEAD = [
  "| | weights, GB | state | gradients | planned, whole step | grown to | error | seconds a step "
  "| loss |",
  "|---|---|---|---|---|---|---|---|---|",
]


def line(row: dict[str, Any]) -> str:
  """An optimizer as a line of the table."""
  shapes = (f"{row[f'{k} GB']:.2f}" for k in ("weights", "state", "gradients", "planned"))
  first = f"| {row['optimizer']} | {' | '.join(shapes)} |"
  if row["grown GB"] is None:
    return f"{first} not run | | | |"
  losses = ", ".join(f"{x:.2f}" for x in row["losses"])
  ran = f"{row['grown GB']:.2f} | {row['error %']:.1f} % | {row['seconds a step']:.0f} | {losses}"
  return f"{first} {ran} |"


def tables(found: dict[str, Any]) -> dict[str, list[str]]:
  """The lines of the table."""
  return {"rows": [*HEAD, *map(line, found["rows"])]}


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--only", choices=OPTIMIZERS, nargs="+", default=list(OPTIMIZERS))
  parser.add_argument("--tokens", type=int, default=32, help="of the one row")
  parser.add_argument("--steps", type=int, default=2)
  parser.add_argument("--limit", default="12GB", help="what a process may take")
  parser.add_argument("--json", help="file to write the result to; other optimizers' rows stay")
  parser.add_argument("--here", help=argparse.SUPPRESS)
  args = parser.parse_args()
  limit = bytes_of("--limit", args.limit)
  if args.here:
    found = train(args.only[0], args.tokens, args.steps, limit)
    pathlib.Path(args.here).write_text(json.dumps(found))
    return
  rows: dict[str, Any] = {}
  if args.json and pathlib.Path(args.json).exists():
    rows = {r["optimizer"]: r for r in json.loads(pathlib.Path(args.json).read_text())["rows"]}
  print(*HEAD, sep="\n", flush=True)
  for name in args.only:
    with tempfile.TemporaryDirectory() as folder:
      command = [sys.executable, __file__, "--only", name, "--tokens", str(args.tokens)]
      command += ["--steps", str(args.steps), "--limit", args.limit, "--here", f"{folder}/row"]
      flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
      env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
      subprocess.run(command, check=True, env=env)
      row = rows[name] = json.loads(pathlib.Path(folder, "row").read_text())
    print(line(row), flush=True)
    ordered = [rows[n] for n in OPTIMIZERS if n in rows]
    write(args.json, {"model": MODEL, "tokens": args.tokens, "rows": ordered})


if __name__ == "__main__":
  main()
