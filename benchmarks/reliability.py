"""Faults that the QLoRA script is put through: kills, a second process, full disks, damaged files.

    python benchmarks/reliability.py [--kills 50] [--cases 60] [--seed 0] [--json FILE]
    python benchmarks/reliability.py --only fuzz,damaged --json FILE     # the others from FILE

Real processes on a tiny random model. Prints the table of docs/reliability.md. Everything but the
moment at which a signal reaches a process follows from the seed. Full disks need the right to mount
(root), and are left out without it.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import _fuzz
from _measure import write

SCRIPT = str(_fuzz.ROOT / "examples" / "qlora" / "finetune.py")
KINDS = ("GGUF", "safetensors", "JSON", "adapters", "run.json", "YAML", "templates", "rows")
SECONDS, MEMORY = 10.0, 200e6
OPTIONS = "--seq-len 32 --batch-size 2 --eval-batches 1 --samples 0 --targets q_proj --dropout 0.1"
OPTIONS += " --warmup 0 --schedule constant --packing"


class Runs:
  """Runs of the script on one tiny model, each a process."""

  def __init__(self, folder: pathlib.Path):
    from qlora_cases import save_model, save_rows

    self.folder = folder
    save_model(folder / "model", tied=False)
    save_rows(folder / "rows.json")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "jax-cache"), "JAX_PLATFORMS": "cpu"}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    self.environment = os.environ | {"PYTHONPATH": str(_fuzz.ROOT)} | cache

  def arguments(self, out: pathlib.Path, steps: int, *more: str) -> list[str]:
    where = ["--model", f"{self.folder}/model", "--data", f"{self.folder}/rows.json"]
    return [*where, *OPTIONS.split(), "--steps", str(steps), "--out", str(out), *more]

  def start(self, arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
      [sys.executable, SCRIPT, *arguments],
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=self.environment,
    )  # fmt: skip

  def run(self, arguments: list[str]) -> tuple[int, str]:
    """The exit status, and what was said on stderr."""
    process = self.start(arguments)
    _, said = process.communicate(timeout=300)
    return process.returncode, errors(said)


def errors(said: str) -> str:
  """What is on stderr beside the word that it has started."""
  return said.removeprefix("Starting ...\n")


def is_sentence(said: str, name: object = "") -> bool:
  return said.startswith("error: ") and said.count("\n") == 1 and str(name) in said


def same_results(a: pathlib.Path, b: pathlib.Path) -> bool:
  """Whether two runs have the same state, adapter and metrics, but for the time they took."""
  from safetensors.numpy import load_file

  from qlora_cases import records, same

  names = ("last/state.safetensors", "adapter/adapter_model.safetensors")
  equal = all(same(load_file(a / name), load_file(b / name)) for name in names)
  timeless = [[{k: v for k, v in r.items() if k != "seconds"} for r in records(x)] for x in (a, b)]
  return equal and timeless[0] == timeless[1]


def kills(runs: Runs, count: int, rng: random.Random) -> dict[str, object]:
  """Kills one run again and again: while it starts, in its first save, and while it saves."""
  out, early, steps = runs.folder / "killed", 0, 10**6
  runs.run(runs.arguments(runs.folder / "warm", 2))  # what is compiled is kept
  for i in range(count):
    begun = (out / "run.json").exists()
    arguments = ["--resume", str(out)] if begun else runs.arguments(out, steps)
    process = runs.start([*arguments, "--save-every", "1"])
    last, before = out / "last", time.time()
    if i % 5:  # when it saves, sooner or later; else at any moment of its start
      while process.poll() is None:
        fresh = [p for p in (last, out / "last.partial") if p.exists()]
        if any(p.stat().st_mtime > before for p in fresh if p.exists()):
          break
        time.sleep(0.001)
      time.sleep(rng.random() ** 2 * 1.5)
    else:
      time.sleep(rng.random() * 6)
    early += not (out / "run.json").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.stderr and (said := errors(process.stderr.read())):
      return {"tried": i + 1, "survived": i, "said": said[-500:]}
  from safetensors import safe_open

  from optax_lowmem.qlora.run.checkpoints import found

  with safe_open(found(out / "last") / "state.safetensors", "np") as file:
    done = int(file.metadata()["step"])
  end = str(done + 3)
  rc, said = runs.run(["--resume", str(out), "--steps", end, "--save-every", "0"])
  whole = runs.folder / "whole"
  again, _ = runs.run(runs.arguments(whole, done + 3, "--save-every", "0"))
  good = rc == again == 0 and same_results(out, whole)
  return {"tried": count, "survived": count * good, "before a save": early, "steps": done + 3,
          "said": said[-500:]}  # fmt: skip


def first_saves(runs: Runs, count: int, rng: random.Random) -> dict[str, int]:
  """Kills runs while they save for the first time; they are begun again, or resumed if they can."""
  whole, survived, early = runs.folder / "first-whole", 0, 0
  runs.run(runs.arguments(whole, 2))
  for i in range(count):
    out = runs.folder / f"first-{i}"
    process = runs.start(runs.arguments(out, 2))
    while process.poll() is None and not (out / "last.partial").exists():
      time.sleep(0.0005)
    time.sleep(rng.random() ** 2 * 0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    begun = (out / "run.json").exists()
    early += not begun
    rc, _ = runs.run(["--resume", str(out)] if begun else runs.arguments(out, 2))
    survived += rc == 0 and same_results(out, whole)
  return {"tried": count, "survived": survived, "early": early}


def two_processes(runs: Runs, count: int) -> dict[str, int]:
  """Starts two runs on one folder at the same moment: one goes on, one says why it does not."""
  survived = 0
  for i in range(count):
    out = runs.folder / f"two-{i}"
    arguments = runs.arguments(out, 2)
    if i % 2:  # an earlier run that both resume
      runs.run([*arguments, "--stop-after", "1"])
      arguments = ["--resume", str(out)]
    pair = [runs.start(arguments) for _ in range(2)]
    said = [errors(process.communicate(timeout=300)[1]) for process in pair]
    codes = [process.returncode for process in pair]
    refused = said[codes.index(2)] if sorted(codes) == [0, 2] else ""
    survived += is_sentence(refused, out)
  return {"tried": count, "survived": survived}


def full_disks(runs: Runs, count: int, rng: random.Random) -> dict[str, int]:
  """Runs on disks that are full at some moment, and go on when there is room."""
  whole, tried, survived = runs.folder / "roomy", 0, 0
  runs.run(runs.arguments(whole, 6, "--save-every", "1"))
  for i in range(count):
    disk = runs.folder / f"disk-{i}"
    disk.mkdir()
    size = f"size={rng.randrange(20, 700)}k"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(disk)]).returncode:
      break
    try:
      tried += 1
      out = disk / "out"
      rc, said = runs.run(runs.arguments(out, 6, "--save-every", "1"))
      sentence = rc == 0 or is_sentence(said, disk)
      subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
      if rc:
        began = (out / "run.json").exists()
        again = ["--resume", str(out)] if began else runs.arguments(out, 6, "--save-every", "1")
        rc, _ = runs.run(again)
      survived += sentence and rc == 0 and same_results(out, whole)
    finally:
      subprocess.run(["umount", str(disk)])
  return {"tried": tried, "survived": survived}


def damaged(runs: Runs, rng: random.Random) -> dict[str, int]:
  """Damages each file of a stopped run: it is refused by name, or the run ends as it would have."""
  stopped, whole = runs.folder / "stopped", runs.folder / "unhurt"
  runs.run(runs.arguments(whole, 4))
  runs.run(runs.arguments(stopped, 4, "--stop-after", "2"))
  tried = survived = 0
  files = [f for f in sorted(stopped.rglob("*")) if f.is_file()]
  for file in files:
    for how in ("a flipped bit", rng.choice(["cut off", "emptied"])):
      run = shutil.copytree(stopped, runs.folder / f"damaged-{tried}")
      hurt = run / file.relative_to(stopped)
      raw = bytearray(hurt.read_bytes())
      if how == "a flipped bit":
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
      hurt.write_bytes({"cut off": raw[: len(raw) // 2], "emptied": b""}.get(how, raw))
      rc, said = runs.run(["--resume", str(run)])
      good = same_results(run, whole) if rc == 0 else rc == 2 and is_sentence(said, run)
      tried, survived = tried + 1, survived + good
      if not good:
        print(f"  {hurt.relative_to(run)}, {how}: {rc} {said[-300:]}", file=sys.stderr)
  return {"tried": tried, "survived": survived, "files": len(files)}


def fuzz(folder: pathlib.Path, cases: int, seed: int) -> dict[str, dict[str, float]]:
  """Reads damaged files of each kind; a reader that takes too long is ended."""
  _fuzz.write_sources(folder)
  command = [sys.executable, _fuzz.__file__, str(folder)]
  table: dict[str, dict[str, float]] = {}
  process: subprocess.Popen[bytes] | None = None
  limit = SECONDS
  for kind in KINDS:
    counts, worst, most = collections.Counter(), 0.0, 0.0
    for number in range(cases):
      if process is None:
        process = subprocess.Popen(
          command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        limit = 60.0  # it imports first
      assert process.stdin is not None and process.stdout is not None  # both are pipes
      case = {"seed": seed, "kind": kind, "number": number}
      process.stdin.write((json.dumps(case) + "\n").encode())
      process.stdin.flush()
      if select.select([process.stdout], [], [], limit + 1)[0]:
        line = process.stdout.readline()
      else:
        line = b""
      if not line:
        counts["hung or died"] += 1
        print(f"  {kind} {number} hung or died", file=sys.stderr)
        process.kill()
        process = None
        continue
      got, limit = json.loads(line), SECONDS
      over = got["seconds"] > SECONDS or got["memory"] > 2 * got["size"] + MEMORY
      counts["over a limit" if over else got["what"]] += 1
      worst, most = max(worst, got["seconds"]), max(most, got["memory"])
      if over or got["what"] not in ("read", "refused"):
        print(f"  {kind} {number}: {got}", file=sys.stderr)
    good = counts["read"] + counts["refused"]
    table[kind] = {"tried": cases, "survived": good, "read": counts["read"],
                   "refused": counts["refused"], "seconds": worst, "memory": most}  # fmt: skip
  if process and process.stdin:
    process.stdin.close()
    process.wait()
  return table


def tables(result: dict) -> dict[str, list[str]]:
  """The lines of the table."""
  lines = ["| fault | tried | survived | |", "|---|---|---|---|"]
  k = result["kills"]
  said = f"of one run, which ended after {k.get('steps')} steps bit for bit as one left alone"
  lines.append(f"| kill -9 at a random moment | {k['tried']} | {k['survived']} | {said} |")
  first = result["first saves"]
  said = (
    f"{first['early']} had nothing to resume and were begun again; results bit for bit the same"
  )
  lines.append(f"| kill -9 in the first save | {first['tried']} | {first['survived']} | {said} |")
  for name, what in (
    ("two processes", "one goes on, the other says why it does not"),
    ("full disks", "a sentence; with room, the results of a run that had it"),
  ):
    lines.append(f"| {name} | {result[name]['tried']} | {result[name]['survived']} | {what} |")
  d = result["damaged"]
  said = f"{d['files']} files, each with a flipped bit, and cut off or emptied: refused by name, "
  said += "or the same results"
  lines.append(f"| a damaged file of a run | {d['tried']} | {d['survived']} | {said} |")
  for kind, row in result["fuzz"].items():
    said = f"{row['refused']} refused with a sentence, {row['read']} read"
    limits = f"at most {row['seconds']:.1f} s and {row['memory'] / 1e6:.0f} MB"
    lines.append(f"| damaged: {kind} | {row['tried']} | {row['survived']} | {said}; {limits} |")
  return {"faults": lines}


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--cases", type=int, default=60, help="of each kind of file")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--json")
  parser.add_argument("--only", type=lambda text: text.split(","), help="the rest is from --json")
  options = parser.parse_args()
  rng = random.Random(options.seed)
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    (folder / "sources").mkdir()
    runs = Runs(folder)
    parts = {
      "kills": lambda: kills(runs, options.kills, rng),
      "first saves": lambda: first_saves(runs, 8, rng),
      "two processes": lambda: two_processes(runs, 4),
      "full disks": lambda: full_disks(runs, 6, rng),
      "damaged": lambda: damaged(runs, rng),
      "fuzz": lambda: fuzz(folder / "sources", options.cases, options.seed),
    }
    before = pathlib.Path(options.json or os.devnull).read_text() if options.only else "{}"
    result = {**json.loads(before)}
    for name, part in parts.items():
      if name in (options.only or parts):
        result[name] = part()
  print(*tables(result)["faults"], sep="\n")
  write(options.json, {"seed": options.seed} | {name: result[name] for name in parts})


if __name__ == "__main__":
  main()
