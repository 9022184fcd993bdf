"""Llama 2 and 3, and Mistral."""

from optax_lowmem.qlora.families.family import Family, biases, windows

LLAMA = Family(
  "llama",
  gguf="llama",
  gguf_adjacent_pairs=True,
  defaults={
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
  },
  options=biases,
)

MISTRAL = Family(
  "mistral",
  gguf="llama",
  gguf_adjacent_pairs=True,
  defaults={
    "num_key_value_heads": 8,
    "head_dim": None,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
  },
  options=lambda read: {"windows": windows(read)},
)
