"""How the run talks: errors as sentences, Ctrl-C that loses nothing, a progress bar, tables."""

import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from optax_lowmem.qlora.files.disk import write_whole
from optax_lowmem.qlora.training.report import Metrics, Part, human, peak_memory

console = Console(highlight=False)


@contextmanager
def sentences() -> Iterator[None]:
  """Prints a bad input's error as one sentence and ends the process with status 2.

  Only what the user gave is read inside; errors elsewhere keep their tracebacks.
  """
  try:
    yield
  except (ValueError, TypeError, OSError) as error:
    complain(str(error))
    sys.exit(2)


def say(sentence: str) -> None:
  """Prints a sentence as it is, neither wrapped nor read as markup, so that paths stay whole."""
  _print(console, escape(sentence))


def complain(sentence: str) -> None:
  """Prints an error on stderr."""
  _print(Console(stderr=True, highlight=False), f"[bold red]error:[/] {escape(sentence)}")


def _print(console: Console, text: str) -> None:
  try:
    console.print(text, soft_wrap=True)
  except OSError:  # the terminal is gone (SIGHUP), or the disk that a log goes to is full
    pass


class CtrlC:
  """Lets the step in progress end before it stops. A second Ctrl-C stops at once.

  SIGTERM, which batch systems send before they kill, and SIGHUP, of a terminal that is closed, are
  treated the same. A signal that is ignored, as `nohup` does it with SIGHUP, stays so.
  """

  asked = False

  def __enter__(self) -> "CtrlC":
    stopping = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    numbers = [n for n in stopping if n is not None and signal.getsignal(n) != signal.SIG_IGN]
    self._before = {number: signal.signal(number, self._on_signal) for number in numbers}
    return self

  def __exit__(
    self, kind: type | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    if self.asked:
      raise KeyboardInterrupt
    self.asked = True
    say("Stopping after this step, to save what was learned. Ctrl-C again stops at once.")


class StepBar:
  """A progress bar with loss, speed and memory; without a terminal, a line now and then."""

  def __init__(self, start: int, steps: int):
    self.start, self.steps = start, steps
    self.tokens = self.seconds = 0.0
    self.begun = time.monotonic()
    self.progress = Progress(
      TextColumn("step {task.completed}/{task.total}"),
      BarColumn(bar_width=24),
      TextColumn("{task.fields[text]}"),
      TimeRemainingColumn(),
      console=console,
      disable=not console.is_terminal,
    )
    self.task = self.progress.add_task("", total=steps, completed=start, text="compiling ...")

  def __enter__(self) -> "StepBar":
    self.progress.start()
    return self

  def __exit__(self, *_: object) -> None:
    try:
      self.progress.stop()
    except OSError:  # the terminal is gone
      pass

  def advance(self, record: Mapping[str, float], epoch: float, memory: int) -> None:
    """Shows the step that just ended: its own loss, not a mean that lags behind."""
    done = int(record["step"])
    self.tokens += record["tokens"]
    self.seconds += record["seconds"]
    rate = self.tokens / self.seconds
    text = (
      f"loss {record['loss']:.3f} · lr {record['lr']:.1e} · gradient {record['grad_norm']:.2f} · "
      f"epoch {epoch:.2f} · {rate:,.0f} tokens/s · {human(memory)}"
    )
    self.progress.update(self.task, completed=done, text=text)
    if not console.is_terminal and (done % max(1, self.steps // 20) == 0 or done == self.steps):
      seconds = (time.monotonic() - self.begun) / (done - self.start) * (self.steps - done)
      left = f" · {_clock(seconds)} left" if done < self.steps else ""
      say(f"step {done}/{self.steps} · {text}{left}")

  def measured(self, step: int, held_out_loss: float, perplexity: float, best: bool) -> None:
    """Says what an evaluation gave."""
    lowest = ", the lowest so far" if best else ""
    say(f"step {step}: held-out loss {held_out_loss:.3f}, perplexity {perplexity:.1f}{lowest}")


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}"


def say_trained(trained: int, frozen: int) -> None:
  """How much of a model is trained; `frozen` counts weights, not the bytes they are packed in."""
  say(
    f"Trained: {trained:,} parameters, {trained / (trained + frozen):.2%} of {trained + frozen:,}."
  )


def print_shapes(title: str, trained: Any) -> None:
  """What would be trained, stacked over layers."""
  table = Table(title=title, title_justify="left")
  table.add_column("variable")
  table.add_column("shape", justify="right")
  for path, leaf in jax.tree_util.tree_flatten_with_path(trained)[0]:
    name = ".".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
    table.add_row(name.removesuffix(".value"), str(tuple(leaf.shape)))
  console.print(table)


def print_bytes(parts: list[Part], temporaries: int, usual: str, devices: int = 1) -> None:
  """The table of where the bytes are on each device; `usual` is what they are compared with."""
  on = f", on each of {devices} devices" if devices > 1 else ""
  table = Table(title=f"Where the bytes are{on}", title_justify="left")
  table.add_column("")  # words may go on in the next line, numbers not
  for name in ("parameters", "here", usual):
    table.add_column(name, justify="right", no_wrap=True)
  for part in parts:
    numbers = f"{part.parameters:,}" if part.parameters else ""
    table.add_row(
      part.name, numbers, human(part.here), human(part.usual), end_section=part == parts[-1]
    )
  table.add_row(
        "total", f"{sum(p.parameters for p in parts):,}",
        human(sum(p.here for p in parts)), human(sum(p.usual for p in parts)),
    )  # fmt: skip
  table.add_row("temporaries of a training step", "", human(temporaries), "")
  console.print(table)


def print_samples(samples: list[dict[str, str]]) -> None:
  """Held-out prompts, how they went on in the data, and the model's words before and after."""
  for number, sample in enumerate(samples, 1):
    table = Table(
      title=f"Sample {number}", title_justify="left", show_header=False, show_lines=True
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold", max_width=90)
    for name, text in sample.items():
      table.add_row(name, escape(text.strip()) or "(nothing)")
    console.print(table)


def conclude(
  out: Path, metrics: Metrics, parts: list[Part], seconds: float, results: Sequence[str]
) -> None:
  """Prints the samples and the held-out loss, before and after, and writes summary.json.

  Args:
    out: the run's folder.
    metrics: what was measured.
    parts: where the bytes are.
    seconds: how long it took.
    results: what there is now, in sentences.
  """
  measured = metrics.having("held_out_loss")
  before, after = measured[0], measured[-1]
  # Of records that were damaged, samples may be missing.
  pairs = zip(before.get("samples", ()), after.get("samples", ()), strict=False)
  samples = [
    {"prompt": a["prompt"], "before": b["model"], "after": a["model"], "data": a["data"]}
    for b, a in pairs
  ]
  print_samples(samples)
  change = after["held_out_loss"] / before["held_out_loss"] - 1
  say(
    f"Held-out loss {before['held_out_loss']:.3f} -> {after['held_out_loss']:.3f} "
    f"({change:+.1%}), perplexity {before['perplexity']:.1f} -> {after['perplexity']:.1f}, "
    f"in {after['step']} steps; this process took {seconds / 60:.1f} minutes."
  )
  what = (
    "the process, JAX and its compiler included,"
    if jax.default_backend() == "cpu"
    else "the device's arrays"
  )
  say(f"At its peak {what} took {human(peak_memory())}.")
  for sentence in results:
    say(sentence)
  summary = {
    "held_out_loss": [before["held_out_loss"], after["held_out_loss"]],
    "steps": after["step"],
    "seconds": seconds,
    "peak_bytes": peak_memory(),
    "bytes": [part._asdict() for part in parts],
    "samples": samples,
  }
  write_whole(out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
