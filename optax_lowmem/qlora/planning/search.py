"""The longest rows, or the most of them, that fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from optax_lowmem._plan.memory_plan import MemoryPlan
from optax_lowmem.qlora.planning.budget import Budget
from optax_lowmem.qlora.planning.case import Case

Quantity = Literal["seq-len", "batch-size"]
_TRIES = 6  # programs compiled at most, beside the first two
_MOST_ROWS = 1 << 16


class Largest(NamedTuple):
  """The largest value that fits.

  Attributes:
    value: of the quantity; 0 where not even the smallest fits.
    case: the run with it.
    plan: what it takes, compiled if a card was named.
    bounded: whether the model's positions, and not memory, are what ends it.
  """

  value: int
  case: Case
  plan: MemoryPlan
  bounded: bool = False


def largest(case: Case, quantity: Quantity, budget: Budget, card: str | None = None) -> Largest:
  """Finds the longest row, or the largest batch, that fits.

  What a step holds grows in proportion to tokens, but for what does not depend on them. So a line
  through two points says where to look; with a card each point is a compiled program, and the
  answer is one that was compiled and fits.

  Args:
    case: the run, but for that quantity.
    quantity: "seq-len", in steps of 128 tokens, or "batch-size", in steps of one row a device.
    budget: what there is.
    card: whose compiler is asked; by default the estimate is.
  """
  unit = 128 if quantity == "seq-len" else case.devices
  most = case.config.max_position_embeddings if quantity == "seq-len" else _MOST_ROWS
  tried: dict[int, Largest] = {}

  def at(units: int) -> Largest:
    if units not in tried:
      value = min(units * unit, most)
      changed = case.but(seq_len=value) if quantity == "seq-len" else case.but(batch_size=value)
      tried[units] = Largest(value, changed, changed.plan(card), value == most)
    return tried[units]

  last = -(-most // unit)  # in units, the last one perhaps cut short by the model's positions
  best = _search(lambda units: budget.usable - at(units).plan.device_bytes, last)
  if best == 0:
    return at(1)._replace(value=0)
  return at(best)


def _search(room: Callable[[int], int], last: int) -> int:
  """The most units that leave room, found with few calls; 0 where one does not."""
  if room(1) < 0:
    return 0
  low, high = 1, last + 1  # the first fits; the second does not, or is more than there is
  second = min(8, last)
  for _ in range(_TRIES + 1):
    if high - low <= 1:
      break
    guess = second if low == 1 and high == last + 1 else _line(room, low, high, last)
    guess = min(max(guess, low + 1), high - 1)
    if room(guess) >= 0:
      low = guess
    else:
      high = guess
    if high - low <= max(1, low // 50):  # within 2 %: another program would not be worth its time
      break
  return low


def _line(room: Callable[[int], int], low: int, high: int, last: int) -> int:
  """Where the line through two known points meets zero."""
  if high <= last:
    below, above = (low, room(low)), (high, room(high))
  else:
    below, above = (1, room(1)), (low, room(low))
  slope = (above[1] - below[1]) / (above[0] - below[0])
  if slope >= 0:  # more takes less, as where a compiler changes its mind
    return high - 1
  return int(below[0] - below[1] / slope)
