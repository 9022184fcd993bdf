"""One layer's adapter as PEFT holds it, and a weight it is added to, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from optax_lowmem._variants.variant import Part, Variant

TILE = 1 << 21  # elements that are in float32 at a time: 8 MiB, a few times


class Delta(NamedTuple):
  """What an adapter does to the weight and the bias of one layer.

  Attributes:
    variant: the kind of adapter.
    parts: its arrays.
    scale: what the change of the weight is multiplied by.
    embedding: whether the weight is an embedding's table, (vocabulary, features).
    transposed: whether the weight is (in, out), as that of GPT-2's `Conv1D` (`fan_in_fan_out`).
  """

  variant: Variant
  parts: dict[str, np.ndarray]
  scale: float
  embedding: bool = False
  transposed: bool = False

  @property
  def sizes(self) -> dict[str, int]:
    """The numbers of inputs and outputs, `"in"` and `"out"`."""
    found = {"in": 0, "out": 0}  # a damaged file may have an axis too few
    for part in reversed(self._kinds):
      found |= dict(zip(part.axes, self.parts[part.name].shape, strict=False))
    return {axis: found[axis] for axis in ("in", "out")}

  @property
  def shape(self) -> tuple[int, int]:
    """Of the weight."""
    out, inputs = self.sizes["out"], self.sizes["in"]
    return (inputs, out) if self.embedding or self.transposed else (out, inputs)

  @property
  def bias(self) -> np.ndarray | None:
    """What is added to the bias, before the scale."""
    return self.variant.bias(self.parts)

  def add_to(self, weight: np.ndarray, dtype: Any) -> np.ndarray:
    """The merged weight, summed in float32 and rounded once to `dtype`.

    Beside `weight` and the result, a few tiles are in memory.
    """
    if self.transposed:
      return self._replace(transposed=False).add_to(weight.T, dtype).T
    out = np.empty(weight.shape, dtype)
    if not self.variant.normed:
      for rows in self._tiles():
        out[rows] = self._summed(weight, rows)
    elif self.embedding:  # norms of columns, so all rows are needed first
      squares = np.zeros(weight.shape[1], np.float64)
      for rows in self._tiles():
        squares += np.square(self._summed(weight, rows)).sum(0)
      factor = self.variant.factor(self.parts, np.sqrt(squares))
      for rows in self._tiles():
        out[rows] = self._summed(weight, rows) * factor
    else:
      for rows in self._tiles():
        one = self._summed(weight, rows)
        norm = np.sqrt(np.square(one).sum(1))
        out[rows] = one * self.variant.factor(self._of(rows), norm)[:, None]
    return out

  def add_to_bias(self, bias: np.ndarray, dtype: Any) -> np.ndarray:
    """The merged bias; `bias` itself if the adapter has none."""
    if self.bias is None:
      return bias
    scale = np.float32(self.scale)
    return (bias.astype(np.float32) + scale * self.bias).astype(dtype)

  def _tiles(self) -> Iterator[slice]:
    count, width = self.shape
    step = max(1, TILE // max(1, width))
    return (slice(start, start + step) for start in range(0, count, step))

  @property
  def _kinds(self) -> tuple[Part, ...]:
    return self.variant.parts(self.embedding)

  def _of(self, rows: slice) -> dict[str, np.ndarray]:
    """The parts that some rows of the weight need."""
    axis = "in" if self.embedding else "out"
    return {p.name: self.parts[p.name][p.rows(axis, rows)] for p in self._kinds}

  def _summed(self, weight: np.ndarray, rows: slice) -> np.ndarray:
    total = self.variant.delta(self._of(rows), np.matmul if self.embedding else _transposed)
    total *= np.float32(self.scale)
    total += weight[rows].astype(np.float32, copy=False)
    return total


def _transposed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return b.T @ a.T
