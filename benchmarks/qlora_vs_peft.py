"""QLoRA here beside QLoRA in PyTorch: the same weights, adapters and batches.

python benchmarks/qlora_vs_peft.py --model default --json benchmarks/results/qlora-cpu.json
python benchmarks/qlora_vs_peft.py --shapes llama-2-7b        # random weights, no network

Four sides, each a process of its own, take their steps in turns: transformers + PEFT with
bitsandbytes' NF4 and with the base unquantized (`qlora_torch.py`), and the training step of
`examples/qlora/finetune.py` with both (`qlora_jax.py`). All compute each layer again in the
backward pass and train adapters of rank 16 on all linear layers with 32-bit AdamW. On a CPU
everything is float32; on a GPU the base and the arithmetic are bfloat16.

Peaks of host memory are those of the process without what it held before it loaded the model: while
it takes the timed steps, and with loading and compiling (`ru_maxrss`). Those of a device are its
allocator's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from _turns import Side

HERE = pathlib.Path(__file__).parent
SIDES = ("hf-nf4", "hf-dense", "ours-nf4", "ours-dense")


def measure(args: argparse.Namespace, folder: str, platform: str) -> dict[str, dict[str, Any]]:
  """Builds the sides one after another and lets them take turns."""
  paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
  env = os.environ | {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "PYTHONPATH": os.pathsep.join(p for p in paths if p),
    "PYTHONWARNINGS": "ignore",
  }
  told = ["--folder", folder, "--dtype", args.dtype]
  ours = [sys.executable, str(HERE / "qlora_jax.py")]
  wanted = [*ours, "prepare", *told, "--batches", str(args.steps + args.warm)]
  wanted += ["--batch", str(args.batch), "--tokens", str(args.tokens), "--shapes", args.shapes]
  wanted += ["--model", args.model] * bool(args.model) + ["--data", args.data] * bool(args.data)
  subprocess.run(wanted, env=env, check=True)
  told += ["--model", str(pathlib.Path(folder) / "model"), "--lr", str(args.lr)]
  device = ["--device", "cuda" if platform == "gpu" else "cpu"]
  sides = []
  for name in args.sides:
    torch = [sys.executable, str(HERE / "qlora_torch.py"), *told, *device, "--side", name]
    command = torch if name.startswith("hf") else [*ours, "side", *told, "--side", name]
    sides.append(Side(name, command, env))
  for i in range(args.warm):
    for side in sides:
      side.step(i)
  for side in sides:
    side.warm()
  for i in range(args.warm, args.warm + args.steps):
    for side in sides:
      side.step(i)
      time.sleep(args.pause)  # threads that wait actively go to sleep
  rows = {}
  for side in sides:
    row = {"build_s": side.build_s, "losses": side.losses, "seconds": side.seconds[args.warm :]}
    rows[side.name] = row | side.close() | ({"error": side.error} if side.error else {})
  return rows


def show(rows: dict[str, dict[str, Any]], tokens: int) -> None:
  """Prints the markdown table; ratios are medians over the rounds, against the first side."""
  good = {name: row for name, row in rows.items() if row["seconds"]}
  first: dict[str, Any] = next(iter(good.values()), {})
  kinds = ("device peak", "host peak", "host peak, with building", "temporaries")
  peaks = [k for k in kinds if any(row.get(k) for row in good.values())]
  columns = ["", "tokens/s", "time of a step", *(f"{k}, MiB" for k in peaks), "loss, first", "last"]
  print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
  for name, row in good.items():
    row["tokens/s"] = tokens / statistics.median(row["seconds"])
    pairs = zip(row["seconds"], first["seconds"], strict=False)  # one may have failed midway
    row["ratio"] = statistics.median(a / b for a, b in pairs)
    cells = [name, f"{row['tokens/s']:.0f}", f"{row['ratio']:.2f}"]
    cells += [f"{row[k] / 2**20:.0f}" if row.get(k) else "" for k in peaks]
    cells += [f"{row['losses'][0]:.4f}", f"{row['losses'][-1]:.4f}"]
    print("| " + " | ".join(cells) + " |")
  for name, row in rows.items():
    if "error" in row:
      print(f"- {name}: {row['error'].splitlines()[-1][:300]}")
  for nf4, dense in (("hf-nf4", "ours-nf4"), ("hf-dense", "ours-dense")):
    if nf4 in good and dense in good:
      gap = np.abs(np.subtract(good[nf4]["losses"], good[dense]["losses"])).max()
      print(f"\nLosses of {nf4} and {dense} differ by at most {gap:.1e}.")


def main() -> None:
  """Measures, prints the table and writes the result."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--model", help="a directory or GGUF file, or `default`: SmolLM2-135M by pip")
  parser.add_argument("--data", help="what finetune.py reads (default: the model's, or random ids)")
  parser.add_argument(
    "--shapes", default="smollm2-135m", help="of random weights: or llama-3.2-1b, llama-2-7b, tiny"
  )
  parser.add_argument("--batch", type=int, default=4)
  parser.add_argument("--tokens", type=int, default=128, help="of a row")
  parser.add_argument("--steps", type=int, default=10, help="timed rounds")
  parser.add_argument("--warm", type=int, default=2, help="rounds before them")
  parser.add_argument("--lr", type=float, default=1e-3)
  parser.add_argument("--pause", type=float, default=0.2, help="seconds between two steps")
  parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
  parser.add_argument("--json", help="also write the result to this file")
  args = parser.parse_args()

  # Else this process, too, would take three quarters of a GPU.
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  import jax

  from _measure import write

  platform = jax.devices()[0].platform
  args.dtype = "bfloat16" if platform == "gpu" else "float32"
  load = os.getloadavg()
  with tempfile.TemporaryDirectory() as folder:
    rows = measure(args, folder, platform)
  show(rows, args.batch * args.tokens)
  names = ("model", "shapes", "batch", "tokens", "steps", "warm", "lr", "dtype")
  settings = {name: getattr(args, name) for name in names}
  if args.model:
    settings["shapes"] = None
    settings["model"] = pathlib.Path(args.model).name
  peers = {}
  for name in ("transformers", "peft"):
    try:
      peers[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  loads = {"load before": load, "load after": os.getloadavg()}
  for row in rows.values():
    row["losses"] = [round(x, 6) for x in row["losses"]]
    row["seconds"] = [round(x, 4) for x in row["seconds"]]
  write(args.json, settings | loads | {"peers": peers, "sides": rows})
  if any("error" in row for row in rows.values()):
    sys.exit(1)


if __name__ == "__main__":
  main()
