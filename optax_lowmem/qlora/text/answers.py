"""Where the answers of a conversation stand in the text that a template makes of it."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from optax_lowmem.qlora.text.templates import Message

# What stands in an answer's place while its template says where that is.
MARK = "9f3cANSWER7be1"
# What a model writes besides the content: then all that it writes counts, not the content alone.
WRITTEN = ("reasoning_content", "tool_calls")
Write = Callable[..., str]  # (messages, answer=False) -> text; ValueError if they are refused


class Span(NamedTuple):
  """Characters `start` to `stop` are what is to be learned of message `number`."""

  number: int
  start: int
  stop: int


def find(
  messages: Sequence[Message], write: Write, control: re.Pattern[str], name: str
) -> tuple[str, list[Span]]:
  """The text of a conversation, and its answers.

  An answer is where the template writes it: between what it writes before and after another text
  in its place. To it belong the control token behind it, with which the model says that it is done,
  and blanks before it that the prompt for it does not end in. Where the message holds more than a
  text (reasoning, calls of tools), or the template writes another text in another way, it is all
  that follows the prompt.

  Args:
    messages: the conversation.
    write: its template.
    control: matches a control token.
    name: of the template.

  Raises:
    ValueError: where the template refuses the conversation, or writes answers otherwise than it
      asks for them.
  """
  talk = _Talk(messages, write, write(messages), control)
  end = re.compile(rf"\s*(?:{control.pattern})")
  spans = []
  for i, message in enumerate(messages):
    if message["role"] != "assistant":
      continue
    prompt = talk.prompt(i)
    found = talk.place(i, prompt)
    if found is None:
      raise ValueError(
        f"the chat template ({name}) {talk.what_it_does(i, prompt)}, so what is to be learned "
        "cannot be told; choose another --chat-template"
      )
    start, stop = found
    closed = end.match(talk.whole, stop)
    spans.append(Span(i, start, closed.end() if closed else stop))
  return talk.whole, spans


@dataclass(frozen=True)
class _Talk:
  messages: Sequence[Message]
  write: Write
  whole: str
  control: re.Pattern[str]

  def prompt(self, i: int) -> str | None:
    """What answer `i` is asked with; None if the template asks for none after nothing."""
    try:
      return self.write(self.messages[:i], answer=True)
    except ValueError:
      if i:
        raise
      return None

  def place(self, i: int, prompt: str | None) -> tuple[int, int] | None:
    """Where answer `i` is, without the control token behind it."""
    if prompt is not None and not self.whole.startswith(prompt):
      return None
    ways = [self._as_marked, self._as_prompted]
    if any(self.messages[i].get(key) for key in WRITTEN):
      ways.reverse()
    for way in ways:
      try:
        found = way(i, prompt)
      except ValueError:  # the template refuses what this way asks it to write
        continue
      if found is not None:
        return found
    return None

  def _as_marked(self, i: int, prompt: str | None) -> tuple[int, int] | None:
    """The place of the answer's text: where a mark stands that is written in its place."""
    message = self.messages[i]
    content = (message.get("content") or "").strip()
    if message.get("tool_calls") and not content:
      return None  # it is not the empty text that is to be learned
    others = [*self.messages[:i], {**message, "content": MARK}, *self.messages[i + 1 :]]
    before, mark, after = self.write(others).partition(MARK)
    inner = len(self.whole) - len(before) - len(after)
    fits = self.whole.startswith(before) and self.whole.endswith(after)
    if not mark or MARK in after or inner < 0 or not fits:
      return None
    said = self.whole[len(before) :][:inner]
    if said.strip() != content and not _is_rest(said.strip(), content):
      return None
    start = len(before)
    if prompt is not None and not before[len(prompt) :].strip():
      start = len(prompt)
    return start, len(before) + len(said.rstrip())

  def _as_prompted(self, i: int, prompt: str | None) -> tuple[int, int] | None:
    """All that the template writes after the prompt and before the next message."""
    if prompt is None:
      return None
    alone = self.write(self.messages[: i + 1]).rstrip()
    said = squeezed(alone[len(prompt) :])
    if not said or not alone.startswith(prompt) or not self.whole.startswith(alone):
      return None
    if not all(squeezed(text) in said for text in _texts(self.messages[i])):
      return None
    closing = re.compile(rf"(?:{self.control.pattern})\Z").search(alone, len(prompt))
    return len(prompt), closing.start() if closing else len(alone)

  def what_it_does(self, i: int, prompt: str | None) -> str:
    """Why answer `i` is not found."""
    alone = self.write(self.messages[: i + 1])
    if prompt is not None and not alone.startswith(prompt):
      same = (k for k in range(len(prompt)) if alone[k : k + 1] != prompt[k])
      asked = prompt[next(same) :][-40:]
      return f"asks for an answer with {asked!r}, which it does not write before message {i + 1}"
    said = squeezed(alone[len(prompt or "") :])
    if all(squeezed(text) in said for text in _texts(self.messages[i])):
      return f"rewrites message {i + 1} when others follow it"
    return f"changes the text of message {i + 1}"


def _is_rest(said: str, content: str) -> bool:
  """Whether an answer is what follows the reasoning, of which earlier turns are relieved."""
  if not said or not content.endswith(said):
    return False
  return content[: -len(said)].rstrip().endswith("</think>")


def _texts(message: Message) -> Iterator[str]:
  """What must be found in what is written of an answer."""
  yield message.get("content") or ""
  yield message.get("reasoning_content") or ""
  for call in message.get("tool_calls") or ():
    yield (call.get("function") or call).get("name") or ""


def squeezed(text: str) -> str:
  """A text without blanks."""
  return "".join(text.split())
