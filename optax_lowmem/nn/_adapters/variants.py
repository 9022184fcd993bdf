"""The variants that a configuration of PEFT is read as, and that arguments choose."""

from __future__ import annotations

from optax_lowmem._variants.variant import Variant
from optax_lowmem.nn._adapters.dora import DoRA
from optax_lowmem.nn._adapters.lora import LoRA

# The first that says a configuration is its own counts.
VARIANTS: tuple[type[Variant], ...] = (DoRA, LoRA)


def chosen(variant: Variant | None, use_dora: bool, lora_bias: bool) -> Variant:
  """The variant that arguments ask for."""
  if variant is None:
    if lora_bias and use_dora:
      raise ValueError("`lora_bias` does not go with `use_dora`, as in PEFT. Choose one.")
    return DoRA() if use_dora else LoRA(lora_bias)
  if not isinstance(variant, Variant):
    raise TypeError(f"`variant` must be an nn.Variant, got {variant!r}. Subclass it.")
  if use_dora or lora_bias:
    raise ValueError(
      f"`use_dora` and `lora_bias` choose a variant, and `variant` is {variant!r}. Leave them out."
    )
  return variant
