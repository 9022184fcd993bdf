"""How much memory there is for arrays, and whether a plan fits in it."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from optax_lowmem._arguments.sizes import bytes_of
from optax_lowmem._plan.cards import RESERVED, card_named
from optax_lowmem._plan.memory_plan import MemoryPlan

# What JAX takes of a GPU where XLA_PYTHON_CLIENT_MEM_FRACTION says nothing.
_TAKEN = 0.75
# How far an estimate of QLoRA may be from what a compiler says.
_CLOSE = 0.03
GIB = 2**30


class Budget(NamedTuple):
  """The memory of each device.

  Attributes:
    name: what was asked for: "24GB", or a card.
    total: bytes there are.
    usable: bytes that are left to arrays.
  """

  name: str
  total: int
  usable: int

  def fits(self, plan: MemoryPlan) -> bool:
    """Whether what a device holds is no more than there is."""
    return plan.device_bytes <= self.usable

  def verdict(self, plan: MemoryPlan) -> str:
    """One line: whether it fits."""
    needed, there = plan.device_bytes / GIB, self.usable / GIB
    digits = 1 if abs(needed - there) >= 0.1 else 2
    each = " on each device" if plan.devices > 1 else ""
    about = "about " if plan.method == "estimate" else ""
    sizes = f"{about}{needed:.{digits}f} of {there:.{digits}f} GiB{each}"
    if self.fits(plan):
      return f"fits: {sizes}"
    return f"does not fit: {sizes}, {needed - there:.{digits}f} too many"

  def explained(self, plan: MemoryPlan) -> str:
    """What the numbers of the verdict are, and what is to be set for it."""
    said = f"{self.name} has {self.total / GIB:.1f} GiB"
    if self.usable < self.total:
      said += f", of which {(self.total - self.usable) / GIB:.1f} are left to the driver and CUDA"
    said += "."
    if plan.method == "estimate" and abs(plan.device_bytes / max(1, self.usable) - 1) < _CLOSE:
      said += " That is close" + ("." if plan.note else "; --card asks a compiler.")
    part = plan.device_bytes / max(1, self.total)
    if self.fits(plan) and part > _TAKEN and plan.compiler != "cpu":
      said += (
        f" JAX takes {_TAKEN:.0%} of a GPU unless told otherwise: set "
        f"XLA_PYTHON_CLIENT_MEM_FRACTION to {min(0.99, math.ceil(100 * part) / 100)} or more."
      )
    return said


def budget_of(memory: str | None, card: str | None) -> Budget | None:
  """The memory that was asked for, or a card's; None where neither was named.

  Raises:
    ValueError: for an unknown card, and for a memory without a unit.
  """
  known = card_named(card) if card is not None else None
  if memory is None:
    return Budget(known.name, known.memory, known.usable) if known else None
  if re.fullmatch(r"\s*[\d.]+\s*", memory):
    raise ValueError(
      f"--memory {memory} has no unit. Write {memory.strip()}GB (10^9 bytes each) or "
      f"{memory.strip()}GiB (2^30)."
    )
  try:
    total = bytes_of("memory", memory, 1)
  except ValueError as error:
    raise ValueError(f"--memory: {error}") from error
  return Budget(memory.strip(), total, max(0, total - RESERVED))
