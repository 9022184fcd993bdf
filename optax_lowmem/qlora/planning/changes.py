"""What to give up where a run does not fit: a table, in the order in which to give it up."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from optax_lowmem.qlora.planning.budget import Budget
from optax_lowmem.qlora.planning.case import Case


def _sixteen_bit_weights(case: Case) -> Case | None:
  wide = case.full and case.settings.dtype == "float32"
  return case.but(dtype="bfloat16", masters="16") if wide else None


def _less_of_masters(case: Case) -> Case | None:
  less = {"16": "8", "8": "stochastic"}.get(case.settings.masters)
  narrow = case.full and case.settings.dtype == "bfloat16"
  return case.but(masters=less) if narrow and less else None


def _update_in_backward(case: Case) -> Case | None:
  s = case.settings
  possible = case.full and s.grad_accum == 1 and not s.update_in_backward
  return case.but(update_in_backward=True) if possible else None


def _fewer_bits(case: Case, bits: int) -> Case | None:
  rule = re.sub(r"_(torch|32bit|8bit)$", "", case.settings.optim)
  held = {"_8bit": 8, "_4bit": 4}.get(case.settings.optim[-5:], 32)
  plain = rule.removeprefix("paged_") in ("adam", "adamw", "ademamix", "lamb", "lars", "lion")
  return case.but(optim=f"{rule}_{bits}bit") if plain and bits < held else None


def _sixteen_bit_adapters(case: Case) -> Case | None:
  wide = not case.full and case.settings.adapter_dtype == "float32"
  return case.but(adapter_dtype="bfloat16") if wide else None


def _accumulated(case: Case) -> Case | None:
  if case.full and case.settings.update_in_backward:
    return None
  rows = case.settings.batch_size // 2
  if rows * 2 != case.settings.batch_size or rows % case.devices or rows < case.devices:
    return None
  return case.but(batch_size=rows, grad_accum=2 * case.settings.grad_accum)


def _in_parts(case: Case) -> Case | None:
  return case.but(fsdp=True) if case.devices > 1 and not case.settings.fsdp else None


def _paged(case: Case) -> Case | None:
  name = case.settings.optim
  return None if name.startswith("paged_") else case.but(optim=f"paged_{name}")


def _packed(case: Case) -> Case | None:
  wider = {"none": "int8", "int8": "nf4"}.get(case.settings.quantize)
  return case.but(quantize=wider) if wider and not case.full else None


def _lower_rank(case: Case) -> Case | None:
  rank = case.settings.rank
  return case.but(rank=rank // 2) if rank > 8 and not case.full else None


def _factored(case: Case) -> Case | None:
  usual = re.fullmatch(r"(paged_)?adamw?(_.*)?", case.settings.optim)
  return case.but(optim=f"{usual[1] or ''}came") if usual else None


def _adapters(case: Case) -> Case | None:
  return case.but(full=False, optim="adamw_8bit") if case.full else None


def _shorter(case: Case) -> Case | None:
  return case.but(seq_len=case.settings.seq_len // 2) if case.settings.seq_len >= 256 else None


class Change(NamedTuple):
  """Something to give up.

  Attributes:
    what: in words.
    cost: what is lost by it.
    of: makes the changed run, or None where there is nothing to give up.
  """

  what: str
  cost: str
  of: Callable[[Case], Case | None]


CHANGES = (
  Change("in parts on the devices", "devices wait for each other's parts", _in_parts),
  Change(
    "8-bit optimizer state", "+0.1 % held-out loss in docs/training.md",
    lambda case: _fewer_bits(case, 8),
  ),
  Change(
    "each layer updated in the backward pass", "time, where gradients are clipped to a norm",
    _update_in_backward,
  ),
  Change("fewer rows a pass, more passes", "time, where rows were few already", _accumulated),
  Change("bfloat16 weights, with masters", "products are of bfloat16", _sixteen_bit_weights),
  Change("bfloat16 adapters", "updates below 1/512 of a value are lost", _sixteen_bit_adapters),
  Change("base in fewer bits", "rounding of the base; time to unpack it", _packed),
  Change(
    "half of the masters' bits, or rounding at random", "noise in the weights, of mean 0",
    _less_of_masters,
  ),
  Change("state in host memory", "time: it travels to the device in each step", _paged),
  Change("half the rank", "what the adapters can learn", _lower_rank),
  Change(
    "4-bit optimizer state", "+0.6 % held-out loss in docs/training.md",
    lambda case: _fewer_bits(case, 4),
  ),
  Change("factored second moments", "another rule, with another learning rate", _factored),
  Change("adapters on a 4-bit base", "what is learned has the rank of the adapters", _adapters),
  Change("shorter rows", "what is longer is cut", _shorter),
)  # fmt: skip


class Remedy(NamedTuple):
  """Changes that together make a run fit.

  Attributes:
    changes: what is given up.
    case: the run that is left.
    device_bytes: what it holds, as estimated.
  """

  changes: tuple[Change, ...]
  case: Case
  device_bytes: int


def remedies(case: Case, budget: Budget, ratio: float = 1.0, most: int = 3) -> list[Remedy]:
  """What would make a run fit: single changes, or else the first of them together that do.

  Args:
    case: a run that does not fit.
    budget: what there is.
    ratio: what the compiler said of the run over what is estimated of it; estimates are multiplied
      by it.
    most: how many to look for.

  Returns:
    At most so many, in the order of `CHANGES`; one with several changes where no single one is
    enough; none where all of them together are not.
  """
  found: list[Remedy] = []
  for change in CHANGES:
    changed = change.of(case)
    if changed is not None and (size := _bytes(changed, ratio)) <= budget.usable:
      found.append(Remedy((change,), changed, size))
      if len(found) == most:
        break
  if found:
    return found
  made: list[Change] = []
  size = _bytes(case, ratio)
  for change in CHANGES:
    while (changed := change.of(case)) is not None:
      less = _bytes(changed, ratio)
      if less >= size:
        break
      case, size = changed, less
      made += [change] if change not in made else []
      if size <= budget.usable:
        return [Remedy(tuple(made), case, size)]
      if change.of in (_shorter, _lower_rank):  # by half, once; there is more to give up
        break
  return []


def _bytes(case: Case, ratio: float) -> int:
  return int(case.plan().device_bytes * ratio)
