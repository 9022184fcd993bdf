"""The configuration that PEFT reads, `adapter_config.json`, from the layers of an adapter."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

from optax_lowmem._linear.patterns import pattern_value
from optax_lowmem._variants.variant import Variant


def configuration(
  ranks: Mapping[str, int],
  alphas: Mapping[str, float],
  everything: Sequence[str],
  *,
  base_model: str | None,
  task_type: str,
  dropout: float,
  use_rslora: bool,
  variant: Variant,
  bias: str = "none",
  modules_to_save: Sequence[str] = (),
  ensure_weight_tying: bool = False,
) -> dict[str, Any]:
  """What PEFT writes for layers of these ranks and alphas, by name; options that are off left out.

  `everything` are the names of all layers that could have an adapter.
  """
  rank, rank_pattern = _pattern_of(ranks)
  alpha, alpha_pattern = _pattern_of(alphas)
  config = {
    "peft_type": variant.peft_type,
    "task_type": task_type,
    "base_model_name_or_path": base_model,
    "r": rank,
    "lora_alpha": _number(alpha),
    "lora_dropout": dropout,
    "target_modules": _target_modules(list(ranks), everything),
    "bias": bias,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "use_rslora": use_rslora,
  }
  optional = {
    "rank_pattern": rank_pattern,
    "alpha_pattern": {key: _number(value) for key, value in alpha_pattern.items()},
    "modules_to_save": modules_to_save,
    "ensure_weight_tying": ensure_weight_tying,
  }
  config |= variant.config() | {key: value for key, value in optional.items() if value}
  for key, value in list(config.items()):
    if variant.peft_keys.get(key, key) is None and value not in (False, 0, "none"):
      raise ValueError(
        f"the adapters are {type(variant).__name__}, whose configuration has no `{key}`, and it is "
        f"{value!r}. Merge them with `merge_lora` instead."
      )
  names = {key: variant.peft_keys.get(key, key) for key in config}
  return {name: config[key] for key, name in names.items() if name is not None}


def _target_modules(names: Sequence[str], everything: Sequence[str]) -> list[str]:
  """The shortest `target_modules` with which PEFT adapts these layers and no others."""
  lasts = {name.rpartition(".")[2] for name in names}
  same = {name for name in everything if name.rpartition(".")[2] in lasts}
  return sorted(lasts if same == set(names) else names)


def _pattern_of(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  """The commonest value, and a pattern of PEFT's that gives the others."""
  common = collections.Counter(values.values()).most_common(1)[0][0]
  by_last: dict[str, set[Any]] = {}
  for name, value in values.items():
    by_last.setdefault(name.rpartition(".")[2], set()).add(value)
  pattern = {}
  for name, value in values.items():
    last = name.rpartition(".")[2]
    if len(by_last[last]) > 1 and value != common:
      pattern[name] = value
    elif len(by_last[last]) == 1 and value != common:
      pattern[last] = value
  if any(pattern_value(pattern, name, common) != value for name, value in values.items()):
    pattern = {"^" + re.escape(n): v for n, v in values.items() if v != common}
  return common, pattern


def _number(value: float) -> int | float:
  return int(value) if value == int(value) else value
