"""Updates of one parameter that may be run on parts of it, made known to whoever traces them.

The engine calls its update of a parameter through `jax.jit`. In a jaxpr that is one equation, of
which nothing says that it may be run on a few rows at a time. So while `offloaded` listens, each
such function gets a name of its own, under which what it does can be looked up.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from optax_lowmem._quantization.positions import Positions
from optax_lowmem._sharding.layout import Tile, shard_of
from optax_lowmem._state.moments import is_quantized

_listener: contextvars.ContextVar[Heard | None] = contextvars.ContextVar("listener", default=None)
_PREFIX = "optax_lowmem_update_"


@dataclasses.dataclass(frozen=True)
class Announced:
  """An update of one parameter, of which any rows can be made of the same rows of its arrays.

  Attributes:
    fn: of tiles by key, and of scalars by key; it makes an element of the elements of its block.
    members: keys of the tiles.
    made: keys of its results, which are among them.
    kept: those of `made` that `fn` returns as they are.
    scalars: keys of the scalars.
    tiles: the form of each member.
  """

  fn: Callable[[dict[int, Tile], dict[int, jax.Array]], Mapping[int, Tile]]
  members: Sequence[int]
  made: Sequence[int]
  kept: Sequence[int]
  scalars: Sequence[int]
  tiles: Sequence[Tile]

  @property
  def unit(self) -> int:
    """Of how many elements a part of the flat arrays must be a multiple; 0 if it is to be whole."""
    unit = 1
    for x in filter(is_quantized, self.tiles):
      if math.prod(x.extent) % math.prod(x.block):
        return 0  # the last block of a row is shorter
      pairs = x.codebook.bits == 4 and x.codebook.pairs_neighbours
      unit = math.lcm(unit, math.prod(x.block), 2 if pairs else 1)
    return unit

  @property
  def blocks(self) -> int:
    """Along how many of the last axes blocks lie."""
    return max(len(x.block) for x in self.tiles if is_quantized(x))

  def fits(self, eqn: Any) -> bool:
    """Whether `eqn`, which bears the name, is the call itself: under `jax.vmap` it is another."""
    expected = [x.shape for x in jax.tree.leaves(list(self.tiles))] + [()] * len(self.scalars)
    shapes = [v.aval.shape for v in eqn.invars]
    return shapes == expected and len(eqn.outvars) in (self._count(True), self._count(False))

  def _count(self, some: bool) -> int:
    tiles = zip(self.members, self.tiles, strict=True)
    made = {k for k in self.made if not (some and k in self.kept)}
    return sum(len(jax.tree.leaves(x)) for k, x in tiles if k in made)

  def run(self, flat: Sequence[jax.Array], count: int) -> list[jax.Array]:
    """The flat results; of `count`, for JAX may leave out those that are arguments."""
    return self._call(list(flat), count != self._count(False))

  @functools.cached_property
  def _call(self) -> Callable[..., list[jax.Array]]:
    # All lanes of all leaves for which this stands have tiles of one shape, and are traced once.
    arguments, structure = len(self.scalars), jax.tree.structure(list(self.tiles))

    def call(flat, some):
      count = len(flat) - arguments
      tiles = map(_form, jax.tree.unflatten(structure, flat[:count]))
      values = dict(zip(self.members, tiles, strict=True))
      new = self.fn(values, dict(zip(self.scalars, flat[count:], strict=True)))
      return jax.tree.leaves([new[k] for k in self.made if not (some and k in self.kept)])

    return jax.jit(call, static_argnums=1)


def _form(tile: Tile) -> Tile:
  """`tile`, its static form corrected if its arrays are some rows, or some blocks of flat ones."""
  if isinstance(tile, Positions):
    block = math.prod(tile.block)
    flat = Positions(tile.starts, (block,), (tile.starts.size * block,))
    return flat if tile.starts.ndim == 1 else shard_of(tile)
  if not is_quantized(tile) or tile.scales.ndim > 1:
    return shard_of(tile)
  block = math.prod(tile.block)
  return dataclasses.replace(tile, block=(block,), extent=(tile.scales.size * block,))


@dataclasses.dataclass
class Heard:
  """What was announced.

  Attributes:
    updates: by name.
    phases: whether rules were traced as a GPU computes them, and a CPU does not.
  """

  updates: dict[str, Announced] = dataclasses.field(default_factory=dict)
  phases: bool = False


@contextlib.contextmanager
def listening() -> Iterator[Heard]:
  """Yields what is announced within."""
  found = Heard()
  token = _listener.set(found)
  try:
    yield found
  finally:
    _listener.reset(token)


def is_heard() -> bool:
  """Whether anybody listens, who wants what a GPU computes."""
  return _listener.get() is not None


def announce_phases() -> None:
  """Makes known that rules that take norms were traced as a GPU computes them."""
  found = _listener.get()
  if found is not None:
    found.phases = True


def announced(call: Callable[..., Any], update: Announced) -> Callable[..., Any]:
  """`call`, which is about to be compiled, under a name by which `update` can be found."""
  found = _listener.get()
  if found is None:
    return call

  def named(arrays, shared):
    return call(arrays, shared)

  named.__name__ = named.__qualname__ = f"{_PREFIX}{len(found.updates)}"
  found.updates[named.__name__] = update
  return named
