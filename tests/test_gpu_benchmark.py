"""benchmarks/gpu.py runs here too, on a few parameters."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_gpu_benchmark_on_a_cpu(tmp_path):
  target = tmp_path / "gpu.json"
  command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--json", str(target)]
  command += ["--params", "8e3", "--leaves", "1", "--repeat", "1"]
  command += ["--only", "bandwidth", "steps", "--budget", "120"]
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150)
  assert done.returncode == 0, done.stderr
  result = json.loads(target.read_text())
  assert {"date", "device", "versions", "params"} <= result.keys()
  sections = result["sections"]
  assert not any("error" in part or not part["rows"] for part in sections.values())
  rows = {row["name"]: row for row in sections["steps"]["rows"]}
  assert not any("error" in row for row in rows.values()), rows
  assert rows["adamw, 8 bits, xla"]["B/param"] < 2.13
  assert "| adamw, 8 bits, xla |" in done.stdout


@pytest.mark.slow
def test_paged_state_is_set_against_the_link(tmp_path):
  target = tmp_path / "gpu.json"
  command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--json", str(target)]
  command += ["--params", "131072", "--leaves", "2", "--repeat", "2", "--only", "offload"]
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  section = json.loads(target.read_text())["sections"]["offload"]
  assert "error" not in section
  rows = {row["name"]: row for row in section["rows"]}
  assert not any("error" in row for row in rows.values()), rows
  paged = rows["adamw, 32 bits, host, 4 products"]
  assert (
    paged["state"]["pinned_host"] > 0.99 * 8 * 131072
    and paged["bound ms"] > 0
    and "hidden" in paged
  )
  assert all(rows[f"does not fit, {place}"]["done"] for place in ("device", "host"))  # no cap here


@pytest.mark.slow
def test_plans_are_set_against_the_peak(tmp_path):
  target = tmp_path / "gpu.json"
  command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--json", str(target)]
  command += ["--params", "131072", "--leaves", "2", "--only", "plan"]
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  rows = json.loads(target.read_text())["sections"]["plan"]["rows"]
  assert len(rows) == 6 and not any("error" in row for row in rows), rows
  assert all(row["plan MB"] > 0 for row in rows)


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path):
  target = tmp_path / "gpu.json"
  command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--json", str(target)]
  command += ["--only", "bandwidth", "--params", "1e30"]
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stderr
  assert "- copy: " in done.stdout
  assert json.loads(target.read_text())["sections"]["bandwidth"]["rows"][0]["error"]
