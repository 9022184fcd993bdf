"""The numbers that fix a Llama, or one of its relatives, and the tensors they call for."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from optax_lowmem.qlora.models.rope_scaling import Divided, LongRope, RopeScaling

Shape = tuple[int, ...]


class BlockNorms(NamedTuple):
  """The names of a layer's norms by their place; None where there is none."""

  before_attention: str | None
  after_attention: str | None
  before_mlp: str | None
  after_mlp: str | None


PRE_NORMS = BlockNorms("input_layernorm", None, "post_attention_layernorm", None)
POST_NORMS = BlockNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
PRE_AND_POST_NORMS = BlockNorms(
  "input_layernorm",
  "post_attention_layernorm",
  "pre_feedforward_layernorm",
  "post_feedforward_layernorm",
)
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """The numbers that fix a model's shape and arithmetic, named as in ``config.json`` if there.

  Args:
    rope_scaling: what is done to the rotary frequencies; None for nothing.
    rope_local_theta: the base of the layers that have a window, which are then not scaled; None
      for `rope_theta` and `rope_scaling` there too.
    partial_rotary_factor: how much of a head is turned.
    unrotated: of each layer, whether nothing is turned there; () where all layers turn.
    windows: how many tokens each layer's tokens see at most, themselves among them, None for no
      limit; () where no layer has one.
    qkv_bias: whether q_proj, k_proj and v_proj have biases.
    o_bias: whether o_proj has one.
    mlp_bias: whether gate_proj, up_proj and down_proj have them.
    qk_norm: whether queries and keys are normalized.
    qk_norm_by_head: whether each head is by itself, or all heads are together.
    fused_linears: whether q_proj, k_proj and v_proj are one layer, qkv_proj, and gate_proj and
      up_proj are one, gate_up_proj.
    hidden_act: the MLP's activation.
    norms: which norms a layer has.
    norm_offset: whether norms multiply by one more than their weight.
    attention_scale: by which scores are multiplied; None for 1 / sqrt(head_dim).
    attn_logit_softcapping: between which numbers scores are held; None for any.
    final_logit_softcapping: the same of logits.
    embedding_multiplier: by which embeddings are multiplied.
    residual_multiplier: by which attention and MLP are, before they are added.
    logits_scaling: by which logits are divided.

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
  qk_norm_by_head: bool = True
  fused_linears: bool = False
  hidden_act: str = "silu"
  norms: BlockNorms = PRE_NORMS
  norm_offset: bool = False
  rope_local_theta: float | None = None
  partial_rotary_factor: float = 1.0
  unrotated: tuple[bool, ...] = ()
  attention_scale: float | None = None
  attn_logit_softcapping: float | None = None
  final_logit_softcapping: float | None = None
  embedding_multiplier: float = 1.0
  residual_multiplier: float = 1.0
  logits_scaling: float = 1.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type == "float | None" and value is None:
        continue
      if field.type == "int":
        check_size(field.name, value)
      if "float" in str(field.type) and not (_is_number(value) and 0 < value < 1e300):
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
    if self.hidden_act not in ACTIVATIONS:
      raise ValueError(
        f"`hidden_act` must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}."
      )
    if self.partial_rotary_factor > 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
      raise ValueError(
        f"`partial_rotary_factor` must leave an even part of a head of {self.head_dim} to be "
        f"turned, got {self.partial_rotary_factor}, which leaves {self.rotary_dim}."
      )
    for name in ("windows", "unrotated"):
      if (count := len(getattr(self, name))) not in (0, self.num_hidden_layers):
        raise ValueError(
          f"`{name}` must have {self.num_hidden_layers} entries, one a layer, or none, got {count}."
        )
    for window in self.windows:
      if window is not None:
        check_size("windows", window)
    for factors in _factors(self.rope_scaling):
      if len(factors) != self.rotary_dim // 2:
        raise ValueError(
          f"`rope_scaling` has {len(factors)} factors, but {self.rotary_dim} numbers of a head are "
          f"turned, which are {self.rotary_dim // 2} pairs."
        )

  @property
  def rotary_dim(self) -> int:
    """How many numbers of a head are turned."""
    return int(self.head_dim * self.partial_rotary_factor)

  def parameter_count(self) -> int:
    """Returns the number of weights; a tied output layer is counted once."""
    return sum(math.prod(shape) for shape in expected_shapes(self).values())


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[Shape, bool]]:
  """The linear layers of a block: the shape (out, in) of each, and whether it has a bias."""
  d, ff = config.hidden_size, config.intermediate_size
  q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
  if config.fused_linears:
    inward = {"self_attn.qkv_proj": ((q + 2 * kv, d), config.qkv_bias)}
    upward = {"mlp.gate_up_proj": ((2 * ff, d), config.mlp_bias)}
  else:
    sizes = {"q": q, "k": kv, "v": kv}
    inward = {f"self_attn.{x}_proj": ((out, d), config.qkv_bias) for x, out in sizes.items()}
    upward = {f"mlp.{x}_proj": ((ff, d), config.mlp_bias) for x in ("gate", "up")}
  outward = {"self_attn.o_proj": ((d, q), config.o_bias)}
  return inward | outward | upward | {"mlp.down_proj": ((d, ff), config.mlp_bias)}


def norm_sizes(config: LlamaConfig) -> dict[str, int]:
  """The norms of a block and how many numbers each normalizes."""
  sizes = {name: config.hidden_size for name in config.norms if name}
  if config.qk_norm:
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for name, count in heads.items():
      together = 1 if config.qk_norm_by_head else count
      sizes[f"self_attn.{name}_norm"] = together * config.head_dim
  return sizes


def expected_shapes(config: LlamaConfig) -> dict[str, Shape]:
  """Returns the shape of every tensor a model has, under its Hugging Face name.

  Args:
    config: the model's configuration.

  Returns:
    A dictionary; linear weights are (out, in).
  """
  layer: dict[str, Shape] = {f"{name}.weight": (n,) for name, n in norm_sizes(config).items()}
  for name, (shape, bias) in linear_shapes(config).items():
    layer[f"{name}.weight"] = shape
    if bias:
      layer[f"{name}.bias"] = shape[:1]
  shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
  for i in range(config.num_hidden_layers):
    shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
  shapes["model.norm.weight"] = (config.hidden_size,)
  if not config.tie_word_embeddings:
    shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
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


def _factors(scaling: RopeScaling | None) -> list[tuple[float, ...]]:
  """The lists of numbers in a scaling, one number a pair."""
  match scaling:
    case Divided(factors):
      return [factors]
    case LongRope(short, long):
      return [short, long]
  return []
