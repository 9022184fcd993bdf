"""What a row of data says, whatever keys it says it with."""

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from optax_lowmem.qlora.files.json_files import DataError
from optax_lowmem.qlora.text.chat_tokenizer import ROLES
from optax_lowmem.qlora.text.templates import Message

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
# What the turns of those who call a tool, and of the tool, are called in ShareGPT's files.
SHAREGPT_ROLES |= {"tool": "tool", "observation": "tool"}
CONVERSATIONS = {"chat messages", "ShareGPT conversations", "Alpaca instructions"}  # by template
_HALF = re.compile("[\ud800-\udfff]")


class Example(NamedTuple):
  """A row: a conversation, or a text of which what follows the prompt is learned."""

  kind: str
  messages: list[Message]
  prompt: str = ""
  text: str = ""
  silent: frozenset[int] = frozenset()  # which messages are never learned
  extras: Mapping[str, Any] = MappingProxyType({})  # tools, documents: what else a template writes


def read(raw: Any, where: str) -> Example:
  """A row, checked.

  Raises:
    DataError: for a row of no known kind, or a malformed one.
  """
  if not isinstance(raw, dict):
    raise DataError(
      f"{where}: expected a JSON object, found {type(raw).__name__} {reprlib.repr(raw)[:60]}."
    )
  for name, who, what, kind in (
    ("messages", "role", "content", "chat messages"),
    ("conversations", "from", "value", "ShareGPT conversations"),
  ):
    if name in raw:
      messages, silent = _chat(raw[name], where, name, who, what)
      first = _system(raw, where)
      if first and messages[0]["role"] == "system":
        raise DataError(f"{where}: 'system' and a first message of the system; keep one of them.")
      silent = frozenset(i + len(first) for i in silent)
      return Example(kind, first + messages, silent=silent, extras=_extras(raw, where))
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


def _extras(raw: dict[str, Any], where: str) -> dict[str, Any]:
  """What a row has for the template beside its messages: lists, or such lists as JSON text."""
  extras = {}
  for key in ("tools", "documents"):
    value = raw.get(key)
    if isinstance(value, str) and value.strip():
      try:
        value = json.loads(value)
      except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: '{key}' is a text that is not JSON ({error}).") from error
    if not isinstance(value, list | str | None):
      raise DataError(f"{where}: '{key}' is {type(value).__name__}; expected a list, or nothing.")
    if value:
      extras[key] = value
  return extras


def _chat(
  messages: Any, where: str, name: str, who: str, what: str
) -> tuple[list[Message], frozenset[int]]:
  """The messages, and which of them are not to be learned: of weight 0, or `train` false."""
  if not isinstance(messages, list) or not messages:
    raise DataError(f"{where}: '{name}' must be a list of at least one message.")
  result, silent = [], set()
  known = {role: role for role in ROLES} | (SHAREGPT_ROLES if who == "from" else {})
  for i, message in enumerate(messages, 1):
    place = f"{where}, message {i}"
    if not isinstance(message, dict):
      raise DataError(f"{place}: expected '{who}' and '{what}', both texts.")
    role, text = message.get(who), message.get(what)
    if text is None and (message.get("tool_calls") or message.get("function_call")):
      text = ""  # an answer that is a call
    if not isinstance(role, str) or not isinstance(text, str):
      raise DataError(f"{place}: expected '{who}' and '{what}', both texts.")
    if role not in known:
      raise DataError(f"{place}: '{who}' is {role!r:.100}; expected {', '.join(known)}.")
    _check_whole(text, f"{place}: '{what}'")
    _check_fields(message, place)
    if not _is_learned(message, place):
      silent.add(i - 1)
    own = (who, what, "weight", "train")  # and where rows are a table, all fields are in each
    rest = {k: v for k, v in message.items() if k not in own and v is not None}
    result.append({"role": known[role], "content": text, **rest})
  return result, frozenset(silent)


def _check_fields(message: dict[str, Any], where: str) -> None:
  """What templates read of a message beside its text must be of the kind that they expect."""
  calls, thought = message.get("tool_calls"), message.get("reasoning_content")
  if not isinstance(thought, str | None):
    raise DataError(f"{where}: 'reasoning_content' is {type(thought).__name__}; expected a text.")
  if not isinstance(calls, list | None) or not all(isinstance(call, dict) for call in calls or []):
    raise DataError(f"{where}: 'tool_calls' must be a list of objects.")
  for call in calls or []:
    function = call.get("function") or call
    name = function.get("name") if isinstance(function, dict) else function
    if not isinstance(name, str | None):
      raise DataError(f"{where}: 'tool_calls' must hold a 'function' with a 'name' each.")


def _is_learned(message: dict[str, Any], where: str) -> bool:
  weight, train = message.get("weight"), message.get("train")
  if weight not in (None, 0, 1):
    raise DataError(f"{where}: 'weight' is {weight!r}; expected 0 (not learned) or 1 (learned).")
  if train not in (None, False, True):
    raise DataError(f"{where}: 'train' is {train!r}; expected true or false.")
  if train is not None and weight is not None and bool(train) != bool(weight):
    raise DataError(f"{where}: 'weight' is {weight!r} and 'train' {train!r}; keep one of them.")
  return weight != 0 and train is not False
