"""What the benchmarks share: timing in one run, and where a result comes from."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

_PEERS = ("torch", "triton", "bitsandbytes", "torchao")  # named where they are installed


def seconds(run: Callable[[], Any], repeat: int) -> dict[str, float]:
  """Least and median wall time of `run()`, after one call to warm up."""
  jax.block_until_ready(run())
  times = []
  for _ in range(repeat):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return {"min": min(times), "median": statistics.median(times)}


def origin() -> dict[str, Any]:
  """Device, versions and date."""
  names = ("jax", "jaxlib", "optax", "flax", "optax_lowmem", *_PEERS)
  versions = {}
  for name in names:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  device = jax.devices()[0]
  return {
    "date": datetime.date.today().isoformat(),
    "device": device.device_kind if device.platform != "cpu" else platform.processor() or "cpu",
    "platform": device.platform,
    "cores": os.cpu_count(),
    "python": platform.python_version(),
    "versions": versions,
  }


def write(path: str | None, result: dict[str, Any]) -> None:
  """Writes a result with its origin as JSON, if a path is given."""
  if path:
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(origin() | result, indent=2) + "\n")
    print(f"\nwritten to {target}")
