"""Where each element of an array stands in it, held as one number a block.

What is drawn at random for an element is a hash of its index, so that it is the same however the
array is cut. An index for each element would be 4 bytes a parameter. So that of each block's first
one is held, cut as scales are, and a tile counts on from there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._quantization.array import QuantizedArray


def indices(shape: tuple[int, ...], steps: tuple[int, ...] | None = None) -> jax.Array:
  """The index of each element in an array of `shape`, modulo 2^32, in int32.

  Args:
    shape: of the array.
    steps: for each axis, of how many elements one is wanted, the first; by default of one.
  """
  steps = steps or (1,) * len(shape)
  sizes = tuple(-(-n // step) for n, step in zip(shape, steps, strict=True))
  # Of whole iotas: XLA would write one along an axis to memory, and what reads the same from there
  # it fuses, so that no parameter would be updated before the last gradient is there (3.5 B/param
  # of temporaries on an H100).
  index = jnp.zeros(sizes, jnp.uint32)
  for axis, step in enumerate(steps):
    stride = step * math.prod(shape[axis + 1 :]) % 2**32
    index += jax.lax.broadcasted_iota(jnp.uint32, sizes, axis) * jnp.uint32(stride)
  return jax.lax.bitcast_convert_type(index, jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
  """The indices of an array's elements.

  Attributes:
    starts: of the first of each block, int32, of the shape of a `QuantizedArray`'s scales.
    block: as that of a `QuantizedArray`.
    extent: as that of a `QuantizedArray`.
    of: the shape of the whole array, of which this may be a shard, or some rows.
  """

  starts: Any
  block: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  extent: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  of: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

  @classmethod
  def like(cls, q: QuantizedArray) -> Positions:
    """Those of an array that is held as `q`."""
    lead = q.ndim - len(q.block)
    return cls(indices(q.shape, (1,) * lead + q.block), q.block, q.extent, q.shape)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the array."""
    return (*self.starts.shape[: -len(self.block)], *self.extent)

  @property
  def dtype(self) -> Any:
    """Of the indices."""
    return self.starts.dtype

  def decode(self) -> jax.Array:
    """The indices."""
    return self._counted(min(math.prod(self.block), math.prod(self.extent))).reshape(self.shape)

  def decode_halves(self) -> tuple[jax.Array, jax.Array]:
    """Those of the two halves of every row, which is a block."""
    half = self.extent[0] // 2
    low = self._counted(half)
    return low, low + half

  def _counted(self, size: int) -> jax.Array:
    """The first so many of every block, rows merged."""
    lead, n = self.starts.shape[: -len(self.block)], math.prod(self.extent)
    starts = self.starts.reshape(*lead, -1, 1)
    shape = (*starts.shape[:-1], size)
    counted = starts + jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    return counted.reshape(*lead, shape[-2] * size)[..., :n]


def positions_of(arrays: Sequence[Any]) -> Any:
  """The indices of one array's elements, held as the first quantized one of its moments is.

  Args:
    arrays: of one shape: a gradient, moments.
  """
  like = next((x for x in arrays if isinstance(x, QuantizedArray)), None)
  return indices(arrays[0].shape) if like is None else Positions.like(like)
