"""What the layers of a model are called with, seen in one traced call of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from optax_lowmem._linear.tracing import trace
from optax_lowmem.nn._adapters.adapter import Adapter
from optax_lowmem.nn._layers.base_layer import is_known
from optax_lowmem.nn._model.model_tree import ModelTree, Place
from optax_lowmem.nn._proofs.flax_layers import is_embed, is_no_product
from optax_lowmem.nn._proofs.reading import may_be_product


@dataclasses.dataclass
class Calls:
  """What one layer is called with."""

  rank: int  # of its weight, as it is then
  inputs: dict[tuple[tuple[int, ...], Any], None] = dataclasses.field(default_factory=dict)
  more: dict[str, None] = dataclasses.field(default_factory=dict)


def watched_calls(
  model: nnx.Module,
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
  method: Callable[..., Any] | None,
) -> dict[str, Calls]:
  """{path: calls} of what may be a layer, in the order of the first calls.

  The copy that is traced has each of them in a module that writes down its calls. The model's own
  transformations (scan, vmap, remat) then show it one layer of a stack.
  """
  calls: dict[str, Calls] = {}
  graphdef, state = nnx.split(model)

  def call(state: Any, given: Any) -> None:
    copy: Any = nnx.merge(graphdef, state)
    for place in candidates(ModelTree(copy)):
      if place.replaceable:
        place.replace(_Watched(place.module, _Note(place.path, calls)))
    args, kwargs = given
    (copy if method is None else functools.partial(method, copy))(*args, **kwargs)

  trace(call, state, (args, kwargs))
  return calls


def candidates(tree: ModelTree) -> list[Place]:
  """What is a linear layer or an embedding, or may be one."""
  return [place for place in tree.outer if place.adapted or _may_be_layer(place.module)]


def _may_be_layer(module: Any) -> bool:
  if is_known(module) or is_embed(module):
    return True
  return may_be_product(module) and not is_no_product(module)


def rank_of(base: Any) -> int:
  values = (v.get_value() for v in vars(base).values() if isinstance(v, nnx.Variable))
  return max(getattr(value, "ndim", 0) for value in values)


@dataclasses.dataclass(frozen=True, eq=False)
class _Note:
  """Where the calls of one layer are written down."""

  path: str
  calls: dict[str, Calls]

  def __call__(self, layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    base = layer.base if isinstance(layer, Adapter) else layer
    calls = self.calls.setdefault(self.path, Calls(rank_of(base)))
    given = {**dict(zip(("its input", "a second"), args, strict=False)), **kwargs}
    given = {name: value for name, value in given.items() if value is not None}
    first = next(iter(given), "its input")
    x = given.pop(first, None)
    given.pop("out_sharding", None)
    calls.more.update(dict.fromkeys(given))
    if hasattr(x, "shape") and hasattr(x, "dtype"):
      calls.inputs.setdefault((tuple(x.shape), jnp.dtype(x.dtype)))
    else:
      calls.more.setdefault(first)


class _Watched(nnx.Module):
  """A layer in the copy of a model that is traced."""

  def __init__(self, layer: nnx.Module, note: _Note):
    self.layer, self.note = layer, note

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    layer: Any = self.layer
    self.note(layer, args, kwargs)
    return layer(*args, **kwargs)

  def __getattr__(self, name: str) -> Any:
    if name.startswith("_") or "layer" not in vars(self):
      raise AttributeError(name)
    return getattr(self.layer, name)
