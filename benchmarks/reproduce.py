"""Trains with every optimizer at every width, and rewrites the tables and curves of the docs.

    python benchmarks/reproduce.py --quick                   # minutes: small, one seed; prints
    python benchmarks/reproduce.py [--only language/came …]  # hours on two cores; in pieces, too
    python benchmarks/reproduce.py --tables --write          # no training: docs of what is there
    python benchmarks/reproduce.py --sweep                   # learning rates, compared

A language model of 1.02 M parameters on real text (train.py's, larger) and a classifier of digits,
three seeds each. A seed draws one initialization and one order of batches, which all optimizers
share. Each run is written to the file of results as soon as it ends, under its task, optimizer,
width and seed, and what is there is not run again: stop it at any time and go on later.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import optax

import optax_lowmem as lowmem
from _measure import origin
from reproduce_tables import draw, tables, write_docs
from tasks import Task, task
from train import fit

RESULTS = pathlib.Path(__file__).parent / "results"
WIDTHS = (32, 8, 4)
POINTS = 20  # of a curve
# By name: of a learning rate and bits, the transformation.
OPTIMIZERS: dict[str, Callable[[Any, Any], optax.GradientTransformation]] = {
  "adamw": lambda lr, bits: lowmem.adamw(lr, bits=bits),
  "lion": lambda lr, bits: lowmem.lion(lr, bits=bits),
  "sgd": lambda lr, bits: lowmem.sgd(lr, momentum=0.9, bits=bits),
  "rmsprop": lambda lr, bits: lowmem.rmsprop(lr, bits=bits),
  "adagrad": lambda lr, bits: lowmem.adagrad(lr, bits=bits),
  "ademamix": lambda lr, bits: lowmem.ademamix(lr, bits=bits),
  "lamb": lambda lr, bits: lowmem.lamb(lr, bits=bits),
  "lars": lambda lr, bits: lowmem.lars(lr, bits=bits),
  "adafactor": lambda lr, bits: lowmem.adafactor(
    lr, momentum=0.9, bits=bits, min_dim_size_to_factor=32, multiply_by_parameter_scale=False
  ),
  "came": lambda lr, bits: lowmem.came(lr, bits=bits),
}


def one(of: Task, optimizer: str, bits: int, seed: int) -> dict[str, Any]:
  """Trains once."""
  rate = optax.warmup_cosine_decay_schedule(0.0, of.rates[optimizer], of.steps // 10, of.steps)
  tx = OPTIMIZERS[optimizer](rate, bits)
  batches, held = of.data(seed)
  begun = time.perf_counter()
  params = of.init(jax.random.key(seed))
  count = sum(x.size for x in jax.tree.leaves(params))
  done = fit(tx, params, batches, held, of.steps // POINTS, of.loss)
  last = done.curve[-1]
  found = {name: measure(done.params, held, last) for name, measure in of.measures.items()}
  return {
    "loss": last,
    **found,
    "curve": done.curve,
    "steps": of.steps,
    "parameters": count,
    "state bytes": sum(lowmem.state_bytes(done.state).values()),
    "seconds": time.perf_counter() - begun,
  }


FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def sweep(only: list[str] | None) -> None:
  """Prints what a small model ends with in 32 bits at several learning rates, by `tasks.RATES`."""
  for name in ("language", "digits"):
    of = dataclasses.replace(task(name, True), steps=200)
    print(f"\n| {name}, rate by | " + " | ".join(f"{f:g}" for f in FACTORS) + " |")
    print("|---|" + "---|" * len(FACTORS))
    for optimizer in OPTIMIZERS:
      if only and not any(part in f"{name}/{optimizer}" for part in only):
        continue
      losses = []
      for factor in FACTORS:
        rates = {optimizer: factor * of.rates[optimizer]}
        losses.append(one(dataclasses.replace(of, rates=rates), optimizer, 32, 0)["loss"])
      shown = " | ".join(f"{loss:.4f}" for loss in losses)
      print(f"| {optimizer}, {of.rates[optimizer]:g} | {shown} |", flush=True)


def saved(path: pathlib.Path) -> dict[str, Any]:
  """The runs that are in a file."""
  return json.loads(path.read_text())["runs"] if path.exists() else {}


def save(path: pathlib.Path, runs: dict[str, Any]) -> None:
  """Writes the runs, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_suffix(".part")
  new.write_text(json.dumps(origin() | {"runs": runs}, indent=1) + "\n")
  os.replace(new, path)


def all_runs(quick: bool, only: list[str] | None) -> list[str]:
  """Their names. Seeds come last, so that after a third of the time there is one of each."""
  names = [
    f"{name}/{optimizer}/{bits}/{seed}"
    for seed in range(1 if quick else 3)
    for name in ("language", "digits")
    for optimizer in OPTIMIZERS
    for bits in WIDTHS
  ]
  if quick:  # each takes some ten seconds, most of them to compile
    names = [n for n in names if (n.startswith("language") and "/4/" not in n) or "/adamw/" in n]
  return [name for name in names if not only or any(part in name for part in only)]


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--quick", action="store_true", help="small models, few steps, one seed")
  parser.add_argument("--only", nargs="+", help="parts of names: language/adamw/8/0, digits, came")
  parser.add_argument("--json", help="the file of results")
  parser.add_argument("--tables", action="store_true", help="train nothing; print what is there")
  parser.add_argument("--write", action="store_true", help="write the tables and curves to docs")
  parser.add_argument("--sweep", action="store_true", help="compare learning rates instead")
  args = parser.parse_args()
  if args.sweep:
    sweep(args.only)
    return
  name = "reproduce-quick-cpu.json" if args.quick else "reproduce-cpu.json"
  path = pathlib.Path(args.json) if args.json else RESULTS / name
  runs = saved(path)
  asked = [] if args.tables else all_runs(args.quick, args.only)
  for key in asked:
    name, optimizer, bits, seed = key.split("/")
    learnt = task(name, args.quick)
    if key in runs and runs[key]["steps"] == learnt.steps:
      continue
    runs[key] = one(learnt, optimizer, int(bits), int(seed))
    save(path, runs)
    print(f"{key}: {runs[key]['loss']:.4f}, {runs[key]['seconds']:.0f} s", flush=True)
  made = tables(runs)
  for marker, text in made.items():
    print(f"\n<!-- {marker} -->\n{text}")
  if args.write:
    root = pathlib.Path(__file__).parents[1]
    write_docs(root, made)
    draw(root / "docs/reproduce.svg", runs)


if __name__ == "__main__":
  main()
