"""What a run says about itself: where its bytes are, and a picture of its loss."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_lowmem as lowmem
from optax_lowmem._plan.memory_plan import human as human
from optax_lowmem.qlora.files.disk import write_whole


class Part(NamedTuple):
  """A line of the table: bytes here, on each device, and with a 16-bit base and 32-bit Adam."""

  name: str
  parameters: int  # 0 where the part holds none
  here: int
  usual: int


def byte_parts(
  frozen: Any, lora: Any, opt_state: Any, optimizer: str, quantize: str = "nf4"
) -> list[Part]:
  """Where the bytes are, counted from the arrays themselves, or from their shapes in a dry run.

  Args:
    frozen: the base model's variables, quantized or not.
    lora: the adapter's variables.
    opt_state: the optimizer's state.
    optimizer: its name.
    quantize: how the base is packed.
  """
  bits = "8-bit" if quantize == "int8" else "4-bit"

  def packed(x: Any) -> bool:
    return isinstance(x, lowmem.QuantizedArray)

  leaves = jax.tree.leaves(frozen, is_leaf=packed)
  four = [x for x in leaves if packed(x)]
  dense = [x for x in leaves if not packed(x)]
  # A usual run adapts the same layers, so its adapter is as large; its Adam holds two float32
  # numbers for each of the adapter's.
  adam = jax.eval_shape(optax.scale_by_adam(mu_dtype=jnp.float32).init, lora)
  parts = [
    Part(
      "embeddings, norms" if four else "base weights",
      count(dense),
      nbytes(dense),
      2 * count(dense),
    ),
    Part("LoRA adapters", count(lora), nbytes(lora), nbytes(lora)),
    Part(f"optimizer state ({optimizer})", 0, nbytes(opt_state), nbytes(adam)),
  ]
  if four:
    parts.insert(
      0,
      Part(f"{bits} base weights ({quantize.upper()})", count(four), nbytes(four), 2 * count(four)),
    )
  return parts


def count(tree: Any) -> int:
  """Numbers in a tree; a quantized array counts those it stands for."""
  leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, lowmem.QuantizedArray))
  return sum(math.prod(x.shape) for x in leaves)


def nbytes(tree: Any) -> int:
  """Bytes of a tree's arrays on each device, packed ones as they are stored; or of shapes."""

  def part(x: Any) -> tuple[int, ...]:
    where = getattr(x, "sharding", None)
    return x.shape if where is None else where.shard_shape(x.shape)

  return sum(math.prod(part(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory_in_use() -> int:
  """Bytes in use: by arrays on an accelerator; by the whole process on a CPU. 0 if unknown."""
  if stats := jax.devices()[0].memory_stats():
    return stats.get("bytes_in_use", 0)
  try:  # Linux: the second number is the resident pages
    import resource

    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
  except (OSError, ImportError):
    return 0


def peak_memory() -> int:
  """The most bytes that were ever in use, as in :func:`memory_in_use`."""
  if stats := jax.devices()[0].memory_stats():
    return stats.get("peak_bytes_in_use", 0)
  try:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
  except ImportError:
    return 0


def loss_picture(path: Path, steps: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
  """Draws training loss by step (points, and their running mean) and held-out loss.

  Args:
    path: the PNG file to write.
    steps: ``{"step", "loss"}`` of each training step.
    held_out: ``{"step", "held_out_loss"}`` of each evaluation.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  x, y = [s["step"] for s in steps], [s["loss"] for s in steps]
  axes.plot(x, y, ".", color="#9ab8d8", label="training, each step")
  if len(x) > 1:
    axes.plot(x, running_mean(y), color="#2864a8", label="training, running mean")
  points = [(e["step"], e["held_out_loss"]) for e in held_out]
  axes.plot(*zip(*points, strict=True), "o:", color="#c8501e", label="held out")
  for step, loss in {points[0], points[-1]}:
    axes.annotate(f"{loss:.3f}", (step, loss), (0, 8), textcoords="offset points", ha="center")
  axes.set_xlabel("step")
  axes.set_ylabel("loss (nats per learned token)")
  axes.margins(x=0.06, y=0.1)
  axes.grid(alpha=0.25)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False)
  figure.savefig(path, dpi=150)


def running_mean(values: Sequence[float], decay: float = 0.9) -> list[float]:
  """Exponential mean, corrected for its start.

  >>> running_mean([2.0, 2.0, 2.0])
  [2.0, 2.0, 2.0]
  """
  means, total, weight = [], 0.0, 0.0
  for value in values:
    total, weight = decay * total + value, decay * weight + 1
    means.append(total / weight)
  return means


class Metrics:
  """What was measured, as records in memory, as lines of a JSONL file, and for TensorBoard."""

  def __init__(self, path: Path, records: Sequence[dict[str, Any]] = (), board: Any = None):
    self.path, self.records, self.board = path, list(records), board
    write_whole(path, self.text())
    if board and len(self.records) == 1:
      board.add(self.records[0])

  def text(self) -> str:
    """All records, a line each."""
    return "".join(json.dumps(r) + "\n" for r in self.records)

  def add(self, **record: Any) -> None:
    self.records.append(record)
    with open(self.path, "a", encoding="utf-8") as file:
      file.write(json.dumps(record) + "\n")
    if self.board:
      self.board.add(record)

  def having(self, key: str) -> list[dict[str, Any]]:
    """The records that hold `key`."""
    return [r for r in self.records if key in r]

  def losses(self) -> list[float]:
    """The training loss of every step."""
    return [r["loss"] for r in self.having("loss")]


def read_records(path: Path, until: int) -> list[dict[str, Any]]:
  """An earlier run's records, without those after step `until`, which will be done again.

  Lines that are no records are passed over: a run goes on without them.
  """
  lines = path.read_bytes().split(b"\n") if path.is_file() else []
  # What follows the last line break is empty, or was cut off when the process was killed.
  return [r for r in map(_record, lines[:-1]) if r is not None and r["step"] <= until]


def _record(line: bytes) -> dict[str, Any] | None:
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    return None
  numbers = ("step", "loss", "held_out_loss", "perplexity", "tokens", "seconds")
  if not isinstance(record, dict) or type(record.get("step")) is not int:
    return None
  numeric = all(isinstance(record.get(name, 0), (int, float)) for name in numbers)
  return record if numeric and isinstance(record.get("samples", []), list) else None
