"""OLMo 2: norms behind attention and MLP, and of all heads together."""

from typing import Any

from optax_lowmem.qlora.families.family import Family, Keys, biases
from optax_lowmem.qlora.models.llama_config import POST_NORMS


def olmo2(read: Keys) -> dict[str, Any]:
  return {**biases(read), "norms": POST_NORMS, "qk_norm": True, "qk_norm_by_head": False}


OLMO2 = Family(
  "olmo2",
  gguf="olmo2",
  defaults={
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
  },
  options=olmo2,
)
