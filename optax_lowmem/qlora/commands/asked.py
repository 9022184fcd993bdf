"""What fits: ``lowmem plan MODEL``, ``lowmem compare`` and ``lowmem recommend``.

  lowmem plan llama-2-7b --memory 24GB                   # does it fit, and if not, what would
  lowmem plan llama-2-7b --card rtx-4090 --seq-len 2048  # by that card's own compiler
  lowmem plan llama-3-8b --memory 24GB --max seq-len     # the longest rows that fit
  lowmem plan config.json --full --dtype float32 --memory 80GB
  lowmem plan llama-2-70b --memory 24GB --mesh 8 --batch-size 8 --fsdp
  lowmem compare llama-2-7b                              # what optimizers hold
  lowmem recommend llama-2-13b --memory 24GB             # how to train

A model is a name that is known here, a config.json, a directory that holds one, or a GGUF file.
Nothing is fetched, and no weights are needed. With --card the training step is compiled for that
card, which need not be there (`pip install 'optax_lowmem[plan]'`); without it, everything is exact
but the temporaries. All settings of `lowmem finetune` are understood.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import jax

from optax_lowmem.qlora.planning.budget import GIB, Budget
from optax_lowmem.qlora.planning.case import Case
from optax_lowmem.qlora.planning.changes import remedies
from optax_lowmem.qlora.planning.model_source import config_of, name_of
from optax_lowmem.qlora.run.arguments import parser_of, settings_of, with_file
from optax_lowmem.qlora.run.checks import check_length, check_patterns, check_rank
from optax_lowmem.qlora.run.settings import ONLY, flag_of, trained_by

# What is asked of a plan beside the settings of a run.
OWN = ("source", "memory", "card", "mesh", "max", "json", "plot", "task", "qlora")


def parser_for(command: str) -> argparse.ArgumentParser:
  parser = parser_of(__doc__ or "", f"lowmem {command}")
  parser.add_argument(
    "source", nargs="?", metavar="MODEL", help="a name, a config.json, a directory"
  )
  size, card = "of each device: 24GB, 24GiB", "compile for it: h100, rtx-4090, l4, v5e, ..."
  if command == "compare":  # which refuses them
    size = card = argparse.SUPPRESS
  parser.add_argument("--memory", metavar="SIZE", help=size)
  parser.add_argument("--card", help=card)
  parser.add_argument("--qlora", action="store_true", help="the same as --no-full")
  parser.add_argument("--mesh", type=int, metavar="N", help="devices to spread the rows over")
  parser.add_argument("--json", action="store_true", help="print numbers, not tables")
  return parser


def case_of(words: dict[str, Any]) -> Case:
  """The model and the settings that were asked for."""
  source, model = words.get("source"), words.get("model")
  if source and model and source != model:
    raise ValueError(
      f"--model {model} contradicts {source}, which is named without a flag. Leave out one of them."
    )
  source = source or with_file(words).get("model")
  if source is None:
    raise ValueError("Name a model: `lowmem plan llama-2-7b`, or a config.json.")
  if (count := words.get("mesh", 1)) > 1:
    with contextlib.suppress(RuntimeError):  # JAX has begun, perhaps with as many as are needed
      jax.config.update("jax_platforms", "cpu")  # nothing is run, and no card need be held
      jax.config.update("jax_num_cpu_devices", count)
  rest = {name: value for name, value in words.items() if name not in OWN}
  rest["model"] = None  # that is the source, which need not be one that a run could have
  if words.get("qlora"):
    if words.get("full"):
      raise ValueError("--full trains all parameters, and --qlora adapters. Leave out one of them.")
    rest["full"] = False
  if with_file(rest).get("dtype", "auto") == "auto":
    rest["dtype"] = "bfloat16"  # of the card, not of this machine
  settings = settings_of(rest)
  config = config_of(source)
  check_length(settings, config)
  if not settings.full:
    check_rank(settings, config)
    check_patterns(settings, config)
  return Case(name_of(source), config, settings, words.get("mesh", 1))


def described(case: Case, rows: bool = True) -> str:
  s = case.settings
  if case.full:
    kind = f"all parameters trained in {s.dtype}"
    if s.dtype == "bfloat16" and s.masters != "none":
      random = s.masters == "stochastic"
      kind += ", rounded at random" if random else f" with {s.masters}-bit masters"
  else:
    base = "16-bit" if s.quantize == "none" else s.quantize.upper()
    kind = f"adapters of rank {s.rank} on a base in {base}"
  if not rows:
    return f"{kind}."
  spread = f" on {case.devices} devices" if case.devices > 1 else ""
  return f"{kind}, {s.optim}, {s.batch_size} x {s.seq_len:,} tokens{spread}."


def remedies_of(
  words: dict[str, Any], case: Case, budget: Budget, answer: Any
) -> list[tuple[dict[str, Any], str]]:
  """What would make it fit, as data and as lines.

  Args:
    words: what was asked for; what is not of what is trained then is to be left out.
    case: the run that does not fit.
    budget: what there is.
    answer: what the run takes.
  """
  estimated = case.plan().device_bytes
  ratio = answer.device_bytes / estimated if answer.method == "compiled" else 1.0
  found = []
  for each in remedies(case, budget, ratio):
    what = " and ".join(change.what for change in each.changes)
    cost = "; ".join(change.cost for change in each.changes)
    flags = each.case.flags(case)
    trained = trained_by(each.case.settings)
    without = [flag_of(name) for name in words if ONLY.get(name, trained) != trained]
    said = f"{flags} without {' '.join(without)}" if without else flags
    line = f"would fit, at about {each.device_bytes / GIB:.1f} GiB: {said} ({what}; costs: {cost})"
    numbers = {"flags": flags, "without": without, "device_bytes": each.device_bytes}
    found.append((numbers | {"costs": cost}, line))
  if not found:
    line = (
      "Nothing that can be given up makes it fit. Take a smaller model, or more devices (--mesh N"
    )
    line += " --fsdp)."
    found.append(({}, line))
  return found


def record_of(case: Case, answer: Any, budget: Budget | None) -> dict[str, Any]:
  record = {"model": case.model, "flags": case.flags(), **answer.as_dict()}
  if budget is not None:
    record |= {"usable_bytes": budget.usable, "fits": budget.fits(answer)}
  return record
