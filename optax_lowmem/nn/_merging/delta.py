"""One layer's adapter as PEFT holds it, and a weight it is added to, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

TILE = 1 << 21  # elements that are in float32 at a time: 8 MiB, a few times


class Delta(NamedTuple):
  """What an adapter does to the weight and the bias of one layer.

  Attributes:
    a: (r, in); (r, vocabulary) of an embedding.
    b: (out, r); (features, r) of an embedding.
    scale: what the product is multiplied by.
    magnitude: DoRA's (out,), or None.
    bias: of B, (out,), or None.
    embedding: whether the weight is an embedding's table, (vocabulary, features).
    transposed: whether the weight is (in, out), as that of GPT-2's `Conv1D` (`fan_in_fan_out`).
  """

  a: np.ndarray
  b: np.ndarray
  scale: float
  magnitude: np.ndarray | None = None
  bias: np.ndarray | None = None
  embedding: bool = False
  transposed: bool = False

  @property
  def shape(self) -> tuple[int, int]:
    """Of the weight."""
    shape = (self.b.shape[0], self.a.shape[1])
    return shape[::-1] if self.embedding or self.transposed else shape

  def add_to(self, weight: np.ndarray, dtype: Any) -> np.ndarray:
    """The merged weight, summed in float32 and rounded once to `dtype`.

    Beside `weight` and the result, a few tiles are in memory.
    """
    if self.transposed:
      return self._replace(transposed=False).add_to(weight.T, dtype).T
    out = np.empty(weight.shape, dtype)
    if self.magnitude is None:
      for rows in self._tiles():
        out[rows] = self._summed(weight, rows)
    elif self.embedding:  # norms of columns, so all rows are needed first
      squares = np.zeros(weight.shape[1], np.float64)
      for rows in self._tiles():
        squares += np.square(self._summed(weight, rows)).sum(0)
      factor = _factor(self.magnitude, np.sqrt(squares))
      for rows in self._tiles():
        out[rows] = self._summed(weight, rows) * factor
    else:
      for rows in self._tiles():
        one = self._summed(weight, rows)
        norm = np.sqrt(np.square(one).sum(1))
        out[rows] = one * _factor(self.magnitude[rows], norm)[:, None]
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

  def _summed(self, weight: np.ndarray, rows: slice) -> np.ndarray:
    left, right = (self.a.T, self.b.T) if self.embedding else (self.b, self.a)
    total = left[rows] @ right
    total *= np.float32(self.scale)
    total += weight[rows].astype(np.float32, copy=False)
    return total


def _factor(magnitude: np.ndarray, norm: np.ndarray) -> np.ndarray:
  """Magnitude over norm, 0 where the norm is, in float32."""
  some = norm > 0
  return np.where(some, magnitude / np.where(some, norm, 1), 0).astype(np.float32)
