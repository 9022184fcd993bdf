"""Which layers an adapter goes on, and of which rank in each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from optax_lowmem.nn._layers.base_layer import is_linear, stack_shape
from optax_lowmem.nn._model.heads import output_heads
from optax_lowmem.nn._model.places import (
  Place,
  adaptable,
  base_of,
  check_replaceable,
  choose,
  layer_names,
  matches,
  patterns,
)


class Target(NamedTuple):
  """A layer to adapt; `rank` and `alpha` are tuples where the layers of a stack differ."""

  place: Place
  rank: Any
  alpha: Any


def all_linear(everything: Sequence[Place]) -> list[Place]:
  """Every linear layer but the output head."""
  heads = {p.path for p in output_heads(everything)}
  layers = (p for p in adaptable(everything) if is_linear(base_of(p.module)))
  return [p for p in layers if p.path not in heads]


def pattern_value(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
  """PEFT's law: the first key that, as a regular expression, matches the end of the name."""
  for key, value in pattern.items():
    if re.match(rf"(.*\.)?({key})$", name):
      return value
  return default


def check_patterns(rank_pattern: Any, alpha_pattern: Any) -> None:
  """Refuses what is no mapping of regular expressions."""
  for what, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
    if pattern is not None and not isinstance(pattern, Mapping):
      raise ValueError(f"`{what}` must map names to values, got {pattern!r}: {{'q_proj': 8}}, say.")
    patterns(what, list(pattern or {".*": 1}))


def find_targets(
  everything: Sequence[Place],
  targets: str | Sequence[str],
  rank: int,
  alpha: float,
  rank_pattern: Mapping[str, int] | None,
  alpha_pattern: Mapping[str, float] | None,
  stack: str,
  skip: Sequence[Place],
) -> list[Target]:
  """The layers that `targets` names, with the rank and alpha of each."""
  check_patterns(rank_pattern, alpha_pattern)
  skipped = {id(place.module) for place in skip}
  possible = [p for p in adaptable(everything) if id(p.module) not in skipped]
  if targets == "all-linear":
    kept = {id(p.module) for p in all_linear(everything)}
    wanted = {p.path: None for p in possible if id(p.module) in kept}
    if not wanted:
      raise ValueError("`targets` 'all-linear': `model` has no linear layer but the output head.")
  else:
    wanted = _matched(everything, possible, targets, stack)
  found: list[Target] = []
  used: set[tuple[str, str]] = set()
  for place in possible:
    if place.path not in wanted:
      continue
    lead = stack_shape(base_of(place.module))
    names = layer_names(place, stack)
    count = lead[0] if len(lead) == 1 else 1
    chosen = wanted[place.path]
    values: list[list[Any]] = []
    for what, pattern, default in (
      ("rank_pattern", rank_pattern or {}, rank),
      ("alpha_pattern", alpha_pattern or {}, alpha),
    ):
      looked_up = names or [place.path] * count
      used |= {(what, k) for k in pattern for n in looked_up if pattern_value({k: 1}, n, 0)}
      values.append([pattern_value(pattern, n, default) for n in looked_up])
    ranks = [r if chosen is None or i in chosen else 0 for i, r in enumerate(values[0])]
    same = len(set(ranks)) == 1 and len(set(values[1])) == 1
    if same:
      found.append(Target(place, ranks[0], values[1][0]))
    else:
      found.append(Target(place, tuple(ranks), tuple(values[1])))
  for what, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
    unused = [key for key in pattern or {} if (what, key) not in used]
    if unused:
      raise ValueError(
        f"`{what}` {unused[0]!r} matches no layer that is adapted. A key is a regular expression "
        "that matches the end of a name, such as 'down_proj' or 'layers.1.self_attn.q_proj'."
      )
  check_replaceable([target.place for target in found])
  return found


def _matched(
  everything: Sequence[Place], possible: list[Place], targets: Any, stack: str
) -> dict[str, set[int] | None]:
  """{path: None for every layer, or the indices of the layers of a stack that are named}."""
  wanted: dict[str, set[int] | None] = {}
  for pattern in patterns("targets", targets):
    whole = {place.path for place in possible if matches(pattern, place.path)}
    wanted.update(dict.fromkeys(whole))
    single = False
    for place in possible:
      names = layer_names(place, stack)
      if place.path in whole or len(names) < 2:
        continue
      indices = {i for i, name in enumerate(names) if pattern.fullmatch(name)}
      single = single or bool(indices)
      before = wanted.get(place.path, set())
      if indices and before is not None:
        wanted[place.path] = before | indices
    if not whole and not single:
      choose("targets", pattern.pattern, everything, possible)  # raises, and says what there is
  for path, indices in wanted.items():
    place = next(p for p in possible if p.path == path)
    if indices is not None and len(indices) == len(layer_names(place, stack)):
      wanted[path] = None
  return wanted
