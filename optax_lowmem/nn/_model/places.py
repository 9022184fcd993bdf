"""Where the modules of a model are, what they are called, and how a name is looked up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from flax import nnx

from optax_lowmem._arguments.spelling import nearest as alike
from optax_lowmem.nn._adapters.adapter import Adapter
from optax_lowmem.nn._layers.base_layer import is_embed, is_linear, reading, stack_shape


class Place(NamedTuple):
  """A module, its dotted path, and every (holder, key) in the model that refers to it."""

  path: str
  module: Any  # an nnx.Module; Any, because NNX types its attributes as nothing
  holders: list[tuple[Any, Any]]


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
  if isinstance(node, dict):
    yield from node.items()
  elif isinstance(node, (list, tuple, nnx.List)):
    yield from enumerate(node)
  elif isinstance(node, nnx.Pytree):
    yield from vars(node).items()


def places(model: nnx.Module) -> list[Place]:
  """Every module below `model`, in the order of its attributes.

  The base of an adapter goes by the path of the adapter itself: an adapter does not
  change what a layer is called.
  """
  found: dict[int, Place] = {}
  seen: set[int] = {id(model)}

  def walk(node: Any, path: tuple[str, ...]) -> None:
    for key, child in _children(node):
      if not isinstance(child, (dict, list, tuple, nnx.Pytree)):
        continue
      below = path if isinstance(node, Adapter) else (*path, str(key))
      if isinstance(child, nnx.Module):
        place = found.setdefault(id(child), Place(".".join(below), child, []))
        place.holders.append((node, key))
      if id(child) not in seen:
        seen.add(id(child))
        walk(child, below)

  walk(model, ())
  return list(found.values())


def replace(place: Place, new: nnx.Module) -> None:
  """Puts `new` wherever the module of `place` is held."""
  for holder, key in place.holders:
    if isinstance(holder, (dict, list, nnx.List)):
      holder[key] = new
    else:
      setattr(holder, key, new)


def check_replaceable(chosen: Sequence[Place]) -> None:
  for place in chosen:
    if any(isinstance(holder, tuple) for holder, _ in place.holders):
      raise ValueError(
        f"`{place.path}` is held in a tuple, which cannot be changed in place. "
        "Hold it in an `nnx.List` instead."
      )


def adaptable(everything: Sequence[Place]) -> list[Place]:
  """Linear layers and embeddings as a user sees them: the base under an adapter is not one."""
  bases = {id(p.module.base) for p in everything if isinstance(p.module, Adapter)}
  return [
    place
    for place in everything
    if (isinstance(place.module, Adapter) or is_linear(place.module) or is_embed(place.module))
    and id(place.module) not in bases
  ]


def base_of(module: Any) -> Any:
  """The layer under an adapter, or the layer itself."""
  return module.base if isinstance(module, Adapter) else module


def layer_names(place: Place, stack: str) -> list[str]:
  """What a layer, or each layer of a stack, is called in PyTorch; nothing if that is not clear."""
  return names_in_stack(place.path, stack_shape(base_of(place.module)), stack)


def names_in_stack(path: str, lead: tuple[int, ...], stack: str) -> list[str]:
  """`path`, with each layer's number after the part `stack` if there are leading axes."""
  parts = path.split(".")
  if len(lead) == 0:
    return [path]
  if len(lead) > 1 or parts.count(stack) != 1:
    return []
  at = parts.index(stack) + 1
  return [".".join([*parts[:at], str(i), *parts[at:]]) for i in range(lead[0])]


def patterns(argument: str, regex: str | Sequence[str]) -> list[re.Pattern[str]]:
  given = list(regex) if isinstance(regex, Iterable) and not isinstance(regex, str) else [regex]
  if not given:
    raise ValueError(f"`{argument}` is empty. Name the modules, for example 'q_proj|v_proj'.")
  compiled = []
  for pattern in given:
    try:
      compiled.append(re.compile(pattern))
    except (re.error, TypeError) as error:
      raise ValueError(
        f"`{argument}` must be a regular expression or a list of them, got {pattern!r}: {error}."
      ) from error
  return compiled


def matches(pattern: re.Pattern[str], path: str) -> bool:
  return bool(pattern.fullmatch(path) or pattern.fullmatch(path.rpartition(".")[2]))


def nearest(name: str, known: Sequence[str]) -> str:
  """A sentence with the known names that look like `name`, or nothing."""
  close = alike(name, known, count=3)
  return f" Nearest: {', '.join(close)}." if close else ""


def folded(path: str) -> str:
  """A path with a star for layer numbers."""
  return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def listing(paths: Sequence[str]) -> str:
  """Paths for an error message, with layer numbers folded into a star."""
  return ", ".join(dict.fromkeys(folded(path) for path in paths)) or "none"


def _kind(module: Any) -> str:
  reason = reading(module).reason
  return f"a {type(module).__name__}" + (f", no linear layer: {reason}" if reason else "")


def choose(
  argument: str, targets: str | Sequence[str], everything: Sequence[Place], possible: list[Place]
) -> list[Place]:
  """The possible places that match; each pattern must match at least one."""
  chosen: dict[str, Place] = {}
  for pattern in patterns(argument, targets):
    matched = [place for place in possible if matches(pattern, place.path)]
    if not matched:
      paths = [place.path for place in possible]
      lasts = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
      other = [place for place in everything if matches(pattern, place.path)]
      wrong = "".join(f" `{place.path}` is {_kind(place.module)}." for place in other[:3])
      raise ValueError(
        f"`{argument}` {pattern.pattern!r} matches no module that can be changed."
        f"{wrong}{nearest(pattern.pattern, [*lasts, *paths])} "
        f"Available modules: {listing(paths)}."
      )
    chosen.update((place.path, place) for place in matched)
  check_replaceable(list(chosen.values()))
  return list(chosen.values())
