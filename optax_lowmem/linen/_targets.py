"""Which layers an argument names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optax_lowmem._linear.head_names import HEADS
from optax_lowmem.linen._layers import Layer, Layers
from optax_lowmem.nn._model.places import listing, matches, nearest, patterns


def output_heads(layers: Layers) -> list[Layer]:
  """The output head: what carries the name of one, or else has the sizes of one."""
  linear = [layer for layer in layers.layers if layer.field == "kernel"]
  heads = [layer for layer in linear if HEADS.fullmatch(layer.name)]
  if heads:
    return heads
  rows = {layer.matrix_shape[-1] for layer in layers.layers if layer.field == "embedding"}
  heads = [layer for layer in linear if layer.matrix_shape[-2] in rows]
  return heads if len(heads) == 1 else []


def all_linear(layers: Layers) -> list[Layer]:
  """Every linear layer but the output head."""
  heads = output_heads(layers)
  return [layer for layer in layers.layers if layer.field == "kernel" and layer not in heads]


def choose(
  argument: str, targets: str | Sequence[str], layers: Layers, possible: Sequence[Layer]
) -> list[Layer]:
  """The possible layers that match; each pattern must match at least one."""
  chosen: set[tuple[str, ...]] = set()
  for pattern in patterns(argument, targets):

    def named(name: str, pattern: Any = pattern) -> bool:
      return matches(pattern, name) or bool(pattern.fullmatch(name.replace(".", "/")))

    matched = {layer.path for layer in possible if named(layer.name)}
    if not matched:
      names = [layer.name for layer in possible]
      lasts = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
      other = [(layer.name, layer.kind) for layer in layers.layers if layer not in possible]
      wrong = [(name, kind) for name, kind in (*other, *layers.others) if named(name)]
      raise ValueError(
        f"`{argument}` {pattern.pattern!r} matches no layer that can be changed."
        + "".join(f" `{name}` is a {kind}." for name, kind in wrong[:3])
        + f"{nearest(pattern.pattern, [*lasts, *names])} Available layers: {listing(names)}."
      )
    chosen |= matched
  return [layer for layer in possible if layer.path in chosen]
