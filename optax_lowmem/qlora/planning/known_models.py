"""The shapes of well-known models, so that nothing need be fetched for a plan.

The numbers are those of their public ``config.json``. What does not change a shape, such as the
base and the scaling of the rotary embedding, is left out. `tests/test_plan_cli.py` compares the
numbers of parameters with those that are published.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def _config(
  kind: str, vocabulary: int, hidden: int, mlp: int, layers: int, heads: int, kv: int, longest: int,
  **more: Any,
) -> Config:  # fmt: skip
  """The dictionary of a ``config.json``, its sizes in the order of the rows below."""
  return {
    "model_type": kind,
    "vocab_size": vocabulary,
    "hidden_size": hidden,
    "intermediate_size": mlp,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": kv,
    "max_position_embeddings": longest,
    **more,
  }


_TIED = {"tie_word_embeddings": True}
_GEMMA2 = {"head_dim": 256, "sliding_window": 4096}

# vocabulary, width, width of the MLP, layers, heads, heads of keys and values, positions
MODELS: dict[str, Config] = {
  "smollm2-135m": _config("llama", 49152, 576, 1536, 30, 9, 3, 8192, **_TIED),
  "smollm2-360m": _config("llama", 49152, 960, 2560, 32, 15, 5, 8192, **_TIED),
  "smollm2-1.7b": _config("llama", 49152, 2048, 8192, 24, 32, 32, 8192, **_TIED),
  "smollm3-3b": _config("smollm3", 128256, 2048, 11008, 36, 16, 4, 65536, **_TIED),
  "tinyllama-1.1b": _config("llama", 32000, 2048, 5632, 22, 32, 4, 2048),
  "llama-7b": _config("llama", 32000, 4096, 11008, 32, 32, 32, 2048),
  "llama-13b": _config("llama", 32000, 5120, 13824, 40, 40, 40, 2048),
  "llama-33b": _config("llama", 32000, 6656, 17920, 60, 52, 52, 2048),
  "llama-65b": _config("llama", 32000, 8192, 22016, 80, 64, 64, 2048),
  "llama-2-7b": _config("llama", 32000, 4096, 11008, 32, 32, 32, 4096),
  "llama-2-13b": _config("llama", 32000, 5120, 13824, 40, 40, 40, 4096),
  "llama-2-70b": _config("llama", 32000, 8192, 28672, 80, 64, 8, 4096),
  "llama-3-8b": _config("llama", 128256, 4096, 14336, 32, 32, 8, 8192),
  "llama-3-70b": _config("llama", 128256, 8192, 28672, 80, 64, 8, 8192),
  "llama-3.1-8b": _config("llama", 128256, 4096, 14336, 32, 32, 8, 131072),
  "llama-3.1-70b": _config("llama", 128256, 8192, 28672, 80, 64, 8, 131072),
  "llama-3.1-405b": _config("llama", 128256, 16384, 53248, 126, 128, 8, 131072),
  "llama-3.2-1b": _config("llama", 128256, 2048, 8192, 16, 32, 8, 131072, **_TIED),
  "llama-3.2-3b": _config("llama", 128256, 3072, 8192, 28, 24, 8, 131072, **_TIED),
  "llama-3.3-70b": _config("llama", 128256, 8192, 28672, 80, 64, 8, 131072),
  "mistral-7b": _config("mistral", 32000, 4096, 14336, 32, 32, 8, 32768, sliding_window=4096),
  "mistral-7b-v0.2": _config("mistral", 32000, 4096, 14336, 32, 32, 8, 32768, sliding_window=None),
  "mistral-7b-v0.3": _config("mistral", 32768, 4096, 14336, 32, 32, 8, 32768, sliding_window=None),
  "mistral-large": _config("mistral", 32768, 12288, 28672, 88, 96, 8, 131072, sliding_window=None),
  "qwen2.5-0.5b": _config("qwen2", 151936, 896, 4864, 24, 14, 2, 32768, **_TIED),
  "qwen2.5-1.5b": _config("qwen2", 151936, 1536, 8960, 28, 12, 2, 131072, **_TIED),
  "qwen2.5-3b": _config("qwen2", 151936, 2048, 11008, 36, 16, 2, 32768, **_TIED),
  "qwen2.5-7b": _config("qwen2", 152064, 3584, 18944, 28, 28, 4, 131072),
  "qwen2.5-14b": _config("qwen2", 152064, 5120, 13824, 48, 40, 8, 131072),
  "qwen2.5-32b": _config("qwen2", 152064, 5120, 27648, 64, 40, 8, 131072),
  "qwen2.5-72b": _config("qwen2", 152064, 8192, 29568, 80, 64, 8, 131072),
  "qwen3-0.6b": _config("qwen3", 151936, 1024, 3072, 28, 16, 8, 40960, **_TIED),
  "qwen3-1.7b": _config("qwen3", 151936, 2048, 6144, 28, 16, 8, 40960, **_TIED),
  "qwen3-4b": _config("qwen3", 151936, 2560, 9728, 36, 32, 8, 40960, **_TIED),
  "qwen3-8b": _config("qwen3", 151936, 4096, 12288, 36, 32, 8, 40960),
  "qwen3-14b": _config("qwen3", 151936, 5120, 17408, 40, 40, 8, 40960),
  "qwen3-32b": _config("qwen3", 151936, 5120, 25600, 64, 64, 8, 40960),
  "gemma-2-2b": _config("gemma2", 256000, 2304, 9216, 26, 8, 4, 8192, **_GEMMA2),
  "gemma-2-9b": _config("gemma2", 256000, 3584, 14336, 42, 16, 8, 8192, **_GEMMA2),
  "gemma-2-27b": _config(
    "gemma2", 256000, 4608, 36864, 46, 32, 16, 8192, **_GEMMA2 | {"head_dim": 128}
  ),
  "gemma-3-1b": _config("gemma3_text", 262144, 1152, 6912, 26, 4, 1, 32768, sliding_window=512),
  "phi-3-mini": _config("phi3", 32064, 3072, 8192, 32, 32, 32, 4096, sliding_window=2047),
  "olmo-2-7b": _config("olmo2", 100352, 4096, 11008, 32, 32, 32, 4096),
  "olmo-2-13b": _config("olmo2", 100352, 5120, 13824, 40, 40, 40, 4096),
}
# Other names of the same shapes; the rest of a name's spelling is read by `model_source.py`.
ALSO = {
  "llama-30b": "llama-33b",
  "llama-7b-v1": "llama-7b",
  "tinyllama": "tinyllama-1.1b",
  "mistral-7b-v0.1": "mistral-7b",
  "phi-3-mini-4k": "phi-3-mini",
}
