"""Settings that differ from layer to layer: `rank_pattern` and `alpha_pattern`, as in PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from optax_lowmem._linear.names import patterns


def pattern_value(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
  """PEFT's law: the first key that, as a regular expression, matches the end of the name."""
  for key, value in (pattern or {}).items():
    if re.match(rf"(.*\.)?({key})$", name):
      return value
  return default


def check_patterns(rank_pattern: Any, alpha_pattern: Any) -> None:
  """Refuses what is no mapping of regular expressions."""
  for what, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
    if pattern is not None and not isinstance(pattern, Mapping):
      raise ValueError(f"`{what}` must map names to values, got {pattern!r}: {{'q_proj': 8}}, say.")
    patterns(what, list(pattern or {".*": 1}))


def check_used(rank_pattern: Any, alpha_pattern: Any, names: Sequence[str]) -> None:
  """Refuses keys that match none of the layers that are adapted."""
  for what, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
    for key in pattern or {}:
      if not any(pattern_value({key: True}, name, False) for name in names):
        raise ValueError(
          f"`{what}` {key!r} matches no layer that is adapted. A key is a regular expression that "
          "matches the end of a name, such as 'down_proj' or 'layers.1.self_attn.q_proj'."
        )
