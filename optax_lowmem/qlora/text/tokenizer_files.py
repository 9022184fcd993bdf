"""Tokenizers from files: of a Hugging Face directory, or rebuilt from what a GGUF file says."""

from pathlib import Path
from typing import Any, TypeGuard

from tokenizers import (
  AddedToken,
  Encoding,
  Regex,
  Tokenizer,
  decoders,
  models,
  pre_tokenizers,
  processors,
)

from optax_lowmem.qlora.files.gguf_header import Header
from optax_lowmem.qlora.files.model_files import damage_of, member, read_json, read_text

MOST_TEMPLATE = 1 << 20  # characters; the longest that are known have 20,000
MOST_TOKENIZER = 256 << 20  # bytes


def from_directory(folder: Path) -> dict[str, Any]:
  """Arguments of `ChatTokenizer` from the files Hugging Face tokenizers are saved in."""
  with damage_of(folder):
    return _from_directory(folder)


def _from_directory(folder: Path) -> dict[str, Any]:
  file = member(folder, "tokenizer.json")
  if not file.is_file():
    raise FileNotFoundError(
      f"There is no tokenizer.json in {folder}. It is one of the files a Hugging Face model "
      "consists of: save the model's tokenizer into the same directory."
    )
  if (size := file.stat().st_size) > MOST_TOKENIZER:
    raise ValueError(f"{file} has {size:,} bytes; at most {MOST_TOKENIZER:,} are read.")
  try:
    backend = Tokenizer.from_file(str(file))
  except Exception as error:  # tokenizers raises bare Exception
    raise ValueError(f"{file} is not a tokenizer that can be read: {error}") from error
  config: dict[str, Any] = {}
  about = folder  # the file that what is asked of `config` came from
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    if member(folder, name).exists():
      about = member(folder, name)
      config |= read_json(about)
  model = member(folder, "config.json")
  numbers = read_json(model) if model.exists() else {}
  with damage_of(about):
    return _from_config(folder, backend, config, numbers, about)


def _from_config(
  folder: Path, backend: Tokenizer, config: dict[str, Any], numbers: dict[str, Any], about: Path
) -> dict[str, Any]:
  _declare(backend, config, folder)

  def token(kind: str) -> str | None:
    value = config.get(f"{kind}_token")
    if isinstance(value, dict):
      value = value.get("content")
    if value is None:
      number = numbers.get(f"{kind}_token_id")
      number = number[0] if isinstance(number, list) and number else number
      value = backend.id_to_token(number) if _is_id(number) else None
    if value is not None and not isinstance(value, str):
      raise ValueError(f"`{kind}_token` is {value!r:.100}, which is no text.")
    return value if value is not None and backend.token_to_id(value) is not None else None

  bos, eos = token("bos"), token("eos")
  if eos is None:
    raise ValueError(
      f"The end-of-text token of {folder} is unknown: neither tokenizer_config.json nor "
      "config.json names an `eos_token` that tokenizer.json holds."
    )
  template, origin = config.get("chat_template") or "", about
  if isinstance(template, list):  # several, by name
    template = {each["name"]: each["template"] for each in template}.get("default", "")
  if member(folder, "chat_template.jinja").exists():
    origin = member(folder, "chat_template.jinja")
    template = read_text(origin, 4 * MOST_TEMPLATE)
  started = encoded(backend, "a", special=True).ids[:1]
  return {
    "backend": backend,
    "bos": bos,
    "eos": eos,
    "pad": token("pad"),
    "add_bos": bos is not None and started == [backend.token_to_id(bos)],
    "chat_template": _template(template, origin),
    "origin": str(origin),
    "tokens": {"unk_token": unknown} if (unknown := token("unk")) else {},
    "ends": _ends(folder, backend),
  }


def encoded(backend: Tokenizer, text: str, *, special: bool = False) -> Encoding:
  """The tokens of a text; `special` adds what the tokenizer puts around it.

  Raises:
    ValueError: where an expression in tokenizer.json gives up on the text, after ten million steps.
  """
  try:
    return backend.encode(text, add_special_tokens=special)
  except BaseException as error:  # Rust's panics are no Exceptions
    if type(error).__name__ != "PanicException":
      raise
    raise ValueError(
      f"the model's tokenizer.json cannot be used for the text {text[:40]!r}: {error!s:.200}"
    ) from error


def _ends(folder: Path, backend: Tokenizer) -> list[int]:
  """The tokens that end an answer by what the model's own files say of generation."""
  ends: list[Any] = []
  for name in ("config.json", "generation_config.json"):
    if (file := member(folder, name)).exists():
      given = read_json(file).get("eos_token_id")
      ends += given if isinstance(given, list) else [given]
  return [i for i in ends if _is_id(i) and backend.id_to_token(i) is not None]


def _is_id(value: Any) -> TypeGuard[int]:
  """Whether a token's number can be this."""
  return isinstance(value, int) and 0 <= value < 1 << 32


def _declare(backend: Tokenizer, config: dict[str, Any], folder: Path) -> None:
  """Takes special tokens whole that the configuration names and tokenizer.json does not.

  Raises:
    ValueError: where the two give a token different numbers.
  """
  numbered = {
    int(number): token for number, token in config.get("added_tokens_decoder", {}).items()
  }
  for number, token in sorted(numbered.items()):
    known = backend.token_to_id(token["content"])
    if known is not None and known != number:
      raise ValueError(
        f"In {folder}, tokenizer_config.json gives {token['content']!r} the number {number} and "
        f"tokenizer.json {known}. One of them is of another model."
      )
  more = config.get("additional_special_tokens") or []
  extra = config.get("extra_special_tokens") or []
  named = [value for key, value in config.items() if key.endswith("_token")]
  for token in (*numbered.values(), *more, *_values(extra), *named):
    about = {"content": token, "special": True} if isinstance(token, str) else token
    if not isinstance(about, dict) or not isinstance(about.get("content"), str):
      continue
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    given = {"normalized": False} | {key: about[key] for key in flags if key in about}
    if about["content"] in _added(backend) or backend.token_to_id(about["content"]) is None:
      continue
    backend.add_tokens([AddedToken(about["content"], **given)])


def _values(x: Any) -> list[Any]:
  return list(x.values()) if isinstance(x, dict) else list(x)


def _added(backend: Tokenizer) -> set[str]:
  return {token.content for token in backend.get_added_tokens_decoder().values()}


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


def from_gguf(path: Path) -> dict[str, Any]:
  """Arguments of `ChatTokenizer` from the metadata of a GGUF file."""
  try:
    header = Header(path)
  except ValueError as error:
    raise ValueError(f"{path} cannot be read as a GGUF file: {error}") from error
  with damage_of(path):
    return _from_header(path, header)


def _from_header(path: Path, header: Header) -> dict[str, Any]:
  def value(key: str, default: Any = None) -> Any:
    return header.value(f"tokenizer.{key}", default)

  kind, split = value("ggml.model"), value("ggml.pre", "gpt-2")
  if kind != "gpt2" or split not in _SPLITS:
    raise ValueError(
      f"{path} holds a tokenizer of the kind {kind!r} / {split!r}; of those in GGUF files "
      f"only 'gpt2' with {', '.join(map(repr, _SPLITS))} can be rebuilt. Use the model's "
      "Hugging Face directory, whose tokenizer.json is read as it is."
    )
  tokens: list[str] = _listed(value("ggml.tokens"), "tokens", str)
  merges = [tuple(merge.split(" ", 1)) for merge in _listed(value("ggml.merges"), "merges", str)]
  if wrong := next((merge for merge in merges if len(merge) != 2), None):
    raise ValueError(f"{path}: the merge {wrong[0]!r:.100} is not of two tokens.")
  llama_3 = split == "llama-bpe"  # a word of its vocabulary is taken whole, whatever the merges
  vocabulary = {t: i for i, t in enumerate(tokens)}
  try:
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=llama_3))
  except Exception as error:  # tokenizers raises bare Exception
    raise ValueError(f"{path} holds no tokenizer that can be made: {error}") from error
  bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in ("gpt-2", "smollm"))
  backend.pre_tokenizer = pre_tokenizers.Sequence([*_SPLITS[split], bytes_])
  backend.decoder = decoders.ByteLevel()
  types = _listed(value("ggml.token_type", []), "token_type", int)
  for type_, special in ((_CONTROL, True), (_USER_DEFINED, False)):
    added = [t for t, kind in zip(tokens, types, strict=False) if kind == type_]
    backend.add_tokens([AddedToken(t, special=special, normalized=False) for t in added])

  def token(kind: str) -> str | None:
    number = value(f"ggml.{kind}_token_id")
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None

  eos = token("eos")
  if eos is None:
    raise ValueError(f"{path} does not name its end-of-text token (tokenizer.ggml.eos_token_id).")
  bos = token("bos")
  add_bos = bool(bos and value("ggml.add_bos_token", llama_3))  # as llama.cpp, if it is not said
  if add_bos:  # so that a tokenizer.json written from it says so too
    number = value("ggml.bos_token_id")
    backend.post_processor = processors.TemplateProcessing(
      single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, number)]
    )
  return {
    "backend": backend,
    "bos": bos,
    "eos": eos,
    "pad": token("padding"),
    "add_bos": add_bos,
    "chat_template": _template(value("chat_template", ""), path),
    "origin": str(path),
  }


def _listed(values: Any, key: str, kind: type) -> list[Any]:
  if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
    raise ValueError(f"`tokenizer.ggml.{key}` is missing, or no list of {kind.__name__}.")
  return values


def _template(source: Any, where: Path) -> str:
  """A chat template, which must be a text of a size that one can have."""
  if not isinstance(source, str):
    raise ValueError(f"{where}: the chat template is no text, but a {type(source).__name__}.")
  if len(source) > MOST_TEMPLATE:
    raise ValueError(
      f"{where}: the chat template has {len(source):,} characters; at most {MOST_TEMPLATE:,} are "
      "read."
    )
  return source
