"""Python in a process of its own, with a number of devices that JAX must know from its start."""

import os
import pathlib
import re
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
MOVES = r"\b(?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def printed(*arguments: Any, devices: int = 8, timeout: float = 900) -> str:
  """What ``python *arguments`` prints, on a CPU divided into so many devices."""
  environment = os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join(
      map(str, (ROOT, ROOT / "tests", ROOT / "benchmarks", *filter(None, sys.path)))
    ),
  }
  done = subprocess.run(
    [sys.executable, *map(str, arguments)],
    env=environment,
    capture_output=True,
    text=True,
    timeout=timeout,
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
  return done.stdout


def moves_of(compiled: Any) -> list[str]:
  """What a compiled program exchanges between devices."""
  text = compiled.as_text()
  assert "fusion" in text  # it is a program's text
  return re.findall(MOVES, text)
