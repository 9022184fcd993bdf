"""One parameter's update as a plan: what it reads, what it replaces, what it makes of a part of it.

A plan is pure. Tiles, a kernel, whole arrays and paging execute it, each in its own way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_lowmem._programs.program import Program
from optax_lowmem._quantization.array import decode_halves, encode_finite, encode_halves, is_finite
from optax_lowmem._quantization.lane_tiles import VectorTile
from optax_lowmem._quantization.positions import Positions
from optax_lowmem._quantization.scales import healed
from optax_lowmem._state.moments import is_quantized

# A jax.Array, a QuantizedArray with a single level of scales, a VectorTile, or Positions.
Tile = Any

# Of a parameter and of what a rule gives in its update's place: the update. Elementwise.
Emission = Callable[[jax.Array, jax.Array], jax.Array]


class Step(NamedTuple):
  """What a plan makes of tiles.

  Attributes:
    fn: of tiles of `reads`, then of `writes`; returns the new tiles of `writes`, and last, if it is
      not among them, that of the update. Of what else stands in `writes` it takes no notice.
    reads: positions of arrays that are only read.
    writes: positions of arrays that are replaced.
    fresh: form of the update, if it cannot take its gradient's place.
  """

  fn: Callable[[Sequence[Tile], Sequence[Tile]], list[Tile]]
  reads: list[int]
  writes: list[int]
  fresh: list[jax.ShapeDtypeStruct]


class LeafPlan:
  """One parameter's update by a rule that was proved elementwise.

  Attributes:
    leaf: the index of the parameter; also the position of its gradient and of its update.
    kept: positions of state that the rule leaves as it is.
    moving: positions of state that it replaces.
    update: form of the update.
    scalars: where in what the rule's shared part gave the numbers are that it needs.
  """

  def __init__(
    self,
    program: Program,
    leaf: int,
    states: Sequence[int],
    values: Mapping[int, Tile],
    dtype: Any,
    emit: Emission | None = None,
  ):
    """Makes a plan.

    Args:
      program: the proved rule.
      leaf: the index of the parameter.
      states: positions of its arrays in the state.
      values: by position: the gradient, `states`, and the parameter if the rule was given it.
      dtype: dtype of the update.
      emit: what makes the update of the parameter and of what the rule gives in the update's place,
        numbers of the parameter's dtype; None if that is the update.
    """
    self._program = program
    self.leaf = leaf
    self.kept = [k for k in states if program.returns_argument(k) == k]
    self.moving = [k for k in states if k not in self.kept]
    self.update = jax.ShapeDtypeStruct(values[leaf].shape, dtype)
    self._gradient = values[leaf].dtype
    self._emit = emit
    self.scalars = program.outline(sorted(values), [leaf, *states])[1]
    known = (leaf, *states)
    self._params = [k for k, x in values.items() if k not in known and not isinstance(x, Positions)]
    if emit is None:
      self._direction, self._unfinished = program.before_parameters(leaf, [leaf, *states]), dtype
    else:
      self._direction, self._unfinished = leaf, values[self._params[0]].dtype

  def step(self, env: Mapping[int, Any], finished: bool = True) -> Step:
    """What is made of tiles.

    Args:
      env: what the rule's shared part gave.
      finished: whether to make the update itself, or only what `finish` makes it of.
    """
    made = [*self.moving, self.leaf if finished else self._direction]
    needed = self._program.arguments_of(self.leaf, made, ()) | set(self.moving)
    emit = self._emit if finished else None
    if emit is not None:
      needed |= {self._params[0]}
    dtype = self.update.dtype if finished else self._unfinished
    fresh = [] if self._gradient == dtype else [jax.ShapeDtypeStruct(self.update.shape, dtype)]
    writes = [*self.moving, *([] if fresh else [self.leaf])]
    reads = sorted(needed - set(writes))

    def fn(read, write):
      tiles = dict(zip(reads, read, strict=True))
      tiles |= dict(zip(writes, write, strict=False))
      tiles |= zip(self.moving, healed([tiles[k] for k in self.moving]), strict=True)
      old = _parts(tiles)
      # Of a tile, or of halves, the rule alone would store its update before it is added.
      part = next(iter(old[0].values())).size < math.prod(self.update.shape)
      rounded = finished and part
      run = functools.partial(self._program.run_leaf, self.leaf, dict(env), rounded=rounded)
      new = [run(part, made) for part in old]
      updates = [part[made[-1]] for part in new]
      if emit is not None:
        pairs = zip(old, updates, strict=True)
        updates = [emit(part[self._params[0]], update) for part, update in pairs]
      return [*self._stored(tiles, new, old), _cast(updates, dtype)]

    return Step(fn, reads, writes, fresh)

  def finish(self, env: Mapping[int, Any], values: Mapping[int, Tile], update: Any) -> jax.Array:
    """The update, where `step` was not to make it: weight decay and the like are applied.

    XLA fuses this with `apply_updates`, which reads the parameters anyway. Read in a kernel too,
    they would cost 4 B/param of traffic.
    """
    if self._emit is not None:
      return self._emit(values[self._params[0]], update).astype(self.update.dtype)
    if self._direction == self.leaf:
      return update
    params = {k: values[k].astype(jnp.float32) for k in self._params}
    given = {self._direction: update.astype(jnp.float32)}
    run = functools.partial(self._program.run_leaf, self.leaf, dict(env), params, [self.leaf])
    return run(given=given)[self.leaf].astype(self.update.dtype)

  def _stored(
    self,
    tiles: Mapping[int, Tile],
    new: Sequence[Mapping[int, jax.Array]],
    old: Sequence[Mapping[int, jax.Array]],
  ) -> list[Tile]:
    """The new moments in the form of the old. Of an element of which one is not finite, none is."""
    if not self.moving:  # an update made of a state that stays as it is
      return []
    parts: list[dict[int, jax.Array]] = []
    for values, olds in zip(new, old, strict=True):
      floats = [k for k in self.moving if not is_integer(values[k])]
      finite = functools.reduce(jnp.logical_and, [is_finite(values[k]) for k in floats], True)
      kept = {k: jnp.where(finite, values[k], olds[k]) for k in floats}
      parts.append({k: kept.get(k, values[k]) for k in self.moving})
    return [
      _encode(tiles[k], [part[k] for part in parts], [part[k] for part in old]) for k in self.moving
    ]


def _parts(tiles: Mapping[int, Tile]) -> list[dict[int, jax.Array]]:
  """Tiles in float32: as they are, or in two parts where `map_tiles` gave pairs."""
  pairs = any(isinstance(x, tuple) for x in tiles.values())

  def parts(x):
    if not pairs:
      return [decoded(x)]
    if isinstance(x, Positions):
      return x.decode_halves()
    if is_quantized(x):
      return decode_halves(x)
    return [decoded(half) for half in x]

  both = {k: parts(x) for k, x in tiles.items()}
  return [{k: x[i] for k, x in both.items()} for i in range(1 + pairs)]


def decoded(stored: Tile) -> jax.Array:
  """`stored` in float32; integers as they are."""
  if isinstance(stored, VectorTile | Positions):
    return stored.decode()
  if not is_quantized(stored) and is_integer(stored):
    return stored
  return stored.dequantize(jnp.float32) if is_quantized(stored) else stored.astype(jnp.float32)


def is_integer(x: Any) -> bool:
  return jnp.issubdtype(x.dtype, jnp.integer)


def _cast(parts: Sequence[jax.Array], dtype: Any) -> Tile:
  cast = tuple(x.astype(dtype) for x in parts)
  return cast[0] if len(cast) == 1 else cast


def _encode(like: Tile, parts: Sequence[jax.Array], olds: Sequence[jax.Array]) -> Tile:
  """The parts of a finite value in the form of the tile `like`, which holds `olds`."""
  if isinstance(like, VectorTile):
    return like.encode(parts[0], olds[0])
  if not is_quantized(like):
    return _cast(parts, like[0].dtype if isinstance(like, tuple) else like.dtype)
  if len(parts) == 1:
    return encode_finite(parts[0], like.codebook, like.block, olds[0])
  return encode_halves(parts, like, olds)
