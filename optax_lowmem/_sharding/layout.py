"""How arrays, dense or quantized, lie on a mesh: in shards that hold whole blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from optax_lowmem._meshes.explicit_axes import explicit_sharding, is_explicit
from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem._quantization.positions import Positions

Tile = Any  # a jax.Array, or a QuantizedArray with a single level of scales


def divide(units: Sequence[int], spec: Any, sizes: Mapping[str, int]) -> PartitionSpec:
  """How to cut an array as `spec` says, but through no block.

  Mesh axes that an axis of the array cannot be cut by go to the first one that can. Without such
  a one, the devices along that mesh axis hold the same.

  Args:
    units: for each axis, the number of pieces that cannot be cut further.
    spec: how the array would be cut.
    sizes: of the axes of the mesh.
  """
  cut: list[list[str]] = [[] for _ in units]
  moved: list[str] = []

  def fits(k, name):
    return units[k] % math.prod(sizes[n] for n in (*cut[k], name)) == 0

  for k, names in enumerate(spec):
    for name in (names,) if isinstance(names, str) else names or ():
      (cut[k] if fits(k, name) else moved).append(name)
  for name in moved:
    k = next((k for k in range(len(units)) if fits(k, name)), None)
    if k is not None:
      cut[k].append(name)
  return PartitionSpec(*(names[0] if len(names) == 1 else tuple(names) or None for names in cut))


def laid_out(
  mesh: Any, spec: PartitionSpec | Sequence[Any], kind: str | None = None
) -> NamedSharding:
  """The sharding by `spec` in JAX's own words, and a kind of memory.

  Explicit ones have a word for each axis, automatic ones none after the last axis that is cut: an
  array in other words than its next state's would be traced again.
  """
  spec = tuple(spec)
  if not is_explicit(mesh):
    spec = spec[: max((k + 1 for k, names in enumerate(spec) if names), default=0)]
  return NamedSharding(mesh, PartitionSpec(*spec), memory_kind=kind)


def units_of(tile: Tile) -> tuple[int, ...]:
  """For each axis, the number of pieces it may be cut into so that each holds whole blocks."""
  if not isinstance(tile, QuantizedArray | Positions):
    return tile.shape
  n, block = tile.extent[0], tile.block[0]
  if isinstance(tile, Positions):
    pass
  elif tile.codebook.bits == 4 and tile.codebook.pairs_neighbours and math.prod(tile.block) % 2:
    block *= 2  # a byte holds codes of two blocks
  lead = tile.shape[: -len(tile.block)]
  return (*lead, n // block if n % block == 0 else 1, *(1 for _ in tile.block[1:]))


def sharding_of(leaf: Any) -> NamedSharding | None:
  """How `leaf` lies on a mesh, where that is known: not in automatic mode inside `jit`."""
  if not isinstance(leaf, Tracer):
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None
  return explicit_sharding(leaf)


def shard_of(tile: Tile) -> Tile:
  """`tile`, its static extent corrected if its arrays are shards."""
  if not isinstance(tile, QuantizedArray | Positions):
    return tile
  blocks = -(-tile.extent[0] // tile.block[0])
  here = tile.scales if isinstance(tile, QuantizedArray) else tile.starts
  shards = blocks // here.shape[here.ndim - len(tile.block)]
  return dataclasses.replace(tile, extent=(tile.extent[0] // shards, *tile.extent[1:]))
