"""The tables and curves of the docs, made of the runs of `reproduce.py`.

In a document a table stands between ``<!-- reproduce: NAME -->`` and ``<!-- end -->``; what is
between them is replaced.
"""

from __future__ import annotations

import pathlib
import re
import statistics
from collections.abc import Iterator
from typing import Any

Runs = dict[str, dict[str, Any]]
DOCS = ("README.md", "docs/training.md", "docs/factored.md")
MEASURES = {"language": "perplexity of a byte", "digits": "right, %"}
# Published: what was measured, with 32 bits (or Adam), with 8 bits (or the other optimizer).
PUBLISHED = (
  ("8-bit Adam against 32-bit, GLUE, mean score", "88.6", "88.7"),
  ("8-bit Adam against 32-bit, a language model of 1.5 B, perplexity", "9.0", "9.0"),
  ("4-bit AdamW against 32-bit, GLUE, mean score", "88.9", "89.1"),
  ("CAME against Adam, GPT-2 medium, memory in GiB", "8.77", "7.44"),
)


def seeds(runs: Runs, task: str, optimizer: str, bits: int) -> dict[int, dict[str, Any]]:
  """The runs of a cell, by seed."""
  found = {}
  for key, run in runs.items():
    name, rule, width, seed = key.split("/")
    if (name, rule, int(width)) == (task, optimizer, bits):
      found[int(seed)] = run
  return dict(sorted(found.items()))


def against(runs: dict[int, Any], reference: dict[int, Any]) -> list[float]:
  """How much higher the loss is, in percent, by seed."""
  return [100 * (runs[k]["loss"] / reference[k]["loss"] - 1) for k in runs if k in reference]


def spread(values: list[float], form: str) -> str:
  """The mean of the seeds, and from where to where they lie."""
  if not values:
    return "none"
  mean = format(statistics.mean(values), form)
  if len(values) == 1:
    return mean
  return f"{mean} ({format(min(values), form)} to {format(max(values), form)})"


def cells(runs: Runs) -> Iterator[tuple[str, str, int]]:
  """Tasks, optimizers and widths, in the order of the runs."""
  parts = (key.split("/") for key in runs)
  yield from dict.fromkeys((task, rule, int(bits)) for task, rule, bits, _ in parts)


def said(runs: Runs, task: str) -> str:
  """What a table is of."""
  mine = [run for key, run in runs.items() if key.startswith(f"{task}/")]
  count = max(len({key.split("/")[3] for key in runs if key.startswith(f"{task}/")}), 1)
  steps, size = mine[0]["steps"], mine[0]["parameters"]
  return f"{size:,} parameters, {steps:,} steps, {count} seed{'s' * (count > 1)}."


def widths(runs: Runs, task: str) -> str:
  """Every optimizer at every width, against itself in float32."""
  measure = MEASURES[task]
  lines = [
    said(runs, task),
    "",
    f"| | held-out loss | {measure} | against its own 32 bits | state |",
    "|---|---|---|---|---|",
  ]
  for name, optimizer, bits in cells(runs):
    if name != task:
      continue
    mine, reference = seeds(runs, task, optimizer, bits), seeds(runs, task, optimizer, 32)
    losses = spread([run["loss"] for run in mine.values()], ".4f")
    values = spread([run[measure] for run in mine.values()], ".2f")
    change = "" if bits == 32 else spread(against(mine, reference), "+.2f") + " %"
    state = next(iter(mine.values()))["state bytes"] / 1e6
    lines.append(f"| {optimizer}, {bits} bits | {losses} | {values} | {change} | {state:.2f} MB |")
  return "\n".join(lines)


def rules(runs: Runs, task: str) -> str:
  """Adafactor and CAME against AdamW, as their articles have it."""
  adamw = seeds(runs, task, "adamw", 32)
  size = next(iter(adamw.values()))["state bytes"]
  lines = [
    said(runs, task),
    "",
    "| | held-out loss | against AdamW, 32 bits | state, of AdamW's |",
    "|---|---|---|---|",
  ]
  for optimizer in ("adamw", "adafactor", "came"):
    for bits in (32, 8, 4):
      mine = seeds(runs, task, optimizer, bits)
      if not mine:
        continue
      losses = spread([run["loss"] for run in mine.values()], ".4f")
      change = spread(against(mine, adamw), "+.2f")
      part = next(iter(mine.values()))["state bytes"] / size
      lines.append(f"| {optimizer}, {bits} bits | {losses} | {change} % | {part:.1%} |")
  return "\n".join(lines)


def published(runs: Runs) -> str:
  """Figures of the articles, and ours of the same form."""
  lines = [
    "| published | 32 bits, or Adam | 8 or 4 bits, or CAME |",
    "|---|---|---|",
    *(f"| {what} | {first} | {second} |" for what, first, second in PUBLISHED),
    "",
    "| here | 32 bits, or AdamW | the other |",
    "|---|---|---|",
  ]
  pairs = (("adamw", 8), ("adamw", 4), ("came", 8))
  for task, measure in MEASURES.items():
    first = seeds(runs, task, "adamw", 32)
    for optimizer, bits in pairs:
      second = seeds(runs, task, optimizer, bits)
      if first and second:
        a, b = (spread([r[measure] for r in x.values()], ".3f") for x in (first, second))
        lines.append(f"| {optimizer}, {bits} bits, {task}: {measure} | {a} | {b} |")
  return "\n".join(lines)


def tables(runs: Runs) -> dict[str, str]:
  """Of each marker, the table."""
  there = [task for task in MEASURES if seeds(runs, task, "adamw", 32)]
  made = {task: widths(runs, task) for task in there}
  made |= {f"{task} rules": rules(runs, task) for task in there}
  return made | ({"published": published(runs)} if there else {})


def write_docs(root: pathlib.Path, made: dict[str, str]) -> None:
  """Replaces what stands between the markers of the docs."""
  for name in DOCS:
    text = path_text = (root / name).read_text()
    for marker, table in made.items():
      pattern = rf"(<!-- reproduce: {re.escape(marker)} -->\n).*?(<!-- end -->)"
      text = re.sub(pattern, lambda m, t=table: m[1] + t + "\n" + m[2], text, flags=re.DOTALL)
    if text != path_text:
      (root / name).write_text(text)
      print(f"written: {name}")


def draw(path: pathlib.Path, runs: Runs) -> None:
  """Draws the language model's curves: a panel for each rule, a line for each width and seed."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  task = "language"
  names = list(dict.fromkeys(rule for name, rule, _ in cells(runs) if name == task))
  rows = -(-len(names) // 5)
  figure, axes = plt.subplots(rows, 5, figsize=(15, 3 * rows), sharey=True, squeeze=False)
  for panel, rule in zip(axes.flat, names, strict=False):
    for color, bits in enumerate((32, 8, 4)):
      for k, run in seeds(runs, task, rule, bits).items():
        every = run["steps"] // len(run["curve"])
        at = [every * (i + 1) for i in range(len(run["curve"]))]
        label = f"{bits} bits" if k == 0 else None
        panel.plot(at, run["curve"], f"C{color}", lw=0.9, alpha=0.8, label=label)
    panel.set(title=rule, xlabel="step")
  axes[0, 0].set_ylabel("held-out loss, nats a byte")
  axes[0, 0].legend(frameon=False)
  figure.tight_layout()
  figure.savefig(path, metadata={"Date": None})
  print(f"drawn in {path}")
