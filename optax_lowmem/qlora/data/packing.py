"""Two ways to pad less: put short rows together, or pad to one of a few lengths.

Here are only lengths; what is done with them is in ``batches.py``.
"""

from collections.abc import Sequence

import numpy as np

WINDOW = 1024  # rows looked at together: enough to fill well, few enough to keep them shuffled


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
  """Puts things of these lengths into as few bins as is quickly found.

  The longest goes first, each into the first bin that still has room. This never needs more than
  11/9 of the fewest possible bins, and a constant (Johnson, 1973).

  Args:
    lengths: of the things; none above `capacity`.
    capacity: of a bin.

  Returns:
    The indices in each bin.

  Raises:
    ValueError: where a thing is longer than a bin.

  >>> first_fit_decreasing([3, 8, 5, 2, 7], capacity=10)
  [[1, 3], [4, 0], [2]]
  """
  if lengths and max(lengths) > capacity:
    raise ValueError(f"a length of {max(lengths)} does not fit into a bin of {capacity}.")
  room = np.full(len(lengths), capacity)
  bins: list[list[int]] = []
  for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
    at = int(np.argmax(room >= lengths[i]))  # an unopened bin has room for anything
    if at == len(bins):
      bins.append([])
    bins[at].append(i)
    room[at] -= lengths[i]
  return bins


def packs(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
  """Groups of the things `order` that fit into `capacity` together, made window by window."""
  groups = []
  for start in range(0, len(order), WINDOW):
    window = order[start : start + WINDOW]
    bins = first_fit_decreasing([lengths[i] for i in window], capacity)
    groups += [[window[i] for i in bin] for bin in bins]
  return groups


def bucket_lengths(
  lengths: Sequence[int], count: int, capacity: int, multiple: int = 16
) -> list[int]:
  """The `count` lengths (or fewer) to which things can be padded with the least padding.

  They are multiples of `multiple`, and `capacity`, which is always one of them.

  >>> bucket_lengths([10, 12, 15, 60, 61, 100], count=3, capacity=128)
  [16, 64, 128]
  """
  choices = np.array([*range(multiple, capacity, multiple), capacity])
  below = np.searchsorted(np.sort(lengths), choices, side="right")  # things that fit a choice
  # Dynamic programming over the choices: least[i] is the fewest tokens for what fits choices[i]
  # when that is the longest in use; previous[i] is the choice below it, or -1.
  least, history = below * choices, []
  for _ in range(count - 1):
    with_one_more = least[:, None] + (below[None, :] - below[:, None]) * choices[None, :]
    with_one_more[np.tril_indices(len(choices))] = np.iinfo(with_one_more.dtype).max
    best = with_one_more.min(axis=0)
    history.append(np.where(best < least, with_one_more.argmin(axis=0), -1))
    least = np.minimum(least, best)
  at, used = len(choices) - 1, [capacity]
  for previous in reversed(history):
    if previous[at] >= 0:
      at = int(previous[at])
      used.append(int(choices[at]))
  return used[::-1]
