"""Processes that are one JAX program on the loopback: started together, and ended together."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

DEVICES = 8  # of all processes together


def run_together(script: str, count: int, *arguments: Any, timeout: float = 240) -> list[str]:
  """Runs `script` in processes that see each other, and returns what each has printed.

  The script gets `arguments` and joins the others by `join`. A process that fails, or does not end
  in time, takes the others with it: they would wait for it for ever.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  outputs = [tempfile.TemporaryFile("w+") for _ in range(count)]
  processes = []
  try:
    for rank, output in enumerate(outputs):
      env = {"RANK": str(rank), "COUNT": str(count), "PORT": str(port), "JAX_PLATFORMS": "cpu"}
      command = [sys.executable, script, *map(str, arguments)]
      processes.append(
        subprocess.Popen(command, env=os.environ | env, stdout=output, stderr=output)
      )
    end = time.monotonic() + timeout
    while any(p.poll() is None for p in processes):
      if any(p.poll() for p in processes) or time.monotonic() > end:
        break
      time.sleep(0.05)
    codes = [p.poll() for p in processes]
  finally:
    for p in processes:
      p.kill()
      p.wait()
  printed = [_read(output) for output in outputs]
  assert codes == [0] * count, f"ended with {codes}:\n" + "\n".join(p[-4000:] for p in printed)
  return printed


def _read(output: Any) -> str:
  with output:
    output.seek(0)
    return output.read()


def join() -> None:
  """In a process that `run_together` has started: before JAX is used."""
  import jax

  count = int(os.environ["COUNT"])
  jax.config.update("jax_num_cpu_devices", DEVICES // count)
  if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
      f"localhost:{os.environ['PORT']}",
      count,
      int(os.environ["RANK"]),
      initialization_timeout=60,
      shutdown_timeout_seconds=10,  # one that has failed waits as long for the others to end too
    )
  found = jax.process_count(), jax.device_count()
  assert found == (count, DEVICES), found
