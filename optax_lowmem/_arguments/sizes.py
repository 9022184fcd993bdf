"""Sizes in bytes, as numbers or as text."""

from __future__ import annotations

import re
from typing import Any

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000**k for k, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}IB": 1024**k for k, p in enumerate("KMGT", 1)}


def bytes_of(name: str, value: int | str, least: int = 0) -> int:
  """The bytes of 5_000_000_000, "5GB" (10^9 each) or "5GiB" (2^30 each), in upper or lower case.

  Args:
    name: the argument's name, for the error.
    value: the number or the text.
    least: the smallest that is accepted.

  Raises:
    ValueError: if it is neither, or less than `least`.

  >>> bytes_of("max_bytes", "4gb"), bytes_of("max_bytes", "1.5 KiB")
  (4000000000, 1536)
  """
  size: Any = value
  if isinstance(value, str):
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Z]*)\s*", value.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else None
  if isinstance(size, bool) or not isinstance(size, int) or size < least:
    few = f" of at least {least}" if least else ""
    raise ValueError(
      f"`{name}` must be a number of bytes{few} or a string such as '4GB' or '512MiB', got "
      f"{value!r}."
    )
  return size
