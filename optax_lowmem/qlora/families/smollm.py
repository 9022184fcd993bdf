"""SmolLM3: a Llama some of whose layers turn nothing."""

from typing import Any

from optax_lowmem.qlora.families.family import Family, Keys, biases, rope, windows


def smollm3(read: Keys) -> dict[str, Any]:
  """`no_rope_layers` is 1 where a layer turns, 0 where not."""
  count, interval = read["num_hidden_layers"], read["no_rope_layer_interval"]
  turned = read["no_rope_layers"]
  if turned is None:
    turned = [int((i + 1) % interval != 0) for i in range(count)]
  if len(turned) < count or not set(turned) <= {0, 1}:
    raise ValueError(
      f"`no_rope_layers` must hold 0 or 1 for each of {count} layers, got {turned!r}."
    )
  turned = turned[:count]
  types = ["full_attention" if each else "sliding_attention" for each in turned]
  window = read["sliding_window"] if read["use_sliding_window"] else None
  return {
    **biases(read),
    "windows": windows({**read, "sliding_window": window}, types),
    "unrotated": () if all(turned) else tuple(not each for each in turned),
  }


SMOLLM3 = Family(
  "smollm3",
  gguf="smollm3",
  gguf_adjacent_pairs=True,
  defaults={
    "num_key_value_heads": 4,
    "head_dim": None,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "layer_types": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
  },
  options=smollm3,
  rope=lambda read: rope(read, theta=2e6),
)
