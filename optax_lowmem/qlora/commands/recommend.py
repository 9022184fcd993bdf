"""``lowmem recommend``: how to train a model in the memory there is."""

from __future__ import annotations

import json
from typing import Any

from optax_lowmem._plan.memory_plan import aligned
from optax_lowmem.qlora.commands.asked import (
  case_of,
  parser_for,
  record_of,
  remedies_of,
)
from optax_lowmem.qlora.planning.budget import GIB, budget_of
from optax_lowmem.qlora.planning.recipes import CHOSEN, TASKS, Fit, ranked
from optax_lowmem.qlora.run.arguments import given, with_file
from optax_lowmem.qlora.run.settings import flag_of
from optax_lowmem.qlora.run.terminal import say, sentences

_TASK = "; ".join(f"{name}: {', then '.join(order)}" for name, (order, _) in TASKS.items())


def recommend(argv: list[str]) -> int:
  """``lowmem recommend``."""
  parser = parser_for("recommend")
  parser.add_argument(
    "--task", choices=TASKS, help=f"what is to be learned (default: instructions). {_TASK}"
  )
  with sentences():
    words = given(parser, argv)
    budget = budget_of(words.get("memory"), words.get("card"))
    if budget is None:
      raise ValueError("Say what there is: --memory 24GB, or --card rtx-4090.")
    said = with_file(words)
    _check_free(words, said)
    case, task = case_of(words), words.get("task", "instructions")
    if case.devices > 1 and "fsdp" not in said:
      case = case.but(fsdp=True)  # each holds a part, where nothing else is asked for
    fits = ranked(case, task, budget, words.get("card"))
    best = next((each for each in fits if each.fits), None)
    least = min(fits, key=lambda each: each.plan.device_bytes)
    help_ = [] if best else remedies_of(words, least.case, budget, least.plan)
  if words.get("json"):
    rows = [
      record_of(f.case, f.plan, budget) | {"recipe": f.recipe.name, "reason": f.recipe.reason}
      for f in fits
    ]
    print(json.dumps({"task": task, "rows": rows, "remedies": [r for r, _ in help_]}, indent=2))
    return 0
  s = case.settings
  tokens = f"{s.batch_size} x {s.seq_len:,} tokens"
  say(f"{case.model} on {budget.usable / GIB:.1f} GiB, {tokens}; {task}: {TASKS[task][1]}")
  rows = [["", "needs", "fits"]]
  for each in fits:
    size = f"{each.plan.device_bytes / GIB:.1f} GiB"
    rows.append([each.recipe.name, size, "yes" if each.fits else "no"])
  reasons = ["because", *(each.recipe.reason for each in fits)]
  for line, reason in zip(aligned(rows).splitlines(), reasons, strict=True):
    say(f"{line}  {reason}")
  say("Nothing fits." if best is None else _taken(best))
  for _, line in help_:
    say(line)
  return 0


def _check_free(words: dict[str, Any], said: dict[str, Any]) -> None:
  """Refuses settings that each recipe would set anew.

  Args:
    words: of the command line.
    said: these, and those of the file that they name.

  Raises:
    ValueError: for the first of them.
  """
  for name in CHOSEN:
    if name in said:
      what = flag_of(name) if name in words else f"--config {words['config']}: {name}"
      instead = f", or say --task ({_TASK})" if name == "full" else ""
      raise ValueError(
        f"{what} is what `lowmem recommend` chooses. Leave it out{instead}, or ask `lowmem plan`, "
        "which takes all settings."
      )


def _taken(best: Fit) -> str:
  """What to do, for the best that fits."""
  compiler = best.plan.compiler
  note = best.plan.note.removesuffix(".")
  ask = note[:1].lower() + note[1:] or "--card asks a compiler"
  by = f"by the compiler of: {compiler}" if compiler else f"as estimated; {ask}"
  s, flags = best.case.settings, best.case.flags(devices="--devices")
  rows = {"batch_size": s.batch_size, "seq_len": s.seq_len}  # what "needs" depends on most
  said = [f"{flag_of(k)} {v}" for k, v in rows.items() if f"{flag_of(k)} " not in flags]
  how = " ".join(["lowmem finetune --model DIR", *said, flags])
  return f"Take: {best.recipe.name} ({by}): {how}"
