"""Rows in batches, in an order that depends on nothing but the seed and the step."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_lowmem.qlora.data.packing import bucket_lengths, packs


class Row(NamedTuple):
  """One sequence: at most ``seq_len + 1`` tokens, each a target for the tokens before it."""

  ids: np.ndarray  # int32
  learned: np.ndarray  # bool, the tokens that count in the loss


class Batch(NamedTuple):
  """Rows of one shape ``(..., rows, length)``; a leading axis counts the accumulated parts.

  The fields are numpy arrays, inside ``jit`` JAX arrays, in a dry run shapes.
  """

  inputs: Any  # int32
  targets: Any  # int32, inputs shifted by one
  learned: Any  # bool, where the target counts
  lengths: Any  # int32 (..., rows), tokens that are not padding
  positions: Any = None  # int32, where rows are packed: counted from 0 in each segment
  segments: Any = None  # int32, where rows are packed: 1, 2, ...; 0 is padding


def pad(rows: Sequence[Row], size: int, length: int, pad_id: int) -> Batch:
  """Rows below each other; short ones padded on the right, missing ones empty, neither counted."""
  ids = np.full((size, length + 1), pad_id, np.int32)
  learned = np.zeros((size, length + 1), bool)
  lengths = np.zeros(size, np.int32)
  for i, row in enumerate(rows):
    ids[i, : len(row.ids)] = row.ids
    learned[i, : len(row.ids)] = row.learned
    lengths[i] = len(row.ids) - 1
  return Batch(ids[:, :-1], ids[:, 1:], learned[:, 1:], lengths)


def pack(groups: Sequence[Sequence[Row]], size: int, seq_len: int, pad_id: int) -> Batch:
  """Groups of rows, each group one behind the other in a sequence.

  Each row keeps its own positions and has its own segment: a token attends to tokens of its
  segment only, and the first token of a row is no target for the row before it.
  """
  inputs, targets = (np.full((size, seq_len), pad_id, np.int32) for _ in range(2))
  positions, segments = (np.zeros((size, seq_len), np.int32) for _ in range(2))
  learned, lengths = np.zeros((size, seq_len), bool), np.zeros(size, np.int32)
  for i, group in enumerate(groups):
    start = 0
    for number, row in enumerate(group, 1):
      stop = start + len(row.ids) - 1
      inputs[i, start:stop], targets[i, start:stop] = row.ids[:-1], row.ids[1:]
      learned[i, start:stop] = row.learned[1:]
      positions[i, start:stop], segments[i, start:stop] = np.arange(stop - start), number
      start = stop
    lengths[i] = start
  return Batch(inputs, targets, learned, lengths, positions, segments)


class Batches:
  """Endless shuffled batches. ``at(step)`` depends on nothing but the seed and the step.

  Every epoch is a new shuffle and holds every row once. So training resumes at any step without
  replaying what came before.

  - Plain: rows padded to `seq_len`. An epoch begins in the batch in which the last one ends.
  - Packed: rows put together until `seq_len` is full.
  - With `buckets`: a batch has rows of similar length, padded to the shortest of a few lengths
    that holds them; an epoch's last batch may have fewer rows. There is a program to compile for
    each length.

  Attributes:
    lengths: of all batches there are.
  """

  def __init__(
    self,
    rows: list[Row],
    batch_size: int,
    parts: int,
    seq_len: int,
    pad_id: int,
    seed: int,
    *,
    packing: bool = False,
    buckets: int = 0,
  ):
    self.rows, self.shape, self.seq_len, self.pad_id = rows, (parts, batch_size), seq_len, pad_id
    self.seed, self.packing = seed, packing
    self.tokens = [len(row.ids) - 1 for row in rows]
    self.bucketed = bool(buckets)
    self.lengths = bucket_lengths(self.tokens, buckets, seq_len) if buckets else [seq_len]
    self._starts = [0]  # the number of the first unit of each epoch
    self._epoch: tuple[int, list[Any]] = (-1, [])

  def at(self, step: int) -> Batch:
    """The batch of training step `step` (from 0), of shape ``(parts, batch_size, length)``."""
    size = self.shape[0] * self.shape[1]
    if self.bucketed:
      rows = [self.rows[i] for i in self._unit(step)]
      flat = pad(rows, size, self._length(rows), self.pad_id)
    else:
      units = [self._unit(k) for k in range(step * size, (step + 1) * size)]
      flat = self._lay([[self.rows[i] for i in unit] for unit in units], size)
    return Batch(*(None if a is None else a.reshape(*self.shape, *a.shape[1:]) for a in flat))

  def steps(self, epochs: float) -> int:
    """How many steps that many passes over the rows take, by the first of them; at least one."""
    return max(1, math.ceil(epochs * self._steps_of_first() - 1e-9))

  def epochs(self, steps: int) -> float:
    """How many passes over the rows so many steps are."""
    return steps / self._steps_of_first()

  def _steps_of_first(self) -> float:
    units = len(self._units(0))
    return units if self.bucketed else units / (self.shape[0] * self.shape[1])

  def once(self, rows: Sequence[Row]) -> list[Batch]:
    """Every row of another set once, in few batches ``(batch_size, length)``, not shuffled."""
    size = self.shape[1]
    if self.packing:
      groups = packs([len(row.ids) - 1 for row in rows], range(len(rows)), self.seq_len)
    else:
      if self.bucketed:
        rows = sorted(rows, key=lambda row: len(row.ids))
      groups = [[i] for i in range(len(rows))]
    parts = [groups[i : i + size] for i in range(0, len(groups), size)]
    return [self._lay([[rows[i] for i in group] for group in part], size) for part in parts]

  def _lay(self, groups: list[list[Row]], size: int) -> Batch:
    if self.packing:
      return pack(groups, size, self.seq_len, self.pad_id)
    rows = [row for (row,) in groups]
    return pad(rows, size, self._length(rows), self.pad_id)

  def _length(self, rows: Sequence[Row]) -> int:
    longest = max(len(row.ids) - 1 for row in rows)
    return next(length for length in self.lengths if length >= longest)

  def _unit(self, k: int) -> list[int]:
    """Unit `k` of the run: the rows of a bucket's batch, of a pack, or one row."""
    epoch = next((e for e, start in enumerate(self._starts) if start > k), len(self._starts)) - 1
    units = self._units(epoch)
    while k >= self._starts[epoch] + len(units):  # an epoch that was not planned yet
      self._starts.append(self._starts[epoch] + len(units))
      epoch += 1
      units = self._units(epoch)
    return units[k - self._starts[epoch]]

  def _units(self, epoch: int) -> list[Any]:
    if self._epoch[0] != epoch:
      rng = np.random.default_rng((self.seed, epoch))
      order = rng.permutation(len(self.rows)).tolist()
      if self.packing:
        groups = packs(self.tokens, order, self.seq_len)
        units = [groups[i] for i in rng.permutation(len(groups))]
      elif self.bucketed:
        units = self._similar(order)
        units = [units[i] for i in rng.permutation(len(units))]
      else:
        units = [[i] for i in order]
      self._epoch = epoch, units
    return self._epoch[1]

  def _similar(self, order: list[int]) -> list[list[int]]:
    """Batches of rows of one bucket; what is left of a bucket joins the next longer one."""
    size = self.shape[0] * self.shape[1]
    left: list[int] = []
    batches: list[list[int]] = []
    for length in self.lengths:
      shorter = max((n for n in self.lengths if n < length), default=-1)
      left += [i for i in order if shorter < self.tokens[i] <= length]
      full = len(left) // size * size
      batches += [left[i : i + size] for i in range(0, full, size)]
      left = left[full:]
    return batches + ([left] if left else [])
