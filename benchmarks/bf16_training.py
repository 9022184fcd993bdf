"""Training in bfloat16 at a small learning rate: what stands still, what follows float32.

python benchmarks/bf16_training.py [--steps 1000] [--seeds 3] [--json FILE]

The transformer and the text of `train.py`, in batches of 4 rows. Each seed learns in float32 at
4e-3, as before a fine-tuning, then goes on with AdamW at 1e-5: in float32, and in bfloat16 in
several ways, on the same batches. Losses and gradients are computed in float32 of parameters as
they are held, so that only what holds them differs. Batches held out are 64.

Then how far masters of 24 bits are from those of 32, at several learning rates, of the first seed
but for 1e-5. Those of 32 bits are float32 training bit for bit (`tests/test_masters.py`), so they
stand for it. 8 minutes on one core.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_lowmem as lowmem
from _measure import write
from train import LR, batches, init, loss_of, text

RATE = 1e-5
RATES = (1e-5, 1e-4, 1e-3)
FIRST, ROWS = 300, 4  # steps in float32, and rows of a batch

Ways = Mapping[str, Callable[[float], optax.GradientTransformation]]
MASTERS: Ways = {
  "master_weights": lambda lr: lowmem.master_weights(optax.adamw(lr)),
  "master_weights, bits=8": lambda lr: lowmem.master_weights(optax.adamw(lr), bits=8),
}
WAYS: Ways = {
  "float32": optax.adamw,
  "bfloat16 alone": optax.adamw,
  "stochastic_rounding": lambda lr: lowmem.stochastic_rounding(optax.adamw(lr), seed=0),
  **MASTERS,
  "master_weights, bits=8, adamw in 8 bits": lambda lr: lowmem.master_weights(
    lowmem.adamw(lr), bits=8
  ),
}


def in_float32(params: Any) -> Any:
  return jax.tree.map(lambda p: p.astype(jnp.float32), params)


@functools.partial(jax.jit, static_argnums=0)
def trained(tx: optax.GradientTransformation, params: Any, state: Any, tokens: Any) -> Any:
  """Parameters and state after a step for each of the batches."""

  def step(carry, batch):
    params, state = carry
    grads = jax.grad(lambda p: loss_of(in_float32(p), batch))(params)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, state), tokens)[0]


@jax.jit
def held_out(params: Any, held: Any) -> jax.Array:
  """The loss of the batches held out."""
  return jax.lax.map(functools.partial(loss_of, in_float32(params)), held).mean()


def start(tx: optax.GradientTransformation, weights: Any, narrow: bool) -> tuple[Any, Any]:
  """Parameters and state that begin at `weights`, without loss where there are masters."""
  if not narrow:
    return weights, tx.init(weights)
  params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
  state = tx.init(params)
  if isinstance(state, lowmem.MasterWeightsState):
    params, state = lowmem.with_master_params(weights, params, state)
  return params, state


def weights_of(params: Any, state: Any) -> Any:
  """What is trained: masters, or parameters."""
  if isinstance(state, lowmem.MasterWeightsState):
    return lowmem.master_params(params, state)
  return in_float32(params)


def flat(tree: Any) -> np.ndarray:
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def distances(ours: Any, exact: Any, begin: Any, held: Any) -> dict[str, float]:
  """How far one run's weights are from another's; both began at `begin`."""
  a, b, c = flat(ours), flat(exact), flat(begin)
  losses = [float(held_out(w, held)) for w in (ours, exact)]
  return {
    "rms": float(np.sqrt(np.mean((a - b) ** 2))),
    "of the weights": float(np.linalg.norm(a - b) / np.linalg.norm(b)),
    "of the way": float(np.linalg.norm(a - b) / np.linalg.norm(b - c)),
    "of the loss": abs(losses[0] / losses[1] - 1),
  }


def head(before: list[float]) -> list[str]:
  """The first lines of the table of ways, and the losses before."""
  return [
    "| | held-out loss, by seed | against float32, by seed | weights that changed |",
    "|---|---|---|---|",
    f"| before | {', '.join(f'{x:.4f}' for x in before)} | | |",
  ]


def line(name: str, ways: dict[str, Any]) -> str:
  """A way to hold parameters as a line of its table."""
  losses, theirs = ways[name]["loss"], ways["float32"]["loss"]
  against = ", ".join(f"{100 * (x / y - 1):+.2f}" for x, y in zip(losses, theirs, strict=True))
  changed = f"{100 * np.mean(ways[name]['changed']):.1f} %"
  return f"| {name} | {', '.join(f'{x:.4f}' for x in losses)} | {against} % | {changed} |"


def distance(rate: str, each: list[dict[str, float]]) -> str:
  """The largest distances over seeds as a line of their table."""
  worst = (max(one[key] for one in each) for key in each[0])
  return f"| {rate} | {' | '.join(f'{x:.1e}' for x in worst)} |"


def tables(found: dict[str, Any]) -> dict[str, list[str]]:
  """The lines of both tables, of the second without its head."""
  ways = found["ways"]
  return {
    "ways": [*head(found["before"]), *(line(name, ways) for name in ways)],
    "distances": [distance(*one) for one in found["distances"].items()],
  }


def run(steps: int, seeds: int) -> dict[str, Any]:
  """All of it; prints a table for each of the two questions."""
  learn, held = text()
  held = batches(held, 64, seed=10_000)
  first = optax.adamw(LR)
  begins, tokens = [], []
  for seed in range(seeds):
    tokens.append(batches(learn, FIRST + steps, seed)[:, :ROWS])
    weights = init(jax.random.key(seed))
    begins.append(trained(first, weights, first.init(weights), tokens[-1][:FIRST])[0])
  before = [float(held_out(w, held)) for w in begins]
  result: dict[str, Any] = {"before": before, "ways": {}, "distances": {}}
  ends: dict[str, list[Any]] = {}
  print(f"{steps} steps at {RATE:g} after {FIRST} at {LR:g} in float32, {seeds} seeds\n")
  print(*head(before), sep="\n")
  for name, way in WAYS.items():
    tx, losses, changed = way(RATE), [], []
    for begin, batch in zip(begins, tokens, strict=True):
      params, state = start(tx, begin, name != "float32")
      then = weights_of(params, state)
      params, state = trained(tx, params, state, batch[FIRST:])
      losses.append(float(held_out(params, held)))
      weights = weights_of(params, state)
      changed.append(float(np.mean(flat(weights) != flat(then))))
      ends.setdefault(name, []).append(weights)
    result["ways"][name] = {"loss": losses, "changed": changed}
    print(line(name, result["ways"]), flush=True)
  exact, eight = MASTERS
  print(f"\n| {eight}: after {steps} steps at | RMS | of the weights | of the way | of the loss |")
  print("|---|---|---|---|---|")
  for rate in RATES:
    each = []
    for k, (begin, batch) in enumerate(zip(begins, tokens, strict=True)):
      if rate == RATE:
        weights = [ends[name][k] for name in (eight, exact)]
      elif k:
        break
      else:
        weights = []
        for name in (eight, exact):
          tx = MASTERS[name](rate)
          params, state = start(tx, begin, narrow=True)
          weights.append(weights_of(*trained(tx, params, state, batch[FIRST:])))
      ours, theirs = weights
      each.append(distances(ours, theirs, begin, held))
    result["distances"][f"{rate:g}"] = each
    print(distance(f"{rate:g}", each), flush=True)
  return result


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--steps", type=int, default=1000)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--json", help="also write the result to this file")
  args = parser.parse_args()
  result = run(args.steps, args.seeds)
  write(args.json, {"steps": args.steps, "learning_rate": RATE, **result})


if __name__ == "__main__":
  main()
