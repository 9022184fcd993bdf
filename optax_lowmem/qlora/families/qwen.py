"""Qwen 2 and 3, the dense ones."""

from typing import Any

from optax_lowmem.qlora.families.family import Family, Keys, biases, windows

SHARED: Keys = {
  "num_key_value_heads": 32,
  "max_position_embeddings": 32768,
  "use_sliding_window": False,
  "sliding_window": 4096,
  "max_window_layers": 28,
  "layer_types": None,
}


def windows_above(read: Keys) -> tuple[int | None, ...]:
  """Windows in the layers from `max_window_layers` on, where they are used at all."""
  first, count = read["max_window_layers"], read["num_hidden_layers"]
  types = ["full_attention" if i < first else "sliding_attention" for i in range(count)]
  window = read["sliding_window"] if read["use_sliding_window"] else None
  return windows({**read, "sliding_window": window}, types)


def qwen2(read: Keys) -> dict[str, Any]:
  return {"windows": windows_above(read), "qkv_bias": True}


def qwen3(read: Keys) -> dict[str, Any]:
  return {"windows": windows_above(read), "qk_norm": True, **biases(read)}


QWEN2 = Family("qwen2", gguf="qwen2", defaults={**SHARED, "head_dim": None}, options=qwen2)
QWEN3 = Family(
  "qwen3",
  gguf="qwen3",
  defaults={**SHARED, "head_dim": 128, "attention_bias": False},
  options=qwen3,
)
