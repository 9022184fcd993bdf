"""Text to tokens and back: a model's tokenizer, and the template of its conversations.

A tokenizer comes with the model: as ``tokenizer.json`` in a Hugging Face directory, or as lists of
tokens and merges in the metadata of a GGUF file, from which it is rebuilt. The template (which
control tokens stand around a message) is recognised by the control tokens the vocabulary holds.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Template:
  """How a message is written: ``header.format(role=...) + content + end + gap``."""

  name: str
  header: str
  end: str  # what the assistant must learn to say when it is done; "" stands for the model's eos
  gap: str  # between messages, never learned
  needs: tuple[str, ...] = ()  # tokens by which the template is recognised
  begin: str = ""
  strip: bool = False


TEMPLATES = (
  Template(
    name="ChatML",
    header="<|im_start|>{role}\n",
    end="<|im_end|>",
    gap="\n",
    needs=("<|im_start|>", "<|im_end|>"),
  ),
  Template(
    name="Llama 3",
    begin="<|begin_of_text|>",
    header="<|start_header_id|>{role}<|end_header_id|>\n\n",
    end="<|eot_id|>",
    gap="",
    needs=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    strip=True,
  ),
  # A base model was never taught a template: a readable one, ended by its own end-of-text token.
  Template(name="plain", header="### {role}:\n", end="", gap="\n\n"),
)


class ChatTokenizer:
  """A tokenizer that also knows how its model writes a conversation.

  Attributes:
    template: the recognised :class:`Template`.
    default_system: the system message the model's own template adds where none is given, or None.
    eos_id, pad_id: ids; padding must be masked by length, since often ``pad_id == eos_id``.
    stop_ids: any of these ends an answer.
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
  ):
    backend.no_truncation()
    backend.no_padding()
    self.backend = backend
    vocabulary = backend.get_vocab()
    self.eos, self.eos_id = eos, vocabulary[eos]
    self.pad_id = vocabulary.get(pad, self.eos_id) if pad else self.eos_id
    self.template = next(t for t in TEMPLATES if all(n in vocabulary for n in t.needs))
    self._end = self.template.end or eos
    self._begin = self.template.begin or (bos if add_bos and bos else "")
    self.stop_ids = tuple({self.eos_id, vocabulary[self._end]})
    self.default_system = _default_system(chat_template)
    special = [t.content for t in backend.get_added_tokens_decoder().values() if t.special]
    self._control = re.compile("|".join(map(re.escape, special))) if special else None

  @classmethod
  def from_model(cls, path: str | Path, template: str = "auto") -> "ChatTokenizer":
    """The tokenizer of a GGUF file or of a Hugging Face directory.

    Raises:
      FileNotFoundError: where there is no such file, or no ``tokenizer.json`` in the directory.
      ValueError: for a kind of tokenizer that cannot be rebuilt from GGUF metadata.
    """
    path = Path(path)
    if path.is_dir():
      return cls(**_from_directory(path))
    if path.is_file():
      return cls(**_from_gguf(path))
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

  def encode_chat(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and which of them are learned.

    Learned is what the assistant says, the end token included: not the headers, not the other
    roles, not the line break after the end token.

    Args:
      messages: ``{"role": ..., "content": ...}``, roles system, user, assistant.

    Returns:
      ``(ids, learned)``, two lists of one length.

    Raises:
      ValueError: for an unknown role, or a control token written out in a message's text (it
        would end the message early, or let a data set speak in another role).
    """
    text, spans = self._render(messages)
    encoding = self.backend.encode(text, add_special_tokens=False)
    learned = []
    spans = iter([*spans, (len(text) + 1, len(text) + 1)])
    start, stop = next(spans)
    for first, last in encoding.offsets:
      while first >= stop:
        start, stop = next(spans)
      learned.append(start <= first and last <= stop)
    return encoding.ids, learned

  def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation up to where the assistant's next answer starts."""
    text, _ = self._render(messages)
    return self.encode(text + self.template.header.format(role=self._role("assistant")))

  def _render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and the character spans that are learned."""
    template, text, spans = self.template, self._begin, []
    if self.default_system and (not messages or messages[0]["role"] != "system"):
      messages = [{"role": "system", "content": self.default_system}, *messages]
    for message in messages:
      role, content = message["role"], message["content"]
      if role not in ROLES:
        raise ValueError(f"a message's role must be one of {', '.join(ROLES)}, got {role!r}")
      if self._control and (found := self._control.search(content)):
        raise ValueError(
          f"the {role}'s message contains the control token {found[0]!r}; remove it, it "
          "would be read as the end or the start of a message"
        )
      text += template.header.format(role=self._role(role))
      start = len(text)
      text += (content.strip() if template.strip else content) + self._end
      if role == "assistant":
        spans.append((start, len(text)))
      text += template.gap
    return text, spans

  def _role(self, role: str) -> str:
    return role.capitalize() if self.template.name == "plain" else role


def _default_system(chat_template: str) -> str | None:
  """The system message written out in a ChatML template, which it adds where none is given."""
  found = re.search(r"<\|im_start\|>system(?:\\n|\n)([^<{}'\"]+)<\|im_end\|>", chat_template)
  return found[1].replace("\\n", "\n") if found else None


def _from_directory(folder: Path) -> dict[str, Any]:
  """Arguments of `ChatTokenizer` from the files Hugging Face tokenizers are saved in."""
  file = folder / "tokenizer.json"
  if not file.is_file():
    raise FileNotFoundError(
      f"There is no tokenizer.json in {folder}. It is one of the files a Hugging Face model "
      "consists of: save the model's tokenizer into the same directory."
    )
  try:
    backend = Tokenizer.from_file(str(file))
  except Exception as error:  # tokenizers raises bare Exception
    raise ValueError(f"{file} is not a tokenizer that can be read: {error}") from error
  config: dict[str, Any] = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    if (folder / name).is_file():
      config |= json.loads((folder / name).read_text(encoding="utf-8"))

  def token(kind: str) -> str | None:
    value = config.get(f"{kind}_token")
    if isinstance(value, dict):
      value = value.get("content")
    if value is None and (folder / "config.json").is_file():
      number = json.loads((folder / "config.json").read_text("utf-8")).get(f"{kind}_token_id")
      number = number[0] if isinstance(number, list) else number
      value = backend.id_to_token(number) if isinstance(number, int) else None
    return value if value is not None and backend.token_to_id(value) is not None else None

  bos, eos = token("bos"), token("eos")
  if eos is None:
    raise ValueError(
      f"The end-of-text token of {folder} is unknown: neither tokenizer_config.json nor "
      "config.json names an `eos_token` that tokenizer.json holds."
    )
  template = config.get("chat_template") or ""
  if (folder / "chat_template.jinja").is_file():
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
  started = backend.encode("a").ids[:1]
  return {
    "backend": backend,
    "bos": bos,
    "eos": eos,
    "pad": token("pad"),
    "add_bos": bos is not None and started == [backend.token_to_id(bos)],
    "chat_template": template if isinstance(template, str) else "",
  }


# How text is cut before the merges are applied, by the name GGUF files give it. All are byte-level.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
  "gpt-2": [],
  "smollm": [pre_tokenizers.Digits(individual_digits=True)],
  "llama-bpe": [pre_tokenizers.Split(Regex(_WORDS.replace("DIGITS", "{1,3}")), "isolated")],
  "qwen2": [pre_tokenizers.Split(Regex(_WORDS.replace("DIGITS", "")), "isolated")],
}
_CONTROL, _USER_DEFINED = 3, 4  # token types in GGUF


def _from_gguf(path: Path) -> dict[str, Any]:
  """Arguments of `ChatTokenizer` from the metadata of a GGUF file."""
  import gguf

  try:
    fields = gguf.GGUFReader(path).fields
  except (ValueError, IndexError, OSError) as error:
    raise ValueError(f"{path} cannot be read as a GGUF file: {error}") from error

  def value(key: str, default: Any = None) -> Any:
    field = fields.get(f"tokenizer.{key}")
    return default if field is None else field.contents()

  kind, split = value("ggml.model"), value("ggml.pre", "gpt-2")
  if kind != "gpt2" or split not in _SPLITS:
    raise ValueError(
      f"{path} holds a tokenizer of the kind {kind!r} / {split!r}; of those in GGUF files "
      f"only 'gpt2' with {', '.join(map(repr, _SPLITS))} can be rebuilt. Use the model's "
      "Hugging Face directory, whose tokenizer.json is read as it is."
    )
  tokens: list[str] = value("ggml.tokens")
  merges = [tuple(merge.split(" ", 1)) for merge in value("ggml.merges")]
  backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
  bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in ("gpt-2", "smollm"))
  backend.pre_tokenizer = pre_tokenizers.Sequence([*_SPLITS[split], bytes_])
  backend.decoder = decoders.ByteLevel()
  types = value("ggml.token_type", [])
  for type_, special in ((_CONTROL, True), (_USER_DEFINED, False)):
    added = [t for t, kind in zip(tokens, types, strict=False) if kind == type_]
    backend.add_tokens([AddedToken(t, special=special, normalized=False) for t in added])

  def token(kind: str) -> str | None:
    number = value(f"ggml.{kind}_token_id")
    return tokens[number] if number is not None and number < len(tokens) else None

  eos = token("eos")
  if eos is None:
    raise ValueError(f"{path} does not name its end-of-text token (tokenizer.ggml.eos_token_id).")
  return {
    "backend": backend,
    "bos": token("bos"),
    "eos": eos,
    "pad": token("padding"),
    "add_bos": bool(value("ggml.add_bos_token", False)),
    "chat_template": value("chat_template", ""),
  }
