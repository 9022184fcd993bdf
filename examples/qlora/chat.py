"""Text to tokens and back: a model's tokenizer, and the template of its conversations."""

import datetime
import re
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from templates import KNOWN, Message, Template
from tokenizer_files import from_directory, from_gguf

ROLES = ("system", "user", "assistant")


class ChatTokenizer:
  """A tokenizer that also knows how its model writes a conversation.

  Attributes:
    template: how a conversation is written.
    today: the day that a template writes. A run keeps that on which it began.
    bos, eos: the tokens that begin and end a text; `bos` may be None.
    writes_bos: whether the template is given `bos`; else it has "" in its place.
    eos_id, pad_id: ids; padding must be masked by length, since often ``pad_id == eos_id``.
    stop_ids: any of these ends an answer.

  Args:
    backend: text to ids.
    bos, eos, pad: tokens.
    add_bos: whether the tokenizer puts `bos` before every text.
    chat_template: the model's own template; "" if it has none.
    template: a name of `KNOWN` to be used instead; "auto" is the model's own, or the one whose
      control tokens the vocabulary holds.
    today: the day, at midnight, for templates that write the date; None is today.
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
      self.template = Template("the model's own", chat_template)
    else:
      fits = (t for t in KNOWN.values() if t.needs and all(n in vocabulary for n in t.needs))
      self.template = next(fits, KNOWN["plain"])
    has_place = self.template is KNOWN["llama-2"] or self.template.name == "the model's own"
    self.bos, self.writes_bos = bos, bool(bos and (add_bos or has_place))
    self._bos = bos if bos and self.writes_bos else ""
    self._text_begin = bos if bos and add_bos else ""
    # Some models' files do not call their own end token special.
    added = backend.get_added_tokens_decoder().values()
    control = {t.content for t in added if t.special or t.content in (bos, pad)} | {eos}
    longest_first = "|".join(map(re.escape, sorted(control, key=lambda t: (-len(t), t))))
    self._control, self._end = re.compile(longest_first), re.compile(rf"\s*(?:{longest_first})")
    self.stop_ids = tuple({self.eos_id, *self._end_of_answer()})

  def _end_of_answer(self) -> list[int]:
    """The control token behind an answer, as the template writes it, if there is one."""
    try:
      said, ((_, (_, stop)),) = self._render(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
      )
    except ValueError:  # the template wants more, or something else, than two messages
      return []
    last = self.encode(said[:stop])[-1]
    return [last] if self._is_control(last) else []

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
    return self.backend.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int]) -> str:
    """Text of tokens, without control tokens."""
    return self.backend.decode(list(map(int, ids)), skip_special_tokens=True)

  def encode_chat(
    self, messages: Sequence[Message], silent: Container[int] = (), *, everything: bool = False
  ) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and which of them are learned.

    Learned is what the assistant says, the end token included: not the headers, not the other
    roles, not the line break after the end token. A token that ends the header and begins the
    answer (" sat" where the prompt ends in a blank) is learned: without it, its word is not.

    Args:
      messages: ``{"role": ..., "content": ...}``, roles system, user, assistant.
      silent: numbers, from 0, of answers that are not learned.
      everything: whether all that is not a silent answer is learned.

    Returns:
      ``(ids, learned)``, two lists of one length.

    Raises:
      ValueError: for an unknown role, or a control token written out in a message's text (it
        would end the message early, or let a data set speak in another role).
    """
    text, spans = self._render(messages)
    encoding = self.backend.encode(text, add_special_tokens=False)
    learned = []
    spans = [span for i, span in spans if (i in silent) == everything]
    spans = iter([*spans, (len(text) + 1, len(text) + 1)])
    start, stop = next(spans)
    for first, last in encoding.offsets:
      while first >= stop:
        start, stop = next(spans)
      inside = (start <= first or start < last) and last <= stop
      learned.append(inside != everything)
    return encoding.ids, learned

  def encode_completion(self, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
    """Tokens of a text without a template, and its end; those of `completion` are learned.

    The text is encoded whole: of some tokenizers (Llama 2's) a part alone has other tokens. One
    that begins in the prompt and ends in the completion is learned.
    """
    before = self._text_begin + prompt
    encoding = self.backend.encode(before + completion, add_special_tokens=False)
    border = len(before)
    learned = [border <= first or border < last for first, last in encoding.offsets]
    return [*encoding.ids, self.eos_id], [*learned, True]

  def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation up to where the assistant's next answer starts."""
    self._check(messages)
    return self.encode(self._write(messages, answer=True))

  def _check(self, messages: Sequence[Message]) -> None:
    for message in messages:
      role, content = message["role"], message["content"]
      if role not in ROLES:
        raise ValueError(f"a message's role must be one of {', '.join(ROLES)}, got {role!r}")
      if found := self._control.search(content):
        raise ValueError(
          f"the {role}'s message contains the control token {found[0]!r}; remove it, it "
          "would be read as the end or the start of a message"
        )

  def _write(self, messages: Sequence[Message], *, answer: bool = False) -> str:
    bos, eos = self._bos, self.eos
    return self.template.render(messages, bos, eos, answer=answer, today=self.today)

  def _render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, tuple[int, int]]]]:
    """The text of a conversation; the numbers of its answers, and the characters each takes.

    An answer begins where the template, given what came before, says that it begins, and goes up
    to the control token behind it, with which the model says that it is done; or, where other text
    follows it, up to its own end.
    """
    self._check(messages)
    whole = self._write(messages)
    spans = []
    for i, message in enumerate(messages):
      if message["role"] != "assistant":
        continue
      before = self._write(messages[:i], answer=True)
      content = message["content"].strip()
      at = whole.find(content, len(before))
      if not whole.startswith(before) or at < 0:
        raise ValueError(
          f"the chat template ({self.template.name}) {self._what_it_does(messages, i, before)}, so "
          "what is to be learned cannot be told; choose another --chat-template"
        )
      stop = at + len(content)
      end = self._end.match(whole, stop)
      spans.append((i, (len(before), end.end() if end else stop)))
    return whole, spans

  def _what_it_does(self, messages: Sequence[Message], i: int, before: str) -> str:
    """Why answer `i` is not found behind `before`, the prompt for it."""
    alone = self._write(messages[: i + 1])
    if not alone.startswith(before):
      same = (k for k in range(len(before)) if alone[k : k + 1] != before[k])
      prompt = before[next(same) :][-40:]
      return f"asks for an answer with {prompt!r}, which it does not write before message {i + 1}"
    if messages[i]["content"].strip() in alone[len(before) :]:
      return f"rewrites message {i + 1} when others follow it"
    return f"changes the text of message {i + 1}"
