"""Draws the pictures of the documentation from the results in benchmarks/results.

python benchmarks/figures.py [--out docs/figures]

Each is a small SVG. What it was drawn from is in it, as a hash of the results and of this file, so
that a test can tell a stale one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

RESULTS = pathlib.Path(__file__).parent / "results"
OUT = pathlib.Path(__file__).parents[1] / "docs" / "figures"
# Text stays text, so that files are small and no font is needed to draw them; ids do not vary.
STYLE: dict[Any, Any] = {
  "svg.fonttype": "none",
  "svg.hashsalt": "optax_lowmem",
  "font.family": "sans-serif",
  "font.size": 9,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.titlesize": 10,
  "axes.titlelocation": "left",
  "legend.frameon": False,
}
BLUE, ORANGE, GREEN, GREY, PALE = "#3366aa", "#dd8833", "#449966", "#888888", "#dddddd"


def result(name: str) -> dict[str, Any]:
  return json.loads((RESULTS / name).read_text())


def memory() -> Figure:
  """What a device holds to train all of a 7B, and what optimizers keep for a 70B."""
  found = result("plan-h100.json")
  figure, (whole, state) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2))
  rows = [r for r in found["full"] + found["masters"] if r["weights"] == "bfloat16"]
  names = [row["optimizer"] for row in rows]
  left = np.zeros(len(rows))
  parts = (("weights GB", "weights"), ("state GB", "state"), ("temporaries GB", "gradients, …"))
  for (key, label), color in zip(parts, (GREY, ORANGE, PALE), strict=True):
    value = np.array([row[key] for row in rows])
    whole.barh(names, value, left=left, color=color, label=label)
    left += value
  for y, (total, row) in enumerate(zip(left, rows, strict=True)):
    held = row["host GB"]
    host = f" (+{held:.0f} on the host)" if held else ""
    whole.text(total + 1, y, f"{total:.0f}{host}", va="center", fontsize=8)
  whole.axvline(80, color="k", lw=0.6, ls=":")
  whole.set(title="LLaMA 7B in bfloat16, all parameters: GB on an H100", xlim=(0, 100))
  whole.legend(loc="lower right", fontsize=8)
  whole.invert_yaxis()
  kept = [
    "adamw",
    "lion",
    "adamw_8bit",
    "adamw_4bit",
    "came",
    "lion_8bit",
    "lion_4bit",
    "adafactor",
  ]
  by_name = {row["optimizer"]: row for row in found["state"]}
  value = [by_name[name]["device GB"] for name in kept]
  state.barh(kept, value, color=ORANGE)
  for y, x in enumerate(value):
    state.text(x + 5, y, f"{x:.0f}" if x >= 1 else f"{x:.2f}", va="center", fontsize=8)
  state.set(title="Llama 2 70B: GB of optimizer state", xlim=(0, 640))
  state.invert_yaxis()
  return figure


def loss() -> Figure:
  """Held-out loss of a transformer in 32, 8 and 4 bits, all seeds."""
  found = result("train-cpu.json")
  figure, (whole, end) = plt.subplots(1, 2, figsize=(10, 3.4))
  names = {"optax.adamw": "32 bits", "adamw, 8 bits": "8 bits", "adamw, 4 bits": "4 bits"}
  for (name, label), color in zip(names.items(), (GREY, BLUE, ORANGE), strict=True):
    curves = np.array(found["held_out_loss"][name])
    at = np.linspace(found["steps"] / curves.shape[1], found["steps"], curves.shape[1])
    for axes, part in ((whole, slice(None)), (end, slice(-14, None))):
      for seed, curve in enumerate(curves):
        axes.plot(at[part], curve[part], color=color, lw=1, label=None if seed else label)
  whole.set(title="Held-out loss, nats a byte; three seeds each", xlabel="step")
  end.set(title="the last third", xlabel="step")
  whole.legend()
  return figure


def traffic() -> Figure:
  """Bytes through device memory, and launches, of an optimizer in a training step."""
  found = result("accelerator-h100.json")
  rows = found["step"] + [row for row in found["norms"] if row["program"] == "step"]
  names = ["optax.adamw", "adamw, 8 bits", "adamw, 4 bits", "lion, 8 bits", "optax.adafactor"]
  names += ["came, 8 bits", "optax.lamb", "lamb, 8 bits", "adamw, dynamic map"]
  figure, (bytes_, launches) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
  for shift, (dtype, color) in zip(
    (-0.2, 0.2), (("float32", BLUE), ("bfloat16", GREEN)), strict=True
  ):
    by_name = {row["rule"]: row for row in rows if row["dtype"] == dtype}
    at = np.arange(len(names)) + shift
    for axes, key in ((bytes_, "hbm"), (launches, "kernels")):
      value = [by_name[name][key] for name in names]
      axes.barh(at, value, height=0.38, color=color, label=dtype)
      for y, x in zip(at, value, strict=True):
        axes.text(x + 0.3, y, f"{x:.1f}", va="center", fontsize=7)
  bytes_.set_yticks(range(len(names)), names)
  bytes_.invert_yaxis()
  bytes_.set(title="Bytes moved a parameter, compiled for an H100")
  launches.set(title="Launches an array")
  launches.legend(loc="lower right")
  return figure


def paging() -> Figure:
  """A schematic: rows of a state in two host arrays, on their way to the device and back."""
  figure, axes = plt.subplots(figsize=(10, 2.4))
  lanes = {"to the device": 3, "rule": 2, "to the host": 1}
  for k in range(6):
    color = (BLUE, ORANGE)[k % 2]
    for lane, start, width in (
      ("to the device", k, 0.95),
      ("rule", k + 1, 0.3),
      ("to the host", k + 1.3, 0.95),
    ):
      axes.add_patch(Rectangle((start, lanes[lane] - 0.3), width, 0.6, color=color, lw=0))
      axes.text(
        start + width / 2, lanes[lane], f"{k}", ha="center", va="center", color="w", fontsize=8
      )
  axes.set(
    xlim=(-0.1, 8.6),
    ylim=(0.4, 3.6),
    title="Rows 0 to 5 of one array's state (a schematic, not a measurement)",
  )
  axes.set_yticks(list(lanes.values()), list(lanes))
  axes.set_xticks([])
  axes.set_xlabel(
    "time; blue and orange rows lie in two host arrays: one is fetched while the other is stored"
  )
  return figure


def blocks() -> Figure:
  """A block of a moment as one scale and codes, and what the codes stand for."""
  import jax.numpy as jnp

  import optax_lowmem as lowmem

  figure, (values, codes) = plt.subplots(1, 2, figsize=(10, 3.2))
  rng = np.random.default_rng(0)
  block = (rng.standard_normal(64) * np.exp(rng.standard_normal(64) / 2)).astype(np.float32)
  stored = lowmem.quantize(jnp.asarray(block), "power4", block_size=64)
  values.bar(range(64), block, color=PALE, label="float32")
  values.plot(
    range(64), np.asarray(stored.dequantize()), "_", color=ORANGE, ms=5, label="4-bit codes"
  )
  values.set(title="A block: 64 values, one scale (the largest magnitude)", xticks=[])
  values.legend(loc="lower right", fontsize=8)
  for name, n, w, color in (
    ("power8_unsigned", 255, 1.0, BLUE),
    ("power4_unsigned", 15, 0.75, ORANGE),
  ):
    x = np.arange(1, n + 1) / n
    codes.plot(x, (1 - w) * x**2 + w * x**4, "." if n < 99 else "-", color=color, label=name)
  codes.set(title="What a code stands for, of the largest of its block", xlabel="code / last code")
  codes.set(yscale="log", ylim=(1e-10, 2))
  codes.legend()
  return figure


def update() -> Figure:
  """A schematic: one array's update by tiles on a CPU, by one kernel on a GPU."""
  figure, (tiles, kernel) = plt.subplots(1, 2, figsize=(10, 2.8))
  for axes, title in (
    (tiles, "CPU: a loop over tiles"),
    (kernel, "GPU: one kernel, all blocks at once"),
  ):
    axes.set(title=title, xlim=(0, 10), ylim=(0, 4))
    axes.axis("off")
    for y, what in ((3.2, "codes, scales"), (2.2, "gradient"), (1.2, "update")):
      axes.text(0, y, what, va="center", fontsize=8)
      for k in range(8):
        active = axes is kernel or k == 3
        axes.add_patch(
          Rectangle((2.2 + 0.6 * k, y - 0.25), 0.52, 0.5, color=ORANGE if active else PALE, lw=0)
        )
    axes.text(7.4, 3.2, "decode to float32", va="center", fontsize=8)
    axes.text(7.4, 2.2, "optax's rule", va="center", fontsize=8)
    axes.text(7.4, 1.2, "encode, in place", va="center", fontsize=8)
    for high in (3.0, 2.0):
      axes.add_patch(
        FancyArrowPatch((8.3, high), (8.3, high - 0.6), arrowstyle="->", mutation_scale=8)
      )
  arrow(tiles, "one tile is float32 at a time, and stays in cache")
  arrow(kernel, "float32 lives in registers only; the update takes the gradient's place")
  return figure


def arrow(axes: Axes, text: str) -> None:
  axes.text(0, 0.3, text, fontsize=8, color=GREY)


FIGURES: dict[str, tuple[Callable[[], Figure], tuple[str, ...]]] = {
  "memory": (memory, ("plan-h100.json",)),
  "loss": (loss, ("train-cpu.json",)),
  "traffic": (traffic, ("accelerator-h100.json",)),
  "paging": (paging, ()),
  "blocks": (blocks, ()),
  "update": (update, ()),
}


def digest(name: str) -> str:
  """Of what a picture is drawn from: the results, and this file."""
  said = hashlib.sha256(pathlib.Path(__file__).read_bytes())
  for file in FIGURES[name][1]:
    said.update((RESULTS / file).read_bytes())
  return said.hexdigest()[:16]


def draw(name: str, out: pathlib.Path) -> pathlib.Path:
  """Draws one picture."""
  with matplotlib.rc_context(STYLE):
    figure = FIGURES[name][0]()
    figure.tight_layout()
    path = out / f"{name}.svg"
    written = f"benchmarks/figures.py {digest(name)}"
    figure.savefig(path, metadata={"Date": None, "Creator": None, "Source": written})
    plt.close(figure)
  return path


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--out", default=str(OUT), help="the folder to draw in")
  args = parser.parse_args()
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  for name in FIGURES:
    path = draw(name, out)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
  main()
