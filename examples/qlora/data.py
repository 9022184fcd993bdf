"""Training rows from a file: Alpaca JSON, chat messages, or plain text; and their batches.

Alpaca is a JSON list of ``{"instruction", "input" (optional), "output"}``; chat is a line of JSON
for each ``{"messages": [{"role", "content"}, ...]}``. Either row may stand in either layout (a
list, or one object a line): the content decides, not the file's name. Everything else is plain
text, all of which is learned.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from batches import Batch as Batch
from batches import Row
from chat import ROLES, ChatTokenizer, Message


class DataError(ValueError):
  """A data file that cannot be used; the message names file and line, and what was expected."""


@dataclass(frozen=True)
class Dataset:
  """Rows, and sentences about what was cut or left out while making them."""

  kind: str
  rows: list[Row]
  notes: list[str] = field(default_factory=list)

  def split(self, fraction: float = 0.05) -> tuple[list[Row], list[Row]]:
    """``(training rows, held-out rows)``: the same on every call, whatever the run's seed."""
    order = np.random.default_rng(0).permutation(len(self.rows))
    held = max(1, round(fraction * len(self.rows)))
    return [self.rows[i] for i in order[held:]], [self.rows[i] for i in order[:held]]


def load(
  path: str | Path, tokenizer: ChatTokenizer, seq_len: int, *, train_on_prompt: bool = False
) -> Dataset:
  """Read, check and tokenize a data file.

  Rows longer than `seq_len` are cut, rows in which nothing is left to learn are dropped; both are
  counted in ``notes``. Nothing else is dropped: the first malformed row raises.

  Raises:
    FileNotFoundError: where there is no such file.
    DataError: for an empty or malformed file, or one with fewer than two usable rows.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"There is no data file at {path}.")
  text = _decode(path)
  layout = _layout(path, text)
  encoded: list[tuple[list[int], list[bool]]] = []
  kinds = set()
  if layout == "text":
    kinds.add("plain text")
    ids = [*tokenizer.encode(text.strip()), tokenizer.eos_id]
    # Neighbouring pieces share one token, so that each token but the first is a target once.
    pieces = [ids[i : i + seq_len + 1] for i in range(0, len(ids) - 1, seq_len)]
    encoded = [(piece, [True] * len(piece)) for piece in pieces]
  else:
    for where, raw in (_listed if layout == "list" else _lines)(path, text):
      kind, messages = _messages(raw, where)
      kinds.add(kind)
      try:
        encoded.append(tokenizer.encode_chat(messages))
      except ValueError as error:
        raise DataError(f"{where}: {error}.") from error
  if not encoded:
    raise DataError(f"{path} has no rows: the list is empty.")

  if train_on_prompt:
    encoded = [(ids, [True] * len(ids)) for ids, _ in encoded]
  rows = [
    Row(np.asarray(ids[: seq_len + 1], np.int32), np.asarray(learned[: seq_len + 1], bool))
    for ids, learned in encoded
  ]
  cut = sum(len(ids) > seq_len + 1 for ids, _ in encoded)
  kept = [row for row in rows if row.learned[1:].any()]
  dropped = len(rows) - len(kept)
  notes = []
  if cut:
    notes.append(f"{cut:,} of {len(rows):,} rows were longer than {seq_len} tokens and were cut.")
  if dropped:
    notes.append(f"{dropped:,} rows were dropped: nothing in them was left to learn.")
  if len(kept) < 2:
    raise DataError(
      f"{path} gives {len(kept)} usable row{'s' * (len(kept) != 1)} of {len(rows)}; at least "
      "2 are needed, one to learn from and one to measure with. Add rows, or choose another "
      f"--seq-len (now {seq_len})."
    )
  return Dataset(" and ".join(sorted(kinds)), kept, notes)


def _decode(path: Path) -> str:
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


def _layout(path: Path, text: str) -> str:
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


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
  """``(place, object)`` for each line of JSON."""
  for number, line in enumerate(text.split("\n"), 1):
    if line.strip():
      where = f"{path}, line {number}"
      try:
        yield where, json.loads(line)
      except json.JSONDecodeError as error:
        raise DataError(
          f"{where}, column {error.colno}: {error.msg}; expected one complete JSON "
          "object a line (or a JSON list of objects)."
        ) from error


def _listed(path: Path, text: str) -> Iterator[tuple[str, Any]]:
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
    try:
      value, stop = decoder.raw_decode(text, start)
    except json.JSONDecodeError as error:
      raise DataError(
        f"{where}: {error.msg} at line {error.lineno}, column {error.colno}; expected a "
        "JSON object."
      ) from error
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


def _messages(raw: Any, where: str) -> tuple[str, list[Message]]:
  """The kind of a row and its messages, checked."""
  if not isinstance(raw, dict):
    raise DataError(
      f"{where}: expected a JSON object, found {type(raw).__name__} {str(raw)[:30]!r}."
    )
  if "messages" in raw:
    return "chat messages", _chat(raw["messages"], where)
  if "instruction" in raw or "output" in raw:
    for key in ("instruction", "output"):
      if not isinstance(raw.get(key), str):
        found = f"is {type(raw[key]).__name__}" if key in raw else "is missing"
        raise DataError(f"{where}: '{key}' {found}; an Alpaca row needs it as a text.")
    extra = raw.get("input") or ""
    if not isinstance(extra, str):
      raise DataError(f"{where}: 'input' is {type(extra).__name__}; expected a text, or nothing.")
    question = raw["instruction"] + (f"\n\n{extra}" if extra else "")
    answer = [{"role": "assistant", "content": raw["output"]}] if raw["output"].strip() else []
    return "Alpaca instructions", [{"role": "user", "content": question}, *answer]
  raise DataError(
    f"{where}: expected the keys 'messages' (chat) or 'instruction' and 'output' (Alpaca), "
    f"found {', '.join(map(repr, raw)) or 'none'}."
  )


def _chat(messages: Any, where: str) -> list[Message]:
  if not isinstance(messages, list) or not messages:
    raise DataError(f"{where}: 'messages' must be a list of at least one message.")
  for i, message in enumerate(messages, 1):
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
      raise DataError(f"{where}, message {i}: expected 'role' and 'content', both texts.")
    if message.get("role") not in ROLES:
      raise DataError(
        f"{where}, message {i}: 'role' is {message.get('role')!r}; expected {', '.join(ROLES)}."
      )
  return [{"role": m["role"], "content": m["content"]} for m in messages]
