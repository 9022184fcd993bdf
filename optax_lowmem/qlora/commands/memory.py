"""``lowmem plan`` and ``lowmem compare``: what a run would hold, and what optimizers do."""

from __future__ import annotations

import json
from pathlib import Path

from optax_lowmem._plan.compare import compare_optimizer_memory
from optax_lowmem.qlora.commands.asked import (
  OWN,
  case_of,
  described,
  parser_for,
  record_of,
  remedies_of,
)
from optax_lowmem.qlora.commands.finetune import train
from optax_lowmem.qlora.planning.budget import budget_of
from optax_lowmem.qlora.planning.picture import draw
from optax_lowmem.qlora.planning.search import largest
from optax_lowmem.qlora.run.arguments import given, with_file
from optax_lowmem.qlora.run.recipe import check_optim
from optax_lowmem.qlora.run.settings import ONLY, Settings
from optax_lowmem.qlora.run.terminal import say, sentences


def plan(argv: list[str]) -> int:
  """``lowmem plan``: of a model by name or config; or, as ever, of a run from its own files."""
  parser = parser_for("plan")
  parser.add_argument("--max", choices=("seq-len", "batch-size"), help="find the largest that fits")
  parser.add_argument("--plot", metavar="PNG", help="draw the memory by part, with the card's line")
  with sentences():
    words = given(parser, argv)
    if not set(words) & set(OWN):
      return train([*argv, "--dry-run"])
    case, budget = case_of(words), budget_of(words.get("memory"), words.get("card"))
    card = words.get("card")
    if "max" in words:
      if budget is None:
        raise ValueError(f"--max {words['max']} needs --memory or --card, which say what there is.")
      found = largest(case, words["max"], budget, card)
      case, answer = found.case, found.plan
      head = f"--max {words['max']}: {found.value:,}"
      head += ", all of the model's positions" if found.bounded and found.value else ""
    else:
      found, head, answer = None, "", case.plan(card)
    fits = budget is None or budget.fits(answer)
    help_ = remedies_of(words, case, budget, answer) if budget and not fits else []
    if "plot" in words:
      draw(Path(words["plot"]), {case.model: answer}, budget)
  if words.get("json"):
    record = record_of(case, answer, budget)
    if found is not None:
      record |= {"max": words["max"], "value": found.value}
    print(json.dumps(record | {"remedies": [r for r, _ in help_]}, indent=2))
    return 0
  say(f"{case.model}, {case.config.parameter_count():,} parameters: {described(case)}")
  say(str(answer))
  if head:
    say(head)
  if budget is not None:
    say(budget.verdict(answer))
    say(budget.explained(answer))
  for _, line in help_:
    say(line)
  return 0


def compare(argv: list[str]) -> int:
  """``lowmem compare``."""
  parser = parser_for("compare")
  with sentences():
    words = given(parser, argv)
    if "memory" in words or "card" in words:
      flag = "--memory" if "memory" in words else "--card"
      raise ValueError(
        f"{flag} has no part in `lowmem compare`, which shows what optimizers hold. Leave it out, "
        "or ask `lowmem plan` whether a run fits."
      )
    of_adapters = {name for name, trained in ONLY.items() if trained == "adapters"}
    said = with_file(words)
    if not ({"full", "qlora"} | of_adapters) & set(said):
      words["full"] = True
    names = {"optimizers": _several(said["optim"])} if "optim" in said else {}
    case = case_of(words | {"optim": Settings.optim})  # one that a run can have
    table = compare_optimizer_memory(case.step().state.trained, **names)
  if words.get("json"):
    print(json.dumps([each.__dict__ for each in table], indent=2))
    return 0
  say(f"State of optimizers for {case.model}: {described(case, rows=False)}")
  say(str(table))
  if case.full and (bits := case.settings.masters) in ("8", "16"):
    say(f"Masters of {bits} bits come besides: {int(bits) // 8} B/param of what is in bfloat16.")
  return 0


def _several(text: str) -> list[str]:
  """The optimizers in a list with commas; ValueError for one that is not known."""
  names = [name.strip() for name in text.split(",")]
  if not all(names):
    raise ValueError(f"--optim {text} has an empty name. Write names, such as adamw,came.")
  for name in names:
    check_optim(name)
  return names
