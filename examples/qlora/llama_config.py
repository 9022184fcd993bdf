"""The shape of a Llama, read from a ``config.json`` or from GGUF metadata.

A configuration that asks for something this model does not compute is refused by name. A feature
that is ignored gives plausible text and wrong numbers, which is worse than an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

REQUIRED_KEYS = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
)

# Key -> the values that mean what `llama.py` computes. A key that is absent or null is fine.
ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
  "hidden_act": ("silu", "swish"),
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "attention_dropout": (0,),
  "sliding_window": (),
  "partial_rotary_factor": (1,),
  "quantization_config": (),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """The numbers that fix a Llama's shape and arithmetic, named as in ``config.json``.

  Raises:
    ValueError: if a size is not a positive integer, or if the sizes do not fit together.

  Example:
    >>> config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=160,
    ...                      num_hidden_layers=2, num_attention_heads=4,
    ...                      num_key_value_heads=2, head_dim=16)
    >>> config.rope_theta
    10000.0
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rms_norm_eps: float = 1e-6
  rope_theta: float = 10000.0
  max_position_embeddings: int = 2048
  tie_word_embeddings: bool = False

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type == "int":
        _check_size(field.name, value)
      if field.type == "float" and not (_is_number(value) and 0 < value < float("inf")):
        raise ValueError(f"`{field.name}` must be a positive number, got {value!r}.")
      if field.type == "bool" and type(value) is not bool:
        raise ValueError(f"`{field.name}` must be true or false, got {value!r}.")
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of "
        f"`num_key_value_heads` ({self.num_key_value_heads})."
      )
    if self.head_dim % 2:
      raise ValueError(
        f"`head_dim` must be even, got {self.head_dim}: rotary embeddings turn pairs."
      )

  def parameter_count(self) -> int:
    """Returns the number of weights; a tied output layer is counted once."""
    attention = 2 * self.hidden_size * self.head_dim
    attention *= self.num_attention_heads + self.num_key_value_heads
    layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
    tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
    return self.num_hidden_layers * layer + tables + self.hidden_size


def config_from_hf(config: Mapping[str, Any]) -> LlamaConfig:
  """Reads the dictionary of a Hugging Face ``config.json``.

  Args:
    config: the parsed file. Absent optional keys take Hugging Face's defaults for Llama.

  Returns:
    The configuration.

  Raises:
    ValueError: if the architecture is another one, if a required key is missing, or if the
      configuration asks for a feature that `llama.py` does not compute.

  Example:
    >>> config_from_hf({"model_type": "gpt2"})
    Traceback (most recent call last):
    ...
    ValueError: `model_type` is 'gpt2'; supported: 'llama'.
  """
  if config.get("model_type") != "llama":
    raise ValueError(f"`model_type` is {config.get('model_type')!r}; supported: 'llama'.")
  missing = [key for key in REQUIRED_KEYS if config.get(key) is None]
  if missing:
    raise ValueError(f"config.json lacks {', '.join(missing)}.")
  for key, supported in ONLY_SUPPORTED.items():
    value = config.get(key)
    if value is not None and value not in supported:
      wanted = " or ".join(repr(each) for each in supported) or "no such key"
      raise ValueError(f"`{key}` is {value!r}, which is not supported; needs {wanted}.")

  # transformers 5 writes `rope_parameters`; before that, `rope_theta` and `rope_scaling`.
  rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
  rope_type = rope.get("rope_type", rope.get("type", "default"))
  if rope_type != "default":
    raise ValueError(f"Rope scaling {rope_type!r} is not supported; needs 'default'.")
  if rope.get("partial_rotary_factor") not in (None, 1):
    raise ValueError("`partial_rotary_factor` other than 1 is not supported.")

  values = {key: config[key] for key in REQUIRED_KEYS}
  for key, value in values.items():
    _check_size(key, value)
  heads, hidden = values["num_attention_heads"], values["hidden_size"]
  if config.get("head_dim") is None and hidden % heads:
    raise ValueError(
      f"`hidden_size` ({hidden}) is not a multiple of `num_attention_heads` ({heads}) "
      "and config.json has no `head_dim`."
    )
  for key, default in {
    "num_key_value_heads": heads,
    "head_dim": hidden // heads,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
  }.items():
    values[key] = default if config.get(key) is None else config[key]
  theta = rope.get("rope_theta", config.get("rope_theta"))
  return LlamaConfig(**values, rope_theta=10000.0 if theta is None else theta)


def config_from_gguf(metadata: Mapping[str, Any], *, tied: bool, vocab_size: int) -> LlamaConfig:
  """Reads the metadata of a GGUF file.

  Args:
    metadata: the file's key-value pairs, as Python values.
    tied: whether the file has no output layer of its own (the metadata does not say).
    vocab_size: the number of rows of the embedding table (the metadata need not say).

  Returns:
    The configuration.

  Raises:
    ValueError: as `config_from_hf`.

  Example:
    >>> config_from_gguf({"general.architecture": "mamba"}, tied=True, vocab_size=8)
    Traceback (most recent call last):
    ...
    ValueError: `general.architecture` is 'mamba'; supported: 'llama'.
  """
  architecture = metadata.get("general.architecture")
  if architecture != "llama":
    raise ValueError(f"`general.architecture` is {architecture!r}; supported: 'llama'.")
  values: dict[str, Any] = {}
  for key, field in {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
  }.items():
    value = metadata.get(f"llama.{key}")
    if isinstance(value, list):
      raise ValueError(f"`llama.{key}` differs from layer to layer, which is not supported.")
    if value is not None:
      values[field] = value
  config = config_from_hf(
    {"model_type": "llama", "vocab_size": vocab_size, "tie_word_embeddings": tied, **values}
  )
  for key, supported in {
    "rope.scaling.type": (None, "none"),
    "rope.scale_linear": (None, 1),
    "rope.dimension_count": (None, config.head_dim),
    "attention.value_length": (None, config.head_dim),
    "attention.sliding_window": (None, 0),
    "expert_count": (None, 0),
    "vocab_size": (None, vocab_size),
  }.items():
    value = metadata.get(f"llama.{key}")
    if value not in supported:
      raise ValueError(
        f"`llama.{key}` is {value!r}, which is not supported; needs {supported[1]!r}."
      )
  return config


def _check_size(name: str, value: Any) -> None:
  if type(value) is not int or value < 1:
    raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)
