"""How a model writes a conversation: its own chat template, or a well-known one.

A template is a Jinja program, as in Hugging Face's ``tokenizer_config.json``, and is run as
transformers runs it, in a sandbox, for it comes with a model that somebody else made. A sandbox
does not keep it from running for ever: that is why it is run in another process.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optax_lowmem.qlora.text.confined import MEMORY, TooMuchError, elsewhere
from optax_lowmem.qlora.text.rendering import complaint, render

Message = dict[str, Any]  # {"role": text, "content": text}, and what else a template writes

# A template writes some words of its own, and each message once, or a few times.
MOST_WRITTEN, TIMES = 1 << 20, 10


@dataclass(frozen=True)
class Template:
  """A chat template.

  Attributes:
    name: for people.
    source: the Jinja program. It sees ``messages``, ``add_generation_prompt``, ``tools``,
      ``documents``, and special tokens such as ``bos_token``.
    needs: tokens by which it is recognised where the model has none of its own.
    origin: the file it comes from; "" for those in this one, which are trusted.
  """

  name: str
  source: str
  needs: tuple[str, ...] = ()
  origin: str = ""

  @property
  def title(self) -> str:
    """The name, and the file."""
    return f"{self.name}, {self.origin}" if self.origin else self.name

  @property
  def is_own(self) -> bool:
    """Whether it came with the model, and is none of `KNOWN`."""
    return not any(self is known for known in KNOWN.values())

  def writes(self, name: str) -> bool:
    """Whether the program speaks of a variable or a field of this name at all."""
    return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

  def render(
    self,
    messages: Sequence[Message],
    tokens: Mapping[str, str],
    *,
    answer: bool = False,
    today: datetime.date | None = None,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
  ) -> str:
    """The text of a conversation; with `answer`, up to where the assistant's next one starts.

    Args:
      messages: the conversation.
      tokens: special tokens by the names that templates have for them, such as ``bos_token``.
      answer: see above.
      today: the day, for templates that write it; None is now.
      tools, documents: what some templates write before the conversation.

    Raises:
      ValueError: where the template refuses the conversation, or takes too long or too much memory.
    """
    values = {
      "messages": list(messages),
      "add_generation_prompt": answer,
      "tools": tools,
      "documents": documents,
      **tokens,
    }
    day = (today or datetime.datetime.now()).isoformat()
    if self in KNOWN.values():
      try:
        return render(self.source, values, day)
      except Exception as error:
        raise self._refusal(complaint(error)) from error
    try:
      given = json.dumps(values)
      rest = {"source": self.source, "today": day, "most": MOST_WRITTEN + TIMES * len(given)}
      reply = elsewhere(f'{{"values": {given}, {json.dumps(rest)[1:]}', self.source)
    except TooMuchError as error:
      raise self._refusal(str(error)) from error
    except (TypeError, RecursionError) as error:
      raise self._refusal(f"the conversation is nested too deeply ({error})") from error
    if "text" in reply:
      return reply["text"]
    if reply["error"] == "memory":
      raise self._refusal(f"it takes more than {MEMORY >> 20} MiB of memory")
    raise self._refusal(reply["error"])

  def _refusal(self, why: str) -> ValueError:
    place = f" of {self.origin}" if self.origin else ""
    return ValueError(f"the chat template{place} refuses the conversation: {why}")


_EACH = "{% for message in messages %}"
CHATML = Template(
  "ChatML",
  "{{ bos_token }}" + _EACH + "{{ '<|im_start|>' + message.role + '\n' + message.content "
  "+ '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
  ("<|im_start|>", "<|im_end|>"),
)
_HEADER = "'<|start_header_id|>' + {} + '<|end_header_id|>\n\n'"
LLAMA_3 = Template(
  "Llama 3",
  "<|begin_of_text|>" + _EACH + "{{ " + _HEADER.format("message.role") + " + "
  "message.content | trim + '<|eot_id|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ " + _HEADER.format("'assistant'") + " }}{% endif %}",
  ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)


def _instruct(system: str, begin: str, turn: str, question: str, answer: str) -> str:
  """Questions in ``[INST]``, with the system's words in the first; turns must alternate."""
  return (
    "{% if messages and messages[0].role == 'system' %}"
    "{% set first = " + system + " %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}" + begin + ""
    "{% for message in turns %}"
    "{% if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('user and assistant must take turns, and the user begins') }}{% endif %}"
    "{% set text = message.content | trim %}"
    "{% if message.role == 'user' %}{% if loop.first %}{% set text = first + text %}{% endif %}"
    + turn
    + "{{ "
    + question
    + " }}{% else %}{{ "
    + answer
    + " }}{% endif %}{% endfor %}"
  )


LLAMA_2 = Template(
  "Llama 2",
  _instruct(
    system="'<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n'",
    begin="",
    turn="{{ bos_token }}",
    question="'[INST] ' + text + ' [/INST]'",
    answer="' ' + text + ' ' + eos_token",
  ),
)
MISTRAL = Template(
  "Mistral",
  _instruct(
    system="messages[0].content + '\n\n'",
    begin="{{ bos_token }}",
    turn="",
    question="'[INST] ' + text + '[/INST]'",
    answer="' ' + text + eos_token",
  ),
  ("[INST]", "[/INST]"),
)
# A base model was never taught a template: a readable one, ended by its own end-of-text token.
PLAIN = Template(
  "plain",
  "{{ bos_token }}" + _EACH + "{{ '### ' + message.role | capitalize + ':\n' + message.content "
  "+ eos_token + '\n\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}",
)
KNOWN = {
  "chatml": CHATML,
  "llama-2": LLAMA_2,
  "llama-3": LLAMA_3,
  "mistral": MISTRAL,
  "plain": PLAIN,
}
