"""Tokenizers from files: of a Hugging Face directory, or rebuilt from what a GGUF file says."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors


def from_directory(folder: Path) -> dict[str, Any]:
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

  _declare(backend, config, folder)

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
  if isinstance(template, list):  # several, by name
    template = {each["name"]: each["template"] for each in template}.get("default", "")
  if (folder / "chat_template.jinja").is_file():
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
  started = backend.encode("a").ids[:1]
  return {
    "backend": backend,
    "bos": bos,
    "eos": eos,
    "pad": token("pad"),
    "add_bos": bos is not None and started == [backend.token_to_id(bos)],
    "chat_template": template,
    "tokens": {"unk_token": unknown} if (unknown := token("unk")) else {},
    "ends": _ends(folder, backend),
  }


def _ends(folder: Path, backend: Tokenizer) -> list[int]:
  """The tokens that end an answer by what the model's own files say of generation."""
  ends: list[int] = []
  for name in ("config.json", "generation_config.json"):
    if (folder / name).is_file():
      given = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
      ends += given if isinstance(given, list) else [given]
  return [i for i in ends if isinstance(i, int) and backend.id_to_token(i) is not None]


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
  llama_3 = split == "llama-bpe"  # a word of its vocabulary is taken whole, whatever the merges
  vocabulary = {t: i for i, t in enumerate(tokens)}
  backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=llama_3))
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
    "chat_template": value("chat_template", ""),
  }
