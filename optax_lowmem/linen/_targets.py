"""Which layers an argument names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from optax_lowmem._linear import head_names, names
from optax_lowmem.linen._layers import Layer, Layers


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


def _matches(pattern: re.Pattern[str], name: str) -> bool:
  """Whether a pattern is of a path, of its last part, or of it as Linen joins it."""
  return names.matches(pattern, name) or bool(pattern.fullmatch(name.replace(".", "/")))
