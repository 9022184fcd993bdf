"""Processes that take turns: each builds its side, then takes a step whenever it is told to.

So two frameworks are timed within the same minutes on the same machine, without sharing a process,
its memory or its threads. Messages are lines of JSON; other lines a side prints go to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
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


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
  """What every side is told."""
  parser.add_argument("--side", required=True)
  parser.add_argument("--model", required=True)
  parser.add_argument("--folder", required=True)
  parser.add_argument("--dtype", required=True)
  parser.add_argument("--lr", type=float, required=True)
  return parser


def resident(peak: bool = False) -> int | None:
  """Bytes of this process in memory now, or at most since `forget_peak`; None but on Linux."""
  try:
    status = pathlib.Path("/proc/self/status").read_text()
  except OSError:
    return None
  key = "VmHWM:" if peak else "VmRSS:"
  for line in status.splitlines():
    if line.startswith(key):
      return int(line.split()[1]) * 1024
  return None


def forget_peak() -> None:
  """Gives free memory back to the system, and lets the peak begin at what is left."""
  with contextlib.suppress(OSError, AttributeError):  # not glibc
    ctypes.CDLL(None).malloc_trim(0)
  with contextlib.suppress(OSError):  # not Linux
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def highest() -> int:
  """`ru_maxrss` in bytes: the peak since the process began."""
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def serve(
  step: Callable[[int], float],
  before: int | None,
  memory: Callable[[], dict[str, Any]],
  reset: Callable[[], None] | None = None,
) -> None:
  """Answers the driver until it hangs up.

  Args:
    step: takes the number of a batch, returns its loss when the step is done.
    before: `resident()` before the model was loaded.
    memory: further byte counts for the end.
    reset: forgets the device's peak, when the steps to warm up are over.
  """
  out = os.fdopen(os.dup(1), "w", buffering=1)

  def answer(**row: Any) -> None:
    print(json.dumps(row), file=out)

  built = highest()
  answer(ready=True)
  for line in sys.stdin:
    command, *rest = line.split()
    if command == "step":
      start = time.perf_counter()
      loss = step(int(rest[0]))
      answer(loss=loss, seconds=time.perf_counter() - start)
    elif command == "warm":
      forget_peak()
      if reset:
        reset()
      answer(warm=True)
    else:
      peak = resident(peak=True)
      rows = {"host peak": peak - before if peak and before else None}
      rows["host peak, with building"] = max(built, highest()) - before if before else None
      answer(**rows, **memory())


class Side:
  """The driver's end of one process."""

  def __init__(self, name: str, command: list[str], env: dict[str, str]):
    self.name, self.error = name, None
    self.losses: list[float] = []
    self.seconds: list[float] = []
    self._log = tempfile.TemporaryFile("w+")
    start = time.perf_counter()
    self._process = subprocess.Popen(
      command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
    )
    self._read()
    self.build_s = time.perf_counter() - start

  def _read(self) -> dict[str, Any]:
    """The next answer; what else is printed is left out. A side that died has an `error`."""
    assert self._process.stdout
    for line in self._process.stdout:
      if line.startswith("{"):
        return json.loads(line)
    self._process.wait()
    self._log.seek(0)
    said = self._log.read().strip()[-1500:]
    self.error = said or f"exit status {self._process.returncode}"
    return {}

  def _ask(self, command: str) -> dict[str, Any]:
    if self.error:
      return {}
    assert self._process.stdin
    try:
      print(command, file=self._process.stdin, flush=True)
    except BrokenPipeError:
      pass
    return self._read()

  def step(self, i: int) -> None:
    """One step on batch `i`, kept in `losses` and `seconds`."""
    if row := self._ask(f"step {i}"):
      self.losses.append(row["loss"])
      self.seconds.append(row["seconds"])

  def warm(self) -> None:
    """From here on the peak of the memory counts."""
    self._ask("warm")

  def close(self) -> dict[str, Any]:
    """Memory, in bytes; the process ends."""
    memory = self._ask("memory")
    if self._process.stdin:
      with contextlib.suppress(BrokenPipeError):
        self._process.stdin.close()
    try:
      self._process.wait(30)
    except subprocess.TimeoutExpired:
      self._process.kill()
    return memory
