"""A tile of quantized values on a machine of vector lanes: no operation splits its last axis.

A TPU keeps the last axis of an array in 128 lanes. XLA splits an axis in blocks of 64 by copies: of
4096 x 4096 float32, 8-bit AdamW had 4 B/param of temporaries. Here a block's scale is a column of
its own, and the blocks' lanes are told apart by masks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem._quantization.codebook import Codebook
from optax_lowmem._quantization.scales import magnitudes, scales_of
from optax_lowmem._quantization.tangents import without_tangent


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("codes", "scales"),
  meta_fields=("codebook", "length"),
)
@dataclasses.dataclass(frozen=True)
class VectorTile:
  """A tile of whole blocks, which lie side by side in its rows.

  Attributes:
    codes: one code an element, (rows, blocks * length), of any integer dtype.
    scales: for each block of a row, those of all rows, (rows, 1).
    codebook: what the codes mean.
    length: elements of a block.
  """

  codes: Any
  scales: tuple[Any, ...]
  codebook: Codebook
  length: int

  def decode(self) -> jax.Array:
    """The values in float32."""
    return self.codebook.decode_blocks(self.codes, self._spread(self.scales))

  def encode(self, x: jax.Array, old: jax.Array) -> VectorTile:
    """Finite float32 values in the place of `old`, the values of this tile; codes of uint8."""
    x = without_tangent(x)
    pattern = magnitudes(x, self.codebook.signed)
    largest = (jnp.where(block, pattern, 0) for block in self._blocks())
    scales = tuple(
      scales_of(m.max(axis=-1, keepdims=True, initial=0), self.codebook) for m in largest
    )
    codes = self.codebook.encode_blocks(x, self._spread(scales), old)
    return dataclasses.replace(self, codes=codes, scales=scales)

  def _blocks(self) -> list[jax.Array]:
    """For each block of a row, which lanes are its own."""
    lane = jax.lax.broadcasted_iota(jnp.int32, self.codes.shape, 1)
    starts = range(0, self.codes.shape[1], self.length)
    return [(lane >= start) & (lane < start + self.length) for start in starts]

  def _spread(self, scales: Sequence[jax.Array]) -> jax.Array:
    """The scales of all elements."""
    lane = jax.lax.broadcasted_iota(jnp.int32, self.codes.shape, 1)
    spread = jnp.broadcast_to(scales[-1], self.codes.shape)
    for k in reversed(range(len(scales) - 1)):
      spread = jnp.where(lane < (k + 1) * self.length, scales[k], spread)
    return spread


def vector_tile_of(q: QuantizedArray, rows: int, width: int) -> VectorTile:
  """The form of a tile of `q`: of so many rows, and so many columns."""
  (length,) = q.block
  return VectorTile(
    codes=jax.ShapeDtypeStruct((rows, width), jnp.int32),
    scales=(jax.ShapeDtypeStruct((rows, 1), jnp.float32),) * (width // length),
    codebook=q.codebook,
    length=length,
  )


def unpack_vectors(packed: jax.Array, length: int) -> jax.Array:
  """Codes of 4 bits, two a byte and half a block apart, one an element: (rows, bytes) int32."""
  half, parts = length // 2, []
  for start in range(0, packed.shape[1], half):
    codes = packed[:, start : start + half]
    parts += [codes >> 4, codes & 15]
  return jnp.concatenate(parts, axis=1)


def pack_vectors(codes: jax.Array, length: int) -> jax.Array:
  """The inverse of `unpack_vectors`."""
  half, starts = length // 2, range(0, codes.shape[1], length)
  high = jnp.concatenate([codes[:, k : k + half] for k in starts], axis=1)
  low = jnp.concatenate([codes[:, k + half : k + length] for k in starts], axis=1)
  return (high << 4) | low
