"""Arrays seen as rows and columns, and tiles that are cut out of them and pasted back."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._programs.fences import fence
from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem._quantization.positions import Positions

# A position in an array of more elements does not fit the int32 of an index.
_FLAT = (1 << 31) - 1

Tile = Any  # a jax.Array, or a QuantizedArray with a single level of scales


def view(a: Tile, rows: int, columns: int) -> Tile:
  """`a` as a matrix, but codes and scales as vectors.

  XLA would copy a matrix of one column to lay it out, and it copies runs of a vector five times
  faster than rows of a matrix.
  """
  if isinstance(a, Positions):
    whole = (rows, columns) if a.of == a.shape else ()
    return Positions(a.starts.reshape(-1), (math.prod(a.block),), (columns,), whole)
  if not isinstance(a, QuantizedArray):
    return a.reshape(rows, columns)
  return dataclasses.replace(
    a,
    codes=a.codes.reshape(-1 if a.codes.size <= _FLAT else (rows, -1)),
    scales=jnp.reshape(a.scales, -1),
    block=(math.prod(a.block),),
    extent=(columns,),
  )


def written_view(a: Tile, rows: int, columns: int) -> Tile:
  """`view` of an array that tiles are pasted into: bfloat16 as integers, if XLA cannot paste it."""
  seen = view(a, rows, columns)
  if isinstance(a, QuantizedArray) or a.dtype != jnp.bfloat16 or _PASTES_BFLOAT16:
    return seen
  return jax.lax.bitcast_convert_type(seen, jnp.uint16)


def bits_in_step(a: Tile, i: Any) -> Tile:
  """A view that is only read, as step `i` of a loop is to cut it: bfloat16 as integers."""
  if isinstance(a, QuantizedArray | Positions) or a.dtype != jnp.bfloat16:
    return a
  return jax.lax.bitcast_convert_type(fence((a, i))[0], jnp.uint16)


def from_bits(tile: Tile, like: Tile) -> Tile:
  """A tile of `like` seen as integers, as one of `like`."""
  if isinstance(like, QuantizedArray | Positions) or like.dtype != jnp.bfloat16:
    return tile
  return jax.tree.map(lambda x: _with_bits(x, jnp.bfloat16), tile)


def restored(a: Tile, like: Tile) -> Tile:
  """The reverse of `view`, in the shape of `like`."""
  if not isinstance(like, QuantizedArray):
    return from_bits(a.reshape(like.shape), like)
  return jax.tree.map(
    lambda x, y: x.reshape(y.shape),
    dataclasses.replace(a, block=like.block, extent=like.extent),
    like,
  )


def _parts(q: QuantizedArray, columns: Any) -> tuple[Any, Any]:
  """Columns of `q` counted in bytes of codes and in scales (rounded up, if not traced)."""
  length = q.block[0]

  def ratio(a, b):
    return -(-a // b) if isinstance(a, int) else a // b

  scales = ratio(columns, length)
  if q.codebook.bits == 8:
    return columns, scales
  if q.codebook.pairs_neighbours:
    return ratio(columns, 2), scales
  return scales * -(-length // 2), scales


def cut_tile(a: Tile, at: tuple[Any, Any], extent: tuple[int, int], halved: bool) -> Tile:
  """The tile of a view at a row and a column; a dense one in two halves if `halved`."""
  height, width = extent
  if isinstance(a, Positions):
    return _cut_positions(a, at, extent)
  if not isinstance(a, QuantizedArray):
    if not halved:
      return jax.lax.dynamic_slice(a, at, extent)
    half = width // 2
    return tuple(jax.lax.dynamic_slice(a, (at[0], c), (height, half)) for c in (0, half))
  bytes_, scales = _parts(a, width)
  code_at, scale_at = _places(a, at)
  extents = (height * bytes_,) if a.codes.ndim == 1 else (height, bytes_)
  codes = jax.lax.dynamic_slice(a.codes, code_at, extents)
  scales_ = jax.lax.dynamic_slice(a.scales, scale_at, (height * scales,))
  return dataclasses.replace(
    a,
    codes=codes.reshape(height, bytes_),
    scales=scales_.reshape(height, scales),
    extent=(width,),
  )


def _cut_positions(a: Positions, at: tuple[Any, Any], extent: tuple[int, int]) -> Positions:
  (height, width), (length,), (columns,) = extent, a.block, a.extent
  count = -(-width // length)
  if a.of:  # counted, not read: `starts` of a whole array would be 0.06 B/param of temporaries
    row = jax.lax.broadcasted_iota(jnp.int32, (height, count), 0) + at[0]
    block = jax.lax.broadcasted_iota(jnp.int32, (height, count), 1)
    starts = row * columns + (at[1] + block * length)
  else:
    start = at[0] * -(-columns // length) + at[1] // length
    starts = jax.lax.dynamic_slice(a.starts, (start,), (height * count,)).reshape(height, count)
  # A loop counts in int64 with `jax_enable_x64`; indices are modulo 2^32 all the same.
  return Positions(starts.astype(jnp.int32), a.block, (width,))


def paste_tile(a: Tile, tile: Tile, at: tuple[Any, Any]) -> Tile:
  """A view with a tile, which may be in two halves, at a row and a column."""
  if not isinstance(a, QuantizedArray):
    for k, part in enumerate(tile if isinstance(tile, tuple) else (tile,)):
      place = at[0], at[1] + k * part.shape[1]
      a = jax.lax.dynamic_update_slice(a, _with_bits(part, a.dtype), place)
    return a
  code_at, scale_at = _places(a, at)
  codes = tile.codes.reshape(-1) if a.codes.ndim == 1 else tile.codes
  return dataclasses.replace(
    a,
    codes=jax.lax.dynamic_update_slice(a.codes, codes, code_at),
    scales=jax.lax.dynamic_update_slice(a.scales, tile.scales.reshape(-1), scale_at),
  )


def _places(q: QuantizedArray, at: tuple[Any, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
  """Where the codes and the scales of the element at row and column `at` lie."""
  row, (byte, scale) = at[0], _parts(q, at[1])
  bytes_, scales = _parts(q, q.extent[0])
  code_at = (row * bytes_ + byte,) if q.codes.ndim == 1 else (row, byte)
  return code_at, (row * scales + scale,)


def _with_bits(x: jax.Array, dtype: Any) -> jax.Array:
  """`x`, or if it is bfloat16 or integers in its place and is to be the other, that."""
  if {jnp.dtype(x.dtype), jnp.dtype(dtype)} != {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.uint16)}:
    return x
  return jax.lax.bitcast_convert_type(x, dtype)


# XLA's CPU backend cuts no bfloat16: it would hold all of the array in float32 for the loop. Made
# integers before the loop, or in a step that this can be taken out of, the array is copied.
# Before jax 0.12 it pastes none either, but converts all of the array in each step: 3.3 s, not 0.2,
# for 2^24 elements. So there the copy is taken. docs/xla_notes.md#bf16
_PASTES_BFLOAT16 = jax.__version_info__ >= (0, 12)
