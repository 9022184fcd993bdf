"""examples/memory_spike.py runs here, where nothing caps the memory."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_both_runs_end_with_the_same_loss():
  command = [sys.executable, str(ROOT / "examples" / "memory_spike.py"), "--small"]
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  result = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  losses = [line.split()[-1] for line in result.stdout.splitlines() if "loss" in line]
  assert len(losses) == 8
  assert losses[:4] == losses[4:]
  assert "state: 0.0 MB on the device, 1.0 MB on the host" in result.stdout
