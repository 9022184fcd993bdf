"""Which arrays of an optimizer's state are moments, of which parameter, and of what kind."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._blocks import QuantizedArray

# Codebook of each moment, by the state's class and field. First moments and other signed averages
# need a sign and a zero; second moments must never become zero, or the update explodes. A field
# that is not listed is left alone: it may be a copy of the parameters, which 8 bits cannot hold.
_KINDS: dict[str, dict[str, str]] = {
  "ScaleByAdamState": {"mu": "log8", "nu": "log8_unsigned"},
  "ScaleByAmsgradState": {"mu": "log8", "nu": "log8_unsigned", "nu_max": "log8_unsigned"},
  "ScaleByBeliefState": {"mu": "log8", "nu": "log8_unsigned"},
  "ScaleByLionState": {"mu": "log8"},
  "ScaleByRmsState": {"nu": "log8_unsigned"},
  "ScaleByRssState": {"sum_of_squares": "log8_unsigned"},
  "TraceState": {"trace": "log8"},
}


@dataclasses.dataclass(frozen=True)
class Place:
  """Where one array of a tree belongs.

  Attributes:
    path: its key path.
    owner: index of the parameter it belongs to; None for counts, hyperparameters and the like.
    prefix: the key path without the parameter's own.
  """

  path: tuple[Any, ...]
  owner: int | None
  prefix: tuple[Any, ...]


def places(tree: Any, params: Any) -> list[Place]:
  """Says of every leaf of `tree`, in order, which parameter it belongs to.

  A leaf belongs to the parameter whose key path ends its own and whose shape it has: trees of
  moments are made by mapping over the parameters, through however many wrappers (chains, masks,
  partitions, injected hyperparameters). Leaves need only a shape and a dtype.
  """
  known = {
    path: (index, jnp.shape(leaf))
    for index, (path, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(params)[0])
  }

  def place(path, leaf):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      for split in range(len(path) + 1):
        index, shape = known.get(path[split:], (None, None))
        if index is not None and shape == leaf.shape:
          return Place(path, index, path[:split])
    return Place(path, None, path)

  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)
  return [place(path, leaf) for path, leaf in flat]


def field_of(place: Place) -> str | None:
  """The name of the state's field that holds the moment, such as "mu"."""
  match place.prefix:
    case (*_, jax.tree_util.GetAttrKey(name)):
      return name
  return None


def codebook_of(state: Any, place: Place) -> str | None:
  """The codebook that suits a moment, or None if it is not known to be one."""
  field = field_of(place)
  if place.owner is None or field is None:
    return None
  holder = state
  for key in place.prefix[:-1]:
    match key:
      case jax.tree_util.GetAttrKey(name):
        holder = getattr(holder, name)
      case jax.tree_util.SequenceKey(index):
        holder = holder[index]
      case jax.tree_util.DictKey(name):
        holder = holder[name]
      case _:
        return None
  return _KINDS.get(type(holder).__name__, {}).get(field)


def is_quantized(x: Any) -> bool:
  """Whether `x` is a `QuantizedArray`, which stands for one leaf here."""
  return isinstance(x, QuantizedArray)
