"""What a row of data says, whatever keys it says it with."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from chat import ROLES
from json_files import DataError
from templates import Message

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
_HALF = re.compile("[\ud800-\udfff]")


class Example(NamedTuple):
  """A row: a conversation, or a text of which what follows the prompt is learned."""

  kind: str
  messages: list[Message]
  prompt: str = ""
  text: str = ""
  silent: frozenset[int] = frozenset()  # which messages are never learned


def read(raw: Any, where: str) -> Example:
  """A row, checked.

  Raises:
    DataError: for a row of no known kind, or a malformed one.
  """
  if not isinstance(raw, dict):
    raise DataError(
      f"{where}: expected a JSON object, found {type(raw).__name__} {str(raw)[:30]!r}."
    )
  if "messages" in raw:
    messages, silent = _chat(raw["messages"], where, "messages", "role", "content")
    return Example("chat messages", messages, silent=silent)
  if "conversations" in raw:
    messages, silent = _chat(raw["conversations"], where, "conversations", "from", "value")
    first = _system(raw, where)
    silent = frozenset(i + len(first) for i in silent)
    return Example("ShareGPT conversations", first + messages, silent=silent)
  if "instruction" in raw or "output" in raw:
    instruction, output = _texts(raw, where, "an Alpaca row", "instruction", "output")
    extra = _optional(raw, where, "input")
    question = instruction + (f"\n\n{extra}" if extra else "")
    answer = [{"role": "assistant", "content": output}] if output.strip() else []
    messages = [*_system(raw, where), *_history(raw, where), {"role": "user", "content": question}]
    return Example("Alpaca instructions", messages + answer)
  if "completion" in raw:
    prompt, completion = _texts(raw, where, "a completion row", "prompt", "completion")
    return Example("prompts and completions", [], prompt, completion)
  if "text" in raw:
    (text,) = _texts(raw, where, "a row of text", "text")
    return Example("texts", [], text=text)
  raise DataError(
    f"{where}: expected the keys 'messages' (chat), 'conversations' (ShareGPT), 'instruction' and "
    "'output' (Alpaca), 'prompt' and 'completion', or 'text', "
    f"found {', '.join(map(repr, raw)) or 'none'}."
  )


def _texts(raw: dict[str, Any], where: str, what: str, *keys: str) -> Iterator[str]:
  for key in keys:
    if not isinstance(raw.get(key), str):
      found = f"is {type(raw[key]).__name__}" if key in raw else "is missing"
      raise DataError(f"{where}: '{key}' {found}; {what} needs it as a text.")
    _check_whole(raw[key], f"{where}: '{key}'")
  return (raw[key] for key in keys)


def _optional(raw: dict[str, Any], where: str, key: str) -> str:
  text = raw.get(key)
  if text is None:
    return ""
  if not isinstance(text, str):
    raise DataError(f"{where}: '{key}' is {type(text).__name__}; expected a text, or nothing.")
  _check_whole(text, f"{where}: '{key}'")
  return text


def _system(raw: dict[str, Any], where: str) -> list[Message]:
  text = _optional(raw, where, "system")
  return [{"role": "system", "content": text}] if text.strip() else []


def _history(raw: dict[str, Any], where: str) -> list[Message]:
  """The turns before an Alpaca row's own, as LLaMA-Factory has them: pairs of texts."""
  turns, messages = raw.get("history"), []
  if not isinstance(turns, list | None):
    raise DataError(f"{where}: 'history' must be a list of pairs of texts, or nothing.")
  for i, turn in enumerate(turns or [], 1):
    place = f"{where}: 'history', turn {i}"
    if not isinstance(turn, list) or [type(text) for text in turn] != [str, str]:
      raise DataError(f"{place}: expected two texts, a question and its answer.")
    for role, text in zip(("user", "assistant"), turn, strict=True):
      _check_whole(text, place)
      messages.append({"role": role, "content": text})
  return messages


def _check_whole(text: str, where: str) -> None:
  """Raises DataError for a lone surrogate, which JSON can write and no tokenizer can read."""
  if half := _HALF.search(text):
    raise DataError(
      f"{where} holds half a character (U+{ord(half[0]):04X}); write the other half too, or "
      "remove it."
    )


def _chat(
  messages: Any, where: str, name: str, who: str, what: str
) -> tuple[list[Message], frozenset[int]]:
  """The messages, and which of them have the weight 0."""
  if not isinstance(messages, list) or not messages:
    raise DataError(f"{where}: '{name}' must be a list of at least one message.")
  result, silent = [], set()
  for i, message in enumerate(messages, 1):
    if not isinstance(message, dict) or not isinstance(message.get(what), str):
      raise DataError(f"{where}, message {i}: expected '{who}' and '{what}', both texts.")
    role = message.get(who)
    known = {role: role for role in ROLES} | (SHAREGPT_ROLES if who == "from" else {})
    if role not in known:
      raise DataError(f"{where}, message {i}: '{who}' is {role!r}; expected {', '.join(known)}.")
    _check_whole(message[what], f"{where}, message {i}: '{what}'")
    weight = message.get("weight")
    if weight not in (None, 0, 1):
      raise DataError(
        f"{where}, message {i}: 'weight' is {weight!r}; expected 0 (not learned) or 1 (learned)."
      )
    if weight == 0:
      silent.add(i - 1)
    result.append({"role": known[role], "content": message[what]})
  return result, frozenset(silent)
