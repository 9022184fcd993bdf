"""Which layers an adapter goes on, and of which rank in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from optax_lowmem._linear.names import matches, patterns
from optax_lowmem._linear.patterns import check_patterns, check_used, pattern_value
from optax_lowmem.nn._layers.base_layer import stack_shape
from optax_lowmem.nn._model.model_tree import ModelTree, Place, check_replaceable
from optax_lowmem.nn._model.skipped import sentence, skipped


class Target(NamedTuple):
  """A layer to adapt; `rank` and `alpha` are tuples where the layers of a stack differ."""

  place: Place
  rank: Any
  alpha: Any


def find_targets(
  tree: ModelTree,
  targets: str | Sequence[str],
  rank: int,
  alpha: float,
  rank_pattern: Mapping[str, int] | None,
  alpha_pattern: Mapping[str, float] | None,
  skip: Sequence[Place],
) -> list[Target]:
  """The layers that `targets` names, with the rank and alpha of each."""
  check_patterns(rank_pattern, alpha_pattern)
  whole = {id(place.module) for place in skip}
  possible = [p for p in tree.layers() if id(p.module) not in whole]
  if targets == "all-linear":
    kept = {id(p.module) for p in tree.all_linear()}
    wanted = {p.path: None for p in possible if id(p.module) in kept}
    if not wanted:
      raise ValueError(
        "`targets` 'all-linear': `model` has no linear layer but the output head."
        + sentence(skipped(tree))
      )
  else:
    wanted = _matched(tree, possible, targets)
  found: list[Target] = []
  every: list[str] = []
  for place in possible:
    if place.path not in wanted:
      continue
    lead = stack_shape(place.base)
    names = tree.names(place) or [place.path] * (lead[0] if len(lead) == 1 else 1)
    every += names
    chosen = wanted[place.path]
    ranks = tuple(
      pattern_value(rank_pattern, name, rank) if chosen is None or i in chosen else 0
      for i, name in enumerate(names)
    )
    alphas = tuple(pattern_value(alpha_pattern, name, alpha) for name in names)
    same = len(set(ranks)) == 1 and len(set(alphas)) == 1
    found.append(Target(place, ranks[0] if same else ranks, alphas[0] if same else alphas))
  check_used(rank_pattern, alpha_pattern, every)
  check_replaceable([target.place for target in found])
  return found


def _matched(tree: ModelTree, possible: list[Place], targets: Any) -> dict[str, set[int] | None]:
  """{path: None for every layer, or the indices of the layers of a stack that are named}."""
  wanted: dict[str, set[int] | None] = {}
  for pattern in patterns("targets", targets):
    whole = {place.path for place in possible if matches(pattern, place.path)}
    wanted.update(dict.fromkeys(whole))
    single = False
    for place in possible:
      names = tree.names(place)
      if place.path in whole or len(names) < 2:
        continue
      indices = {i for i, name in enumerate(names) if pattern.fullmatch(name)}
      single = single or bool(indices)
      before = wanted.get(place.path, set())
      if indices and before is not None:
        wanted[place.path] = before | indices
    if not whole and not single:
      tree.choose("targets", pattern.pattern, possible)  # raises, and says what there is
  for path, indices in wanted.items():
    place = next(p for p in possible if p.path == path)
    if indices is not None and len(indices) == len(tree.names(place)):
      wanted[path] = None
  return wanted
