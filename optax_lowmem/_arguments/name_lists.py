"""Names of layers, as a list or as a text with commas between them."""

from typing import Any

_PAIRS = {"(": ")", "[": "]", "{": "}"}


def names_of(value: Any) -> str | list[str]:
  """The patterns in a list, or between the commas of a text; of a single one, that one.

  They are not made one pattern for any of them: each must match a layer, or it is a typo. A comma
  in brackets is a pattern's own.

  Args:
    value: a text, or a list of texts.

  Raises:
    ValueError: for what is neither, for no name at all, and for all-linear beside others.

  >>> names_of("q_proj, v_proj"), names_of(["q_proj", "v_proj"]), names_of("[qkv]{1,2}_proj")
  (['q_proj', 'v_proj'], ['q_proj', 'v_proj'], '[qkv]{1,2}_proj')
  """
  if isinstance(value, str):
    parts = _cut(value)
  elif isinstance(value, list) and value and all(isinstance(each, str) for each in value):
    parts = [part for each in value for part in _cut(each)]
  else:
    raise ValueError("is neither a text nor a list of texts")
  if not parts:
    raise ValueError("names no layer; write names, such as q_proj,v_proj, or all-linear")
  if len(parts) > 1 and "all-linear" in parts:
    raise ValueError("names all-linear beside others; it stands alone")
  return parts if len(parts) > 1 else parts[0]


def _cut(text: str) -> list[str]:
  """The parts between commas, those in brackets and behind a backslash aside."""
  parts, open_, escaped = [""], [], False
  for char in text:
    if char == "," and not open_ and not escaped:
      parts.append("")
      continue
    if not escaped and char in _PAIRS and open_[-1:] != ["]"]:  # a bracket in a class is a letter
      open_.append(_PAIRS[char])
    elif not escaped and open_ and char == open_[-1]:
      open_.pop()
    escaped = char == "\\" and not escaped
    parts[-1] += char
  return [part.strip() for part in parts if part.strip()]
