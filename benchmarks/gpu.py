"""What a step costs on a GPU: this library, by XLA and by its kernel, beside optax and torch.

python benchmarks/gpu.py [--params 1e9] [--json benchmarks/results/gpu-h200.json]

A step is update and apply on bf16 parameters and gradients in equal square leaves, parameters and
state donated. It must at least read gradients, parameters and state and write parameters and state:
those bytes over the time, as a part of what a plain copy moves, say how near a step is to the best.
A kernel writes the update, too, and `apply_updates` reads it: 4 bytes a parameter more.

Every section is a process of its own, so that one that fails, or takes all memory, spoils no other;
its error goes into the result. On a CPU the kernel's rows are interpreted: a test, not a time.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

from _measure import write

HERE = pathlib.Path(__file__).parent
# Section: its script, and the seconds it may take.
SECTIONS = {
  "correctness": ("gpu_steps.py", 90),
  "bandwidth": ("gpu_steps.py", 60),
  "steps": ("gpu_steps.py", 200),
  "torch": ("gpu_torch.py", 120),
  "qlora": ("gpu_qlora.py", 90),
  "offload": ("gpu_offload.py", 120),
  "plan": ("gpu_plan.py", 120),
  "tiles": ("gpu_steps.py", 90),
}


def run_section(name: str, args: argparse.Namespace, seconds: float) -> dict:
  """Runs a section in a process; its rows so far and its error, if it fails."""
  script, _ = SECTIONS[name]
  command = [sys.executable, str(HERE / script), "--section", name]
  command += ["--params", str(args.params), "--leaves", str(args.leaves)]
  command += ["--repeat", str(args.repeat)]
  if args.qlora_model and name == "qlora":
    command += ["--model", args.qlora_model] + (["--data", args.qlora_data] * bool(args.qlora_data))
  # Else the first of two processes would take three quarters of the memory.
  paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
  env = os.environ | {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "PYTHONPATH": os.pathsep.join(p for p in paths if p),
    "PYTHONWARNINGS": "ignore",
  }
  rows, error, start = [], None, time.perf_counter()
  process = subprocess.Popen(
    command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  try:
    out, err = process.communicate(timeout=seconds)
    if process.returncode:
      error = err[-2000:] or f"exit status {process.returncode}"
  except subprocess.TimeoutExpired:
    process.kill()
    out, _ = process.communicate()
    error = f"took longer than {seconds:.0f} seconds"
  for line in (out or "").splitlines():
    if line.startswith("{"):
      rows.append(json.loads(line))
  result = {"rows": rows, "seconds": time.perf_counter() - start}
  return result | ({"error": error} if error else {})


def show(name: str, section: dict, bandwidth: float | None) -> None:
  """Prints a section as a markdown table: what it measured, a row each."""
  print(f"\n## {name} ({section['seconds']:.0f} s)\n")
  rows = [row for row in section["rows"] if "error" not in row]
  for row in rows:
    if "moved" in row:
      row["GB/s"] = row["moved"] / row["step_s"] / 1e9
      row["of copy"] = row["GB/s"] / bandwidth if bandwidth else None
  columns = list(dict.fromkeys(key for row in rows for key in row))
  if rows:
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
  for row in rows:
    print("| " + " | ".join(_text(row.get(key)) for key in columns) + " |")
  for row in section["rows"]:
    if "error" in row:
      print(f"- {row['name']}: {row['error'].strip().splitlines()[-1][:200]}")
  if "error" in section:
    print(f"- the section: {section['error'].strip().splitlines()[-1][:200]}")
  sys.stdout.flush()


def _text(value: object) -> str:
  if isinstance(value, float):
    return f"{value:.4g}"
  return "" if value is None else str(value)


def main() -> None:
  """Runs the sections, prints their tables and writes the result after each."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--params", type=float, default=1e9, help="parameters in all")
  parser.add_argument("--leaves", type=int, default=16, help="arrays they lie in")
  parser.add_argument("--repeat", type=int, default=10, help="timed steps, after two to warm up")
  parser.add_argument("--budget", type=float, default=570, help="seconds for all sections")
  parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
  parser.add_argument("--qlora-model", help="a model for examples/qlora/finetune.py")
  parser.add_argument("--qlora-data", help="its data")
  parser.add_argument("--json", help="also write the result to this file")
  args = parser.parse_args()

  sections, bandwidth = {}, None
  end = time.perf_counter() + args.budget
  for name in args.only:
    left = end - time.perf_counter()
    if left < 5:
      sections[name] = {"rows": [], "seconds": 0.0, "error": "no time was left for it"}
    else:
      sections[name] = run_section(name, args, min(left, SECTIONS[name][1]))
    if name == "bandwidth" and sections[name]["rows"]:
      bandwidth = sections[name]["rows"][0].get("GB/s")
    show(name, sections[name], bandwidth)
  settings = {"params": args.params, "leaves": args.leaves, "repeat": args.repeat}
  write(args.json, settings | {"sections": sections})


if __name__ == "__main__":
  main()
