"""Which layers an argument names, and which an adapter goes on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from optax_lowmem._linear import head_names, names
from optax_lowmem._linear.patterns import check_patterns, check_used, pattern_value
from optax_lowmem._variants.lora_scale import check_numbers, scale_of
from optax_lowmem._variants.variant import Part, Variant
from optax_lowmem.linen._layers import Layer, Layers


class Target(NamedTuple):
  """A layer with an adapter, its rank and its scale."""

  layer: Layer
  rank: int
  alpha: float
  scale: float
  parts: tuple[Part, ...]

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The shapes of the parts, by their names."""
    *batch, out, inputs = self.layer.matrix_shape
    sizes = {"in": inputs, "out": out, "rank": self.rank}
    return {part.name: (*self.layer.stack, *batch, *part.shape(sizes)) for part in self.parts}

  @property
  def paths(self) -> list[tuple[str, ...]]:
    """Where the parts are in a tree of adapters."""
    return [(*self.layer.path, part.name) for part in self.parts]

  def of(self, flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The parts in a flat tree of adapters, by their names."""
    return {path[-1]: flat[path] for path in self.paths}


def output_heads(layers: Layers) -> list[str]:
  """The dotted paths of the output head."""
  outputs = {layer.name: layer.matrix_shape[-2] for layer in layers.layers if not layer.embedding}
  rows = {layer.matrix_shape[-1] for layer in layers.layers if layer.embedding}
  return head_names.output_heads(outputs, rows)


def all_linear(layers: Layers) -> list[Layer]:
  """Every linear layer but the output head."""
  heads = output_heads(layers)
  return [layer for layer in layers.layers if not layer.embedding and layer.name not in heads]


def choose(
  argument: str, targets: str | Sequence[str], layers: Layers, possible: Sequence[Layer]
) -> list[Layer]:
  """The possible layers that match; each pattern must match at least one."""

  def others():
    kinds = [(layer.name, layer.kind) for layer in layers.layers if layer not in possible]
    return ((name, f"a {kind}") for name, kind in (*kinds, *layers.others))

  known = [layer.name for layer in possible]
  chosen = names.matched(argument, targets, known, others, _matches, "layer")
  return [layer for layer in possible if layer.name in chosen]


def excluded(exclude: str | Sequence[str] | None, layers: Layers) -> set[str]:
  """The dotted paths that `exclude` names."""
  known = [*layers.names, *(name for name, _ in layers.others)]
  return names.excluded(exclude, known, lambda: output_heads(layers), _matches, "layer")


def find_targets(
  layers: Layers,
  targets: str | Sequence[str],
  variant: Variant,
  rank: int,
  alpha: float,
  rank_pattern: Mapping[str, int] | None,
  alpha_pattern: Mapping[str, float] | None,
  use_rslora: bool,
) -> tuple[Target, ...]:
  """The layers that `targets` names, with the rank and alpha of each."""
  check_patterns(rank_pattern, alpha_pattern)
  if targets == "all-linear":
    chosen = all_linear(layers)
    if not chosen:
      raise ValueError("`targets` 'all-linear': there is no linear layer but the output head.")
  else:
    chosen = choose("targets", targets, layers, layers.layers)
  found: list[Target] = []
  for layer in chosen:
    own_rank = pattern_value(rank_pattern, layer.name, rank)
    own_alpha = pattern_value(alpha_pattern, layer.name, alpha)
    check_numbers(own_rank, own_alpha, 0.0)
    scale = scale_of(own_rank, own_alpha, use_rslora)
    found.append(Target(layer, own_rank, own_alpha, scale, variant.parts(layer.embedding)))
  check_used(rank_pattern, alpha_pattern, [layer.name for layer in chosen])
  return tuple(found)


def _matches(pattern: re.Pattern[str], name: str) -> bool:
  """Whether a pattern is of a path, of its last part, or of it as Linen joins it."""
  return names.matches(pattern, name) or bool(pattern.fullmatch(name.replace(".", "/")))
