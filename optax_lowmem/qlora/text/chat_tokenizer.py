"""Text to tokens and back: a model's tokenizer, and the template of its conversations."""

import datetime
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from optax_lowmem.qlora.text.answers import Span, find
from optax_lowmem.qlora.text.learned import tokens_of
from optax_lowmem.qlora.text.templates import KNOWN, Message, Template
from optax_lowmem.qlora.text.text_blocks import BLOCK, blocks
from optax_lowmem.qlora.text.tokenizer_files import encoded, from_directory, from_gguf

ROLES = ("system", "user", "assistant", "tool")
# What changes an answer's meaning if it is left out.
_NEEDED = ("tool_calls", "function_call", "reasoning_content")


class ChatTokenizer:
  """A tokenizer that also knows how its model writes a conversation.

  Attributes:
    template: how a conversation is written.
    today: the day that a template writes. A run keeps that on which it began.
    bos, eos: the tokens that begin and end a text; `bos` may be None.
    writes_bos: whether the template is given `bos`; else it has "" in its place.
    eos_id, pad_id: ids; padding must be masked by length, since often ``pad_id == eos_id``.
    stop_ids: any of these ends an answer.
    end_of_answer: the id behind an answer, as the template writes it; None if it writes none, and
      what is trained by it never ends.

  Args:
    backend: text to ids.
    bos, eos, pad: tokens.
    add_bos: whether the tokenizer puts `bos` before every text.
    chat_template: the model's own template; "" if it has none.
    template: a name of `KNOWN` to be used instead; "auto" is the model's own, or the one whose
      control tokens the vocabulary holds.
    today: the day, at midnight, for templates that write the date; None is today.
    tokens: other special tokens that templates may write, such as ``unk_token``, by name.
    ends: ids of other tokens that end an answer.
    origin: the file that the model's own template is in.
  """

  def __init__(
    self,
    backend: Tokenizer,
    *,
    bos: str | None,
    eos: str,
    pad: str | None = None,
    add_bos: bool = False,
    chat_template: str = "",
    template: str = "auto",
    today: datetime.date | None = None,
    tokens: Mapping[str, str] | None = None,
    ends: Iterable[int] = (),
    origin: str = "",
  ):
    self.today = today or datetime.date.today()
    backend.no_truncation()
    backend.no_padding()
    self.backend = backend
    vocabulary = backend.get_vocab()
    self.eos, self.eos_id = eos, vocabulary[eos]
    self.pad_id = vocabulary.get(pad, self.eos_id) if pad else self.eos_id
    if template != "auto":
      self.template = KNOWN[template]
      if missing := [token for token in self.template.needs if token not in vocabulary]:
        raise ValueError(
          f"--chat-template {template} needs the tokens {', '.join(missing)}, which this model "
          "was not made with."
        )
    elif chat_template:
      self.template = Template("the model's own", chat_template, origin=origin)
    else:
      fits = (t for t in KNOWN.values() if t.needs and all(n in vocabulary for n in t.needs))
      self.template = next(fits, KNOWN["plain"])
    has_place = self.template is KNOWN["llama-2"] or self.template.is_own
    self.bos, self.writes_bos = bos, bool(bos and (add_bos or has_place))
    self._bos = bos if bos and self.writes_bos else ""
    self._text_begin = bos if bos and add_bos else ""
    self._tokens = {**(tokens or {}), "bos_token": self._bos, "eos_token": eos}
    self._tokens |= {"pad_token": pad} if pad else {}
    # Some models' files do not call their own end token special.
    added = backend.get_added_tokens_decoder().values()
    control = {t.content for t in added if t.special or t.content in (bos, pad)} | {eos}
    longest_first = "|".join(map(re.escape, sorted(control, key=lambda t: (-len(t), t))))
    self._control = re.compile(longest_first)
    self.end_of_answer = self._end_of_answer()
    self.stop_ids = tuple({self.eos_id, self.end_of_answer, *ends} - {None})

  def _end_of_answer(self) -> int | None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
      text, (span,) = self._find(messages, {})
    except ValueError:  # the template wants more, or something else, than two messages
      return None
    last = self.encode(text[: span.stop])[-1]
    return last if self._is_control(last) else None

  def _is_control(self, token: int) -> bool:
    text = self.backend.id_to_token(token)
    return bool(text and self._control.fullmatch(text))

  @classmethod
  def from_model(
    cls, path: str | Path, template: str = "auto", today: datetime.date | None = None
  ) -> "ChatTokenizer":
    """The tokenizer of a GGUF file or of a Hugging Face directory.

    Raises:
      FileNotFoundError: where there is no such file, or no ``tokenizer.json`` in the directory.
      ValueError: for a kind of tokenizer that cannot be rebuilt from GGUF metadata, or a template
        that does not fit it.
    """
    path = Path(path)
    if path.is_dir():
      return cls(**from_directory(path), template=template, today=today)
    if path.is_file():
      return cls(**from_gguf(path), template=template, today=today)
    raise FileNotFoundError(f"There is no model at {path}.")

  @property
  def vocab_size(self) -> int:
    """One more than the largest id."""
    return max(self.backend.get_vocab().values()) + 1

  def encode(self, text: str) -> list[int]:
    """Tokens of plain text; control tokens are not added."""
    return encoded(self.backend, text).ids

  def decode(self, ids: Iterable[int]) -> str:
    """Text of tokens, without control tokens."""
    return self.backend.decode(list(map(int, ids)), skip_special_tokens=True)

  def encode_chat(
    self,
    messages: Sequence[Message],
    silent: Container[int] = (),
    *,
    everything: bool = False,
    **extras: Any,
  ) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and which of them are learned.

    Learned is what the assistant says, the end token included: not the headers, not the other
    roles, not the line break after the end token. A token that ends the header and begins the
    answer (" sat" where the prompt ends in a blank) is learned: without it, its word is not.

    Args:
      messages: ``{"role": ..., "content": ...}``, roles system, user, assistant, tool; an
        assistant's may hold ``reasoning_content`` and ``tool_calls``.
      silent: numbers, from 0, of answers that are not learned.
      everything: whether all that is not a silent answer is learned.
      **extras: ``tools`` and ``documents``, which some templates write.

    Returns:
      ``(ids, learned)``, two lists of one length.

    Raises:
      ValueError: for an unknown role, a control token written out in a message's text (it would
        end the message early, or let a data set speak in another role), what the template does
        not write, and where the tokens of an answer are not those of its text.
    """
    self._check(messages, extras)
    text, spans = self._find(messages, extras)
    encoding = self._encoding(text)
    learned = [everything] * len(encoding.ids)
    for span in spans:
      for k in tokens_of(span, encoding, text, self.encode, self._raw):
        learned[k] = span.number not in silent
    return encoding.ids, learned

  def encode_completion(
    self, prompt: str, completion: str, most: int | None = None
  ) -> tuple[list[int], list[bool]]:
    """Tokens of a text without a template, and its end; those of `completion` are learned.

    The text is encoded whole: of some tokenizers (Llama 2's) a part alone has other tokens. One
    that begins in the prompt and ends in the completion is learned. A beginning or an end that the
    text has already is not written again. Of a text that is longer than a block, no more blocks
    are encoded than have `most` tokens, and one more; the others would be cut off.
    """
    begin = "" if (prompt or completion).startswith(self._text_begin) else self._text_begin
    before = begin + prompt
    completion = completion.removesuffix(self.eos)
    border = len(before) if before else self._length_of_begin(completion)
    ids: list[int] = []
    learned: list[bool] = []
    start = 0
    for part in blocks(before + completion, BLOCK):
      encoding = self._encoding(part)
      ids += encoding.ids
      learned += [border <= start + a or border < start + b for a, b in encoding.offsets]
      start += len(part)
      if most is not None and len(ids) > most:
        return ids, learned
    return [*ids, self.eos_id], [*learned, True]

  def _length_of_begin(self, text: str) -> int:
    begin = self._text_begin
    return len(begin) if begin and text.startswith(begin) else 0

  def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation up to where the assistant's next answer starts."""
    self._check(messages, {})
    return self.encode(self._write(messages, answer=True))

  def _encoding(self, text: str) -> Encoding:
    """Tokens with the characters that each stands for, the blanks among them.

    The post-processor, which also adds special tokens, may take blanks off (`trim_offsets`).
    """
    processor = self.backend.post_processor
    self.backend.post_processor = None
    try:
      return encoded(self.backend, text)
    finally:
      self.backend.post_processor = processor

  def _check(self, messages: Sequence[Message], extras: Mapping[str, Any]) -> None:
    length = sum(len(text) for text in _strings([*messages, *extras.values()]))
    if length > BLOCK:
      raise ValueError(
        f"the conversation has {length:,} characters; at most {BLOCK:,} are encoded as one. Split "
        "it into several"
      )
    for message in messages:
      role = message["role"]
      if role not in ROLES:
        raise ValueError(f"a message's role must be one of {', '.join(ROLES)}, got {role!r}")
      for text in _strings(message):
        if found := self._control.search(text):
          raise ValueError(
            f"the {role}'s message contains the control token {found[0]!r}; remove it, it "
            "would be read as the end or the start of a message"
          )
    given = {key for message in messages for key in _NEEDED if message.get(key)}
    given |= {key for key, value in extras.items() if value}
    given |= {"tool"} & {message["role"] for message in messages}
    if lost := sorted(key for key in given if not self.template.writes(key)):
      raise ValueError(
        f"the chat template ({self.template.title}) does not write {', '.join(lost)}; choose "
        "another --chat-template, or take it out of the row"
      )

  def _write(self, messages: Sequence[Message], *, answer: bool = False, **extras: Any) -> str:
    return self.template.render(messages, self._tokens, answer=answer, today=self.today, **extras)

  def _find(self, messages: Sequence[Message], extras: Mapping[str, Any]) -> tuple[str, list[Span]]:
    def write(messages, answer=False):
      return self._write(messages, answer=answer, **extras)

    return find(messages, write, self._control, self.template.title)

  def _raw(self, ids: Sequence[int]) -> str:
    return self.backend.decode(list(ids), skip_special_tokens=False)


def _strings(x: Any) -> Iterator[str]:
  """All texts in a message."""
  if isinstance(x, str):
    yield x
  elif isinstance(x, dict):
    for key, value in x.items():
      yield from (*_strings(key), *_strings(value))
  elif isinstance(x, list | tuple):
    for value in x:
      yield from _strings(value)
