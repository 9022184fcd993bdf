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
    return Example("chat messages", _chat(raw["messages"], where, "messages", "role", "content"))
  if "conversations" in raw:
    messages = _chat(raw["conversations"], where, "conversations", "from", "value")
    if isinstance(system := raw.get("system"), str) and system.strip():
      _check_whole(system, f"{where}: 'system'")
      messages = [{"role": "system", "content": system}, *messages]
    return Example("ShareGPT conversations", messages)
  if "instruction" in raw or "output" in raw:
    instruction, output = _texts(raw, where, "an Alpaca row", "instruction", "output")
    extra = raw.get("input") or ""
    if not isinstance(extra, str):
      raise DataError(f"{where}: 'input' is {type(extra).__name__}; expected a text, or nothing.")
    _check_whole(extra, f"{where}: 'input'")
    question = instruction + (f"\n\n{extra}" if extra else "")
    answer = [{"role": "assistant", "content": output}] if output.strip() else []
    return Example("Alpaca instructions", [{"role": "user", "content": question}, *answer])
  if "completion" in raw:
    prompt, completion = _texts(raw, where, "a completion row", "prompt", "completion")
    return Example("prompts and completions", [], prompt, completion)
  if "text" in raw:
    return Example("texts", [], "", *_texts(raw, where, "a row of text", "text"))
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


def _check_whole(text: str, where: str) -> None:
  """Raises DataError for a lone surrogate, which JSON can write and no tokenizer can read."""
  if half := _HALF.search(text):
    raise DataError(
      f"{where} holds half a character (U+{ord(half[0]):04X}); write the other half too, or "
      "remove it."
    )


def _chat(messages: Any, where: str, name: str, who: str, what: str) -> list[Message]:
  if not isinstance(messages, list) or not messages:
    raise DataError(f"{where}: '{name}' must be a list of at least one message.")
  result = []
  for i, message in enumerate(messages, 1):
    if not isinstance(message, dict) or not isinstance(message.get(what), str):
      raise DataError(f"{where}, message {i}: expected '{who}' and '{what}', both texts.")
    role = message.get(who)
    known = {role: role for role in ROLES} | (SHAREGPT_ROLES if who == "from" else {})
    if role not in known:
      raise DataError(f"{where}, message {i}: '{who}' is {role!r}; expected {', '.join(known)}.")
    _check_whole(message[what], f"{where}, message {i}: '{what}'")
    result.append({"role": known[role], "content": message[what]})
  return result
