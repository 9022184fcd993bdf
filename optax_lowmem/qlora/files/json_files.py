"""Objects from a JSON or JSONL file, each with the place where it stands."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# An empty list takes 3 characters and 64 bytes of memory: a row is counted before it is read.
MOST_VALUES = 1 << 20


DEEP = "the row is nested too deeply; a row is an object of texts and lists."


class DataError(ValueError):
  """A data file that cannot be used; the message names file and line, and what was expected."""


def decode(path: Path) -> str:
  raw = path.read_bytes()
  try:
    text = raw.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = raw.count(b"\n", 0, error.start) + 1
    raise DataError(
      f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8. Save the file as UTF-8."
    ) from error
  if not text.strip():
    raise DataError(f"{path} is empty; expected Alpaca JSON, chat messages or plain text.")
  return text


def layout_of(path: Path, text: str) -> str:
  """ "list" (of JSON objects), "lines" (a JSON object each) or "text"."""
  start = text.lstrip()
  second = start[1:].lstrip()[:1]
  named_json = path.suffix.lower() in (".json", ".jsonl", ".ndjson")
  if start[0] == "[" and (named_json or second in ("{", "]")):
    return "list"
  if start[0] == "{" and (named_json or second in ('"', "}")):
    return "lines"
  if named_json:
    line = text[: len(text) - len(start)].count("\n") + 1
    raise DataError(
      f"{path}, line {line}: expected a JSON list or JSON objects, found {start[:20]!r}. "
      "Plain text is read from files not named .json or .jsonl."
    )
  return "text"


def lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
  """``(place, object)`` for each line of JSON."""
  for number, line in enumerate(text.split("\n"), 1):
    if line.strip():
      where = f"{path}, line {number}"
      if len(line) > MOST_VALUES and sum(map(line.count, "[{,")) > MOST_VALUES:
        raise DataError(f"{where}: the row has more than {MOST_VALUES:,} values. Split it.")
      try:
        yield where, json.loads(line)
      except RecursionError as error:
        raise DataError(f"{where}: {DEEP}") from error
      except json.JSONDecodeError as error:
        raise DataError(
          f"{where}, column {error.colno}: {error.msg}; expected one complete JSON "
          "object a line (or a JSON list of objects)."
        ) from error
      except ValueError as error:  # a number of more digits than Python reads
        raise DataError(f"{where}: {error}.") from error


def listed(path: Path, text: str) -> Iterator[tuple[str, Any]]:
  """``(place, object)`` for each item of a JSON list, read one by one to know their lines."""
  decoder, position, line, row = json.JSONDecoder(), text.index("[") + 1, 1, 0
  line += text.count("\n", 0, position)

  def skip(position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
      position += 1
    return position

  if text[skip(position) :].startswith("]"):
    return
  while True:
    row, start = row + 1, skip(position)
    line += text.count("\n", position, start)
    where = f"{path}, row {row} (line {line})"
    if text[start : start + 1] == "[":  # of any length
      raise DataError(f"{where}: expected a JSON object, found a list.")
    try:
      value, stop = decoder.raw_decode(text, start)
    except RecursionError as error:
      raise DataError(f"{where}: {DEEP}") from error
    except json.JSONDecodeError as error:
      raise DataError(
        f"{where}: {error.msg} at line {error.lineno}, column {error.colno}; expected a "
        "JSON object."
      ) from error
    except ValueError as error:  # a number of more digits than Python reads
      raise DataError(f"{where}: {error}.") from error
    yield where, value
    position = skip(stop)
    line += text.count("\n", start, position)
    if text[position : position + 1] == "]":
      after = skip(position + 1)
      line += text.count("\n", position, after)
      if rest := text[after : after + 20]:
        raise DataError(f"{path}, line {line}: unexpected {rest!r} after the list's end.")
      return
    if text[position : position + 1] != ",":
      found = text[position : position + 10] or "the end of the file"
      raise DataError(f"{path}, line {line}: expected ',' or ']' after row {row}, found {found!r}.")
    position += 1
