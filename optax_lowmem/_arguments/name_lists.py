"""Names of layers as other trainers list them, as one regular expression."""

from typing import Any

_PAIRS = {"(": ")", "[": "]", "{": "}"}


def pattern_of(value: Any) -> str:
  """A list of patterns, or a text with commas between them, as one pattern for any of them.

  A comma in brackets is the pattern's own.

  Args:
    value: a text, or a list of texts.

  Raises:
    ValueError: for what is neither, for no name at all, and for all-linear beside others.

  >>> pattern_of("q_proj, v_proj"), pattern_of(["q_proj", "v_proj"]), pattern_of("[qkv]{1,2}_proj")
  ('q_proj|v_proj', 'q_proj|v_proj', '[qkv]{1,2}_proj')
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
  return "|".join(parts)


def _cut(text: str) -> list[str]:
  """The parts between commas, those in brackets and behind a backslash aside."""
  parts, open_, escaped = [""], [], False
  for char in text:
    if char == "," and not open_ and not escaped:
      parts.append("")
      continue
    if not escaped and char in _PAIRS:
      open_.append(_PAIRS[char])
    elif not escaped and open_ and char == open_[-1]:
      open_.pop()
    escaped = char == "\\" and not escaped
    parts[-1] += char
  return [part.strip() for part in parts if part.strip()]
