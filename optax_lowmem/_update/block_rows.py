"""Whole arrays seen as matrices whose rows are blocks: XLA then fuses all that is done to them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem._quantization.positions import Positions

Tile = Any  # a jax.Array, or a QuantizedArray with a single level of scales


def map_rows(
  fn: Callable[[list[Tile], list[Tile]], Sequence[Tile]],
  reads: Sequence[Tile],
  writes: Sequence[Tile],
) -> list[Tile]:
  """Returns `fn(reads, writes)`, computed at once on arrays of which each row is a block.

  In one index space from the codes that are read to those that are written, XLA makes one launch
  of what would be several, with arrays in float32 between them. Where blocks do not fill the rows
  of an array, or differ, it is computed as the arrays are.

  Args:
    fn: of tiles, as that of `map_tiles`.
    reads: arrays that are only read; all have one logical shape.
    writes: arrays that are replaced.
  """
  arrays = [*reads, *writes]
  quantized = [a for a in arrays if isinstance(a, QuantizedArray)]
  forms = {(a.block, a.extent) for a in quantized}
  if len(forms) != 1:
    return list(fn(list(reads), list(writes)))
  ((block, extent),) = forms
  length = math.prod(block)
  if math.prod(extent) % length or length % 2:
    return list(fn(list(reads), list(writes)))
  shape = quantized[0].shape
  # Merged with others, an axis that is sharded could not stay so.
  lead = shape[: -len(block)] if jax.device_count() > 1 else ()

  def view(a):
    if isinstance(a, Positions):
      return Positions(a.starts.reshape(*lead, -1, 1), (length,), (length,))
    if not isinstance(a, QuantizedArray):
      return a.reshape(*lead, -1, length)
    return dataclasses.replace(
      a,
      codes=a.codes.reshape(*lead, -1, length * a.codebook.bits // 8),
      scales=a.scales.reshape(*lead, -1, 1),
      block=(length,),
      extent=(length,),
    )

  def restore(a):
    if not isinstance(a, QuantizedArray):
      return a.reshape(shape)
    like = next(q for q in quantized if q.codebook == a.codebook)
    return dataclasses.replace(
      a,
      codes=a.codes.reshape(like.codes.shape),
      scales=a.scales.reshape(like.scales.shape),
      block=block,
      extent=extent,
    )

  return [restore(a) for a in fn([view(a) for a in reads], [view(a) for a in writes])]
