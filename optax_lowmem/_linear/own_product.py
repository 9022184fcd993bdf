"""Settings by which a layer of flax multiplies in its own way, and a packed one would not."""

from __future__ import annotations

from typing import Any

_SETTINGS = (
  "dot_general",
  "dot_general_cls",
  "einsum_op",
  "preferred_element_type",
  "promote_dtype",
)


def own_settings(layer: Any, *usual: Any) -> tuple[str, ...]:
  """The names of those that are set to something else than None and what is `usual`."""
  usual = (None, *usual)
  return tuple(n for n in _SETTINGS if all(getattr(layer, n, None) is not one for one in usual))


def sets(name: str, own: tuple[str, ...]) -> str:
  """What is wrong with such a layer, as the start of a message."""
  listed = " and ".join(f"`{setting}`" for setting in own)
  return f"{name} sets {listed}, which a layer with a packed weight does not have."
