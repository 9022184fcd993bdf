"""How a model writes a conversation: its own chat template, or a well-known one.

A template is a Jinja program, as in Hugging Face's ``tokenizer_config.json``, and is run as
transformers runs it: in a sandbox, for it comes with a model that somebody else made.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]  # {"role": text, "content": text}, and what else a template writes


class _Generation(jinja2.ext.Extension):
  """``{% generation %}``, by which some templates mark the answers; what is in it is kept."""

  tags = {"generation"}  # noqa: RUF012

  def parse(self, parser: Any) -> Any:
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
  )
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = _raise
  return environment


def _to_json(
  x: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """As transformers' templates are given it: Jinja's own escapes what HTML must not hold."""
  return json.dumps(
    x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _raise(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


@dataclass(frozen=True)
class Template:
  """A chat template.

  Attributes:
    name: for people.
    source: the Jinja program. It sees ``messages``, ``add_generation_prompt``, ``tools``,
      ``documents``, and special tokens such as ``bos_token``.
    needs: tokens by which it is recognised where the model has none of its own.
  """

  name: str
  source: str
  needs: tuple[str, ...] = ()

  @property
  def is_own(self) -> bool:
    """Whether it came with the model, and is none of `KNOWN`."""
    return not any(self is known for known in KNOWN.values())

  def writes(self, name: str) -> bool:
    """Whether the program speaks of a variable or a field of this name at all."""
    return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

  @cached_property
  def _compiled(self) -> jinja2.Template:
    try:
      return _environment().from_string(self.source)
    except jinja2.TemplateError as error:
      raise ValueError(f"the model's chat template cannot be read ({error})") from error

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
      ValueError: where the template refuses the conversation.
    """
    try:
      return self._compiled.render(
        messages=list(messages),
        add_generation_prompt=answer,
        tools=tools,
        documents=documents,
        **tokens,
        strftime_now=(today or datetime.datetime.now()).strftime,
      )
    except Exception as error:  # a program of somebody else's: it may fail in any way
      said = str(error) if isinstance(error, jinja2.TemplateError) else repr(error)
      raise ValueError(f"the chat template refuses the conversation: {said}") from error


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
