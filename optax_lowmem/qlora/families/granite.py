"""Granite 3, the dense ones: a Llama with multipliers."""

from typing import Any

from optax_lowmem.qlora.families.family import Family, Keys, biases


def granite(read: Keys) -> dict[str, Any]:
  names = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
  scale = {"attention_scale": read["attention_multiplier"]}
  return {**biases(read), **{name: read[name] for name in names}, **scale}


GRANITE = Family(
  "granite",
  gguf="granite",
  gguf_adjacent_pairs=True,
  defaults={
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
  },
  options=granite,
)
