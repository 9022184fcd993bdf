"""Gemma, Gemma 2, and Gemma 3 of text alone."""

from typing import Any

from optax_lowmem.qlora.families.family import Family, Keys, biases, rope, windows
from optax_lowmem.qlora.models.llama_config import PRE_AND_POST_NORMS

SHARED: Keys = {
  "num_key_value_heads": 4,
  "head_dim": 256,
  "tie_word_embeddings": True,
  "attention_bias": False,
  "hidden_activation": "gelu_pytorch_tanh",
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
  "layer_types": None,
}
# Gemma reads `hidden_activation`; `hidden_act` stands in old files and means the same function.
SUPPORTED = {
  "hidden_act": ("gelu", "gelu_pytorch_tanh"),
  "use_bidirectional_attention": (False,),
}

# The first Gemma's files say "gelu", which its authors corrected to be this one.
ACTIVATION = {"hidden_act": "gelu_pytorch_tanh"}


def gemma1(read: Keys) -> dict[str, Any]:
  """A Llama with larger embeddings, and weights of norms that are offsets from one."""
  scale = read["hidden_size"] ** 0.5
  return {**biases(read), **ACTIVATION, "norm_offset": True, "embedding_multiplier": scale}


def gemma(read: Keys, period: int) -> dict[str, Any]:
  """What Gemma 2 and 3 have; each `period`-th layer sees all."""
  count = read["num_hidden_layers"]
  types = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(count)]
  return {
    **biases(read),
    "windows": windows(read, types),
    "hidden_act": read["hidden_activation"],
    "norms": PRE_AND_POST_NORMS,
    "norm_offset": True,
    "embedding_multiplier": read["hidden_size"] ** 0.5,
    "attention_scale": read["query_pre_attn_scalar"] ** -0.5,
    "attn_logit_softcapping": read["attn_logit_softcapping"],
    "final_logit_softcapping": read["final_logit_softcapping"],
  }


def gemma3(read: Keys) -> dict[str, Any]:
  period = read["sliding_window_pattern"] or read["_sliding_window_pattern"]
  return {**gemma(read, period), "qk_norm": True}


def gemma3_rope(read: Keys) -> dict[str, Any]:
  """Layers with a window have a base of their own, and no scaling."""
  rotary = read.get("rope_parameters") or {}
  if set(rotary) <= {"full_attention", "sliding_attention"}:
    whole, local = rotary.get("full_attention") or {}, rotary.get("sliding_attention") or {}
    read = {**read, "rope_parameters": whole}
  else:
    local = {}
  found = rope({**read, "rope_parameters": local, "rope_scaling": None, "rope_theta": None})
  if found["rope_scaling"] is not None:
    raise ValueError(
      f"`rope_parameters` scale the layers with 'sliding_attention', {local!r}, which is not "
      "supported; needs the type 'default' there."
    )
  theta = local.get("rope_theta", read["rope_local_base_freq"])
  return {**rope(read, theta=1e6), "rope_local_theta": theta}


GEMMA = Family(
  "gemma",
  gguf="gemma",
  defaults={
    "num_key_value_heads": 16,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "max_position_embeddings": 8192,
  },
  options=gemma1,
  supported=SUPPORTED | {"hidden_activation": (None, "gelu_pytorch_tanh")},
)

GEMMA2 = Family(
  "gemma2",
  gguf="gemma2",
  defaults={
    **SHARED,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
  },
  options=lambda read: gemma(read, period=2),
  supported=SUPPORTED,
)

GEMMA3 = Family(
  "gemma3_text",
  gguf="gemma3",
  defaults={
    **SHARED,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_local_base_freq": 10000.0,
    "sliding_window_pattern": None,
    "_sliding_window_pattern": 6,
  },
  options=gemma3,
  rope=gemma3_rope,
  supported=SUPPORTED,
)
