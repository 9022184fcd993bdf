"""Which arrays of an optimizer's state are moments, of which parameter, and of what kind."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._quantization.array import QuantizedArray


class Kind(enum.Enum):
  """What a moment needs of the form it is held in."""

  FIRST = "signed average"  # a sign and a zero
  SECOND = "positive"  # no sign; what is positive must never become zero, or the update explodes


# The moments of optax, by the state's class and field; a class of this name from elsewhere is
# another one, which may average parameters. A field that is not listed is left alone.
# Left out on purpose, and told in docs/transformations.md:
# - copies of the parameters (`z`, `x0`, `params0`, `init_params`), which cannot be quantized;
# - sums that place the parameters at every step (MADGRAD, COCOB): rounding them moves parameters;
# - `mu` and `nu` of ScaleByRStdDevState: rounded, `nu - mu ** 2` may turn negative;
# - state that multiplies itself (Rprop's step sizes): 4 bits are coarser than its factor 1.2.
_KINDS: dict[str, dict[str, Kind]] = {
  "DAdaptAdamWState": {
    "exp_avg": Kind.FIRST,
    "exp_avg_sq": Kind.SECOND,
    "grad_sum": Kind.FIRST,
  },
  "EmaState": {"ema": Kind.FIRST},
  "FactoredState": {"v": Kind.SECOND},  # of the arrays that are not factored
  "MomoAdamState": {"exp_avg": Kind.FIRST, "exp_avg_sq": Kind.SECOND},
  "MomoState": {"exp_avg": Kind.FIRST},
  "MuonState": {"mu": Kind.FIRST},
  "ProdigyState": {"exp_avg": Kind.FIRST, "exp_avg_sq": Kind.SECOND, "grad_sum": Kind.FIRST},
  "ScaleByAdaDeltaState": {"e_g": Kind.SECOND, "e_x": Kind.SECOND},
  "ScaleByAdamState": {"mu": Kind.FIRST, "nu": Kind.SECOND},
  "ScaleByAdanState": {
    "m": Kind.FIRST,
    "v": Kind.FIRST,  # average of differences of gradients
    "n": Kind.SECOND,
    "g": Kind.FIRST,  # the last gradient
  },
  "ScaleByAdemamixState": {"m1": Kind.FIRST, "m2": Kind.FIRST, "nu": Kind.SECOND},
  "ScaleByAmsgradState": {"mu": Kind.FIRST, "nu": Kind.SECOND, "nu_max": Kind.SECOND},
  "ScaleByBeliefState": {"mu": Kind.FIRST, "nu": Kind.SECOND},
  "ScaleByLionState": {"mu": Kind.FIRST},
  "ScaleByNovogradState": {"mu": Kind.FIRST},  # `nu` is one number a parameter
  "ScaleByOptimisticGradientState": {"previous_gradient": Kind.FIRST},
  "ScaleByRmsState": {"nu": Kind.SECOND},
  "ScaleByRmsWithCountState": {"nu": Kind.SECOND},
  "ScaleByRssState": {"sum_of_squares": Kind.SECOND},
  "ScaleBySM3State": {"nu": Kind.FIRST},  # momentum, in spite of its name; `mu` is factored
  "ScaleBySimplifiedAdEMAMixState": {"m": Kind.FIRST, "n": Kind.SECOND},
  "SophiaState": {"mu": Kind.FIRST, "nu": Kind.FIRST},  # a Hessian's diagonal has a sign
  "TraceState": {"trace": Kind.FIRST},
}


# What a bfloat16 parameter lacks of its float32: integers of which each belongs to an element.
REMAINDERS = (jnp.dtype(jnp.int16), jnp.dtype(jnp.int8))


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
    if jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype in REMAINDERS:
      for split in range(len(path) + 1):
        index, shape = known.get(path[split:], (None, None))
        if index is not None and shape == leaf.shape:
          return Place(path, index, path[:split])
    return Place(path, None, path)

  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)
  return [place(path, leaf) for path, leaf in flat]


def field_of(place: Place) -> str | None:
  """The name of the state's field, or key of a dict, that holds the moment, such as "mu"."""
  match place.prefix:
    case (*_, jax.tree_util.GetAttrKey(name)):
      return name
    case (*_, jax.tree_util.DictKey(str(name))):
      return name
  return None


def kind_of(state: Any, place: Place) -> Kind | None:
  """What kind of moment stands at `place`, or None if it is not known to be one."""
  field = field_of(place)
  if place.owner is None or field is None or not is_of_optax(state, place):
    return None
  return _KINDS.get(type(_holder(state, place)).__name__, {}).get(field)


def is_of_optax(state: Any, place: Place) -> bool:
  """Whether the class of the state at `place` is optax's, or this library's."""
  return type(_holder(state, place)).__module__.split(".")[0] in ("optax", "optax_lowmem")


def _holder(state: Any, place: Place) -> Any:
  """What has the field in which `place` is; None if it cannot be reached."""
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
  return holder


def is_quantized(x: Any) -> bool:
  """Whether `x` is a `QuantizedArray`, which stands for one leaf here."""
  return isinstance(x, QuantizedArray)
