"""A model as a tree of modules: where they are, what they are called here and in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from flax import nnx

from optax_lowmem._linear.head_names import output_heads
from optax_lowmem._linear.names import matched, names_in_stack, torch_names
from optax_lowmem.nn._adapters.adapter import Adapter
from optax_lowmem.nn._layers.base_layer import is_linear, matrix_shape, reading, stack_shape
from optax_lowmem.nn._proofs.flax_layers import is_embed

_NODES = (dict, list, tuple, nnx.Pytree)
# What is below them has its weights replaced in each call: a packed one would not be found.
_NORMS = (nnx.WeightNorm, nnx.SpectralNorm)


class Place(NamedTuple):
  """A module in a model.

  Attributes:
    path: its dotted path.
    module: itself.
    holders: every (holder, key) in the model that refers to it.
    norm: the class of the module above it that changes its weights in each call; "" if none does.
  """

  path: str
  module: Any  # an nnx.Module; Any, because NNX types its attributes as nothing
  holders: list[tuple[Any, Any]]
  norm: str = ""

  @property
  def adapted(self) -> bool:
    return isinstance(self.module, Adapter)

  @property
  def base(self) -> Any:
    """The layer under an adapter, or the module itself."""
    return self.module.base if self.adapted else self.module

  @property
  def linear(self) -> bool:
    """Whether it multiplies by a matrix of its own, with or without an adapter."""
    return not self.norm and is_linear(self.base)

  @property
  def reason(self) -> str:
    """Why it is no linear layer, if something is known of that."""
    if self.norm:
      return f"{self.norm} changes its weight in each call"
    return reading(self.module).reason

  @property
  def replaceable(self) -> bool:
    return not any(isinstance(holder, tuple) for holder, _ in self.holders)

  def replace(self, new: nnx.Module) -> None:
    """Puts `new` wherever the module is held."""
    for holder, key in self.holders:
      put(holder, key, new)


class ModelTree:
  """The modules of a model, in the order of its attributes.

  The base of an adapter goes by the path of the adapter itself: an adapter does not
  change what a layer is called.

  Attributes:
    model: the model.
    stack: the part of a stacked module's path after which PyTorch has the number of the layer.
    places: every module below the model.
    outer: those that a user sees: not the bases of adapters.
    adapters: those that are adapters.
  """

  def __init__(self, model: nnx.Module, stack: str = "layers"):
    self.model, self.stack = model, stack
    self.places = list(_places(model))
    self.adapters = [place for place in self.places if place.adapted]
    bases = {id(place.base) for place in self.adapters}
    self.outer = [place for place in self.places if id(place.module) not in bases]

  @property
  def paths(self) -> list[str]:
    return [place.path for place in self.places]

  def layers(self) -> list[Place]:
    """The linear layers and embeddings, with or without an adapter."""
    own = [place for place in self.outer if not place.norm]
    return [p for p in own if p.adapted or is_linear(p.module) or is_embed(p.module)]

  def linear(self) -> list[Place]:
    """The linear layers, with or without an adapter."""
    return [place for place in self.outer if place.linear]

  def heads(self) -> list[str]:
    """The paths of the output head."""
    outputs = {place.path: matrix_shape(place.base)[-2] for place in self.linear()}
    embeds = (place.base for place in self.outer if isinstance(place.base, nnx.Embed))
    return output_heads(outputs, {embed.num_embeddings for embed in embeds})

  def all_linear(self) -> list[Place]:
    """Every linear layer but the output head."""
    heads = self.heads()
    return [place for place in self.linear() if place.path not in heads]

  def below(self, roots: Sequence[Place]) -> list[Place]:
    """These places, and all that lie under them."""
    starts = tuple(place.path + "." for place in roots)
    return [place for place in self.places if (place.path + ".").startswith(starts)]

  def names(self, place: Place) -> list[str]:
    """What a layer, or each layer of a stack, is called in PyTorch; nothing if not clear."""
    return names_in_stack(place.path, stack_shape(place.base), self.stack)

  def torch_names(self, place: Place, lead: tuple[int, ...] | None = None) -> list[str]:
    """The same, and an error where it is not clear; of tensors with these leading axes."""
    lead = stack_shape(place.base) if lead is None else lead
    return torch_names(place.path, lead, self.stack)

  def choose(
    self, argument: str, targets: str | Sequence[str], possible: Sequence[Place]
  ) -> list[Place]:
    """The possible places that match; each pattern must match at least one."""
    paths = matched(
      argument,
      targets,
      [place.path for place in possible],
      lambda: ((place.path, _kind(place)) for place in self.places),
    )
    chosen = [place for place in possible if place.path in paths]
    check_replaceable(chosen)
    return chosen


def _kind(place: Place) -> str:
  reason = place.reason
  return f"a {type(place.module).__name__}" + (f", no linear layer: {reason}" if reason else "")


def check_replaceable(chosen: Sequence[Place]) -> None:
  for place in chosen:
    if not place.replaceable:
      raise ValueError(
        f"`{place.path}` is held in a tuple, which cannot be changed in place. "
        "Hold it in an `nnx.List` instead."
      )


def holders_of(model: nnx.Module, value: Any) -> list[tuple[Any, Any]]:
  """Every (holder, key) in a model that refers to a module or a Variable."""
  found: list[tuple[Any, Any]] = []
  seen: set[int] = {id(model)}
  open_: list[Any] = [model]
  while open_:
    node = open_.pop()
    for key, child in _children(node):
      if child is value:
        found.append((node, key))
      elif isinstance(child, _NODES) and id(child) not in seen:
        seen.add(id(child))
        open_.append(child)
  return found


def put(holder: Any, key: Any, new: Any) -> None:
  """Makes a holder refer to something else."""
  if isinstance(holder, (dict, list, nnx.List)):
    holder[key] = new
  else:
    setattr(holder, key, new)


def _places(model: nnx.Module) -> Iterator[Place]:
  found: dict[int, Place] = {}
  seen: set[int] = {id(model)}

  def walk(node: Any, path: tuple[str, ...], norm: str) -> None:
    norm = type(node).__name__ if isinstance(node, _NORMS) else norm
    for key, child in _children(node):
      if not isinstance(child, _NODES):
        continue
      below = path if isinstance(node, Adapter) else (*path, str(key))
      if isinstance(child, nnx.Module):
        place = found.get(id(child)) or Place(".".join(below), child, [])
        found[id(child)] = place._replace(norm=place.norm or norm)
        place.holders.append((node, key))
      if id(child) not in seen:
        seen.add(id(child))
        walk(child, below, norm)

  walk(model, (), "")
  yield from found.values()


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
  if isinstance(node, dict):
    yield from node.items()
  elif isinstance(node, (list, tuple, nnx.List)):
    yield from enumerate(node)
  elif isinstance(node, nnx.Pytree):
    yield from vars(node).items()
