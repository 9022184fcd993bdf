"""A process for programs of other people's: it has a limit of time, and is begun anew after it.

A thread cannot be stopped, and signals reach the main thread only; a process ends when it is told
to, whatever it is doing, on every system.
"""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

SECONDS = 5.0  # for each source, in all
REFILL = 0.03  # what it gets back at each call,
REFILL_OF_BYTE = 1e-6  # and for each byte of it; a template like Qwen3's takes 2e-8
MEMORY = 160 << 20  # bytes of address space, beside what the request takes
_OF_REQUEST = 40  # bytes for each of its bytes: texts are held in many copies while one is made


class TooMuchError(ValueError):
  """A program that takes too long or too much memory; the message says which limit."""


class Confined:
  """Sends requests to a program, one at a time, and gives its replies.

  Args:
    program: a Python file that answers each line of JSON with one.
  """

  def __init__(self, program: Path):
    self.program = program
    self._lock = threading.Lock()
    self._process: subprocess.Popen[bytes] | None = None
    self._deadline: float | None = None
    self._left: dict[str, float] = {}  # seconds that each source may still take

  def __call__(self, request: str, source: str) -> dict[str, Any]:
    """The reply to a request.

    Args:
      request: JSON in one line.
      source: what is run. A slow one is run often before it is noticed: all its calls together
        may take `SECONDS`, beside what a call that is as quick as it should be takes.

    Raises:
      TooMuchError: where a limit was reached, and the process had to be ended.
    """
    memory, cpu = MEMORY + _OF_REQUEST * len(request), SECONDS + 2
    line = f'{{"memory": {memory}, "seconds": {cpu}, "request": {request}}}\n'.encode()
    with self._lock:
      process = self._started()
      assert process.stdin is not None and process.stdout is not None  # both are pipes
      refill = REFILL + REFILL_OF_BYTE * len(request)
      left = min(SECONDS, self._left.get(source, SECONDS) + refill)
      begun = time.monotonic()
      self._deadline = begun + left
      late = False
      try:
        process.stdin.write(line)
        process.stdin.flush()
        reply = process.stdout.readline()
      except OSError:
        reply = b""
      finally:
        late = self._deadline is None
        self._deadline = None
        self._left[source] = max(0.0, left - (time.monotonic() - begun))
      if reply.endswith(b"\n"):
        return json.loads(reply)
      process.kill()
      process.wait()
      self._process = None
    if late:
      raise TooMuchError(f"it takes more than {SECONDS:g} seconds")
    raise TooMuchError(f"it takes more than {MEMORY >> 20} MiB of memory")

  def _started(self) -> "subprocess.Popen[bytes]":
    if self._process is None or self._process.poll() is not None:
      self._process = subprocess.Popen(
        [sys.executable, str(self.program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the run, not for its helpers
      )
      threading.Thread(target=self._watch, args=[self._process], daemon=True).start()
    return self._process

  def _watch(self, process: "subprocess.Popen[bytes]") -> None:
    while process.poll() is None:
      deadline = self._deadline
      if deadline is not None and time.monotonic() > deadline:
        self._deadline = None
        process.kill()
        return
      time.sleep(0.05)


elsewhere = Confined(Path(__file__).with_name("rendering.py"))
