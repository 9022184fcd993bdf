"""The numbers that fix a Llama, or one of its relatives, and the tensors they call for."""

from __future__ import annotations

import dataclasses
from typing import Any

from rope_scaling import Divided, RopeScaling

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """The numbers that fix a model's shape and arithmetic, named as in ``config.json`` if there.

  Args:
    rope_scaling: what is done to the rotary frequencies; None for nothing.
    windows: how many tokens each layer's tokens see at most, themselves among them, None for no
      limit; () where no layer has one.
    qkv_bias: whether q_proj, k_proj and v_proj have biases.
    o_bias: whether o_proj has one.
    mlp_bias: whether gate_proj, up_proj and down_proj have them.
    qk_norm: whether each head's queries and keys are normalized.

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
  rope_scaling: RopeScaling | None = None
  windows: tuple[int | None, ...] = ()
  qkv_bias: bool = False
  o_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type == "int":
        check_size(field.name, value)
      if field.type == "float" and not (_is_number(value) and 0 < value < 1e300):
        raise ValueError(f"`{field.name}` must be a positive number, got {value!r:.100}.")
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
    if len(self.windows) not in (0, self.num_hidden_layers):
      raise ValueError(
        f"`windows` must have {self.num_hidden_layers} entries, one a layer, or none, "
        f"got {len(self.windows)}."
      )
    for window in self.windows:
      if window is not None:
        check_size("windows", window)
    if isinstance(self.rope_scaling, Divided):
      if len(self.rope_scaling.factors) != self.head_dim // 2:
        raise ValueError(
          f"`rope_scaling` has {len(self.rope_scaling.factors)} factors, but a head of size "
          f"{self.head_dim} has {self.head_dim // 2} pairs."
        )

  def parameter_count(self) -> int:
    """Returns the number of weights; a tied output layer is counted once."""
    d, ff = self.hidden_size, self.intermediate_size
    q, kv = (n * self.head_dim for n in (self.num_attention_heads, self.num_key_value_heads))
    layer = 2 * d * (q + kv) + 3 * d * ff + 2 * d
    layer += self.qkv_bias * (q + 2 * kv) + self.o_bias * d + self.mlp_bias * (2 * ff + d)
    layer += self.qk_norm * 2 * self.head_dim
    tables = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
    return self.num_hidden_layers * layer + tables + d


def expected_shapes(config: LlamaConfig) -> dict[str, Shape]:
  """Returns the shape of every tensor a model has, under its Hugging Face name.

  Args:
    config: the model's configuration.

  Returns:
    A dictionary; linear weights are (out, in).
  """
  d, ff = config.hidden_size, config.intermediate_size
  q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
  linears: dict[str, tuple[Shape, bool]] = {
    "self_attn.q_proj": ((q, d), config.qkv_bias),
    "self_attn.k_proj": ((kv, d), config.qkv_bias),
    "self_attn.v_proj": ((kv, d), config.qkv_bias),
    "self_attn.o_proj": ((d, q), config.o_bias),
    "mlp.gate_proj": ((ff, d), config.mlp_bias),
    "mlp.up_proj": ((ff, d), config.mlp_bias),
    "mlp.down_proj": ((d, ff), config.mlp_bias),
  }
  layer: dict[str, Shape] = {"input_layernorm.weight": (d,)}
  for name, (shape, bias) in linears.items():
    layer[f"{name}.weight"] = shape
    if bias:
      layer[f"{name}.bias"] = shape[:1]
  if config.qk_norm:
    layer |= {f"self_attn.{each}_norm.weight": (config.head_dim,) for each in ("q", "k")}
  layer["post_attention_layernorm.weight"] = (d,)
  shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, d)}
  for i in range(config.num_hidden_layers):
    shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
  shapes["model.norm.weight"] = (d,)
  if not config.tie_word_embeddings:
    shapes["lm_head.weight"] = (config.vocab_size, d)
  return shapes


MOST = {"num_hidden_layers": 10_000}  # each of the layers has a part in many lists


def check_size(name: str, value: Any) -> None:
  """Refuses what is no positive integer, or more than any model has."""
  if type(value) is not int or value < 1:
    raise ValueError(f"`{name}` must be a positive integer, got {value!r:.100}.")
  if value > (most := MOST.get(name, 2**31 - 1)):
    raise ValueError(f"`{name}` must be at most {most:,}, got {value!r:.100}.")


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)
