"""What the layers of a model are called with, seen in one traced call of it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
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

  In the copy that is traced, each of them is of a subclass of its class that writes down its calls.
  The model's own transformations (scan, vmap, remat) then show it one layer of a stack.
  """
  calls: dict[str, Calls] = {}
  graphdef, state = nnx.split(model)

  def call(state: Any, given: Any) -> None:
    copy: Any = nnx.merge(graphdef, state)
    for place in candidates(ModelTree(copy)):
      if place.replaceable:
        setattr(place.module, _NOTE, _Note(place.path, calls))
        leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(place.module))
        place.module.__class__ = _watched(type(place.module), not leaf)
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

  def __call__(self, layer: Any, given: Mapping[str, Any]) -> None:
    base = layer.base if isinstance(layer, Adapter) else layer
    calls = self.calls.setdefault(self.path, Calls(rank_of(base)))
    first, *more = [name for name in given if name != "out_sharding"] or [""]
    calls.more.update(dict.fromkeys(more))
    x: Any = given.get(first)
    if hasattr(x, "shape") and hasattr(x, "dtype"):
      calls.inputs.setdefault((tuple(x.shape), jnp.dtype(x.dtype)))


# The attribute of a layer, in the copy of a model that is traced, with its note.
_NOTE = "_optax_lowmem_note"


@functools.cache  # JAX keeps a class that it knows of for good
def _watched(kind: Any, pytree: bool) -> Any:
  """A subclass whose calls are written down, a pytree of JAX where its class is one."""
  parameters = [*inspect.signature(kind.__call__).parameters][1:]

  @functools.wraps(kind.__call__)
  def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    names = itertools.chain(parameters, (f"argument {i}" for i in itertools.count(1)))
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    ordered = dict.fromkeys((*(name for name in parameters if name in given), *given))
    vars(self)[_NOTE](self, {k: given[k] for k in ordered if given[k] is not None})
    return kind.__call__(self, *args, **kwargs)

  body = {"__call__": call, "__module__": kind.__module__}
  return type(kind)(kind.__name__, (kind,), body, pytree=pytree)
