"""LoRA: what is a low-rank correction, and how it starts from what the base holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_lowmem._variants.low_rank import LowRank
from optax_lowmem._variants.variant import Arrays
from optax_lowmem.nn._adapters.lora_init import check_start, starting_factors
from optax_lowmem.nn._layers.base_layer import foreign_of


@dataclasses.dataclass(frozen=True)
class LoRA(LowRank):
  """Low-rank adaptation of the layers of NNX, with the starts that `init` names."""

  def check(self, name: str, base: Any, rank: Any, init: Any) -> None:
    check_start(name, base, rank, init)
    foreign = foreign_of(base)
    if self.lora_bias and foreign is not None and foreign.bias != "bias":
      raise ValueError(
        f"`lora_bias` needs a `bias` in the base to be merged into, and {name} has none of that "
        "name. Leave it out."
      )

  def start(
    self, layer: Any, shapes: Mapping[str, Any], init: Any, dtype: Any, rngs: Any
  ) -> Arrays:
    factors = starting_factors(layer, shapes, init, dtype, rngs)
    if factors is None:
      return super().start(layer, shapes, init, dtype, rngs)
    rest = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
    return rest | factors

  def room(self, layer: Any) -> Arrays:
    if layer.start_a is None:
      return {}
    return {"lora_a": layer.start_a[...], "lora_b": layer.start_b[...]}

  def difference(
    self, parts: Arrays, room: Arrays, rank: int, alpha: float, use_rslora: bool
  ) -> tuple[Arrays, int, float]:
    a = np.concatenate([parts["lora_a"], room["lora_a"]], axis=1)
    b = np.concatenate([parts["lora_b"], -room["lora_b"]])
    return (
      parts | {"lora_a": a, "lora_b": b},
      2 * rank,
      alpha * (math.sqrt(2) if use_rslora else 2),
    )
