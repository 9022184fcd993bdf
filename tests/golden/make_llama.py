"""Writes ``llama/*.npz``: tiny models of transformers, their logits and their greedy tokens.

    python tests/golden/make_llama.py            # all
    python tests/golden/make_llama.py gemma2     # some

Each file holds the ``config.json`` that transformers writes, the weights in float16 (which hold
them exactly), one sequence, its logits and what greedy generation appends to it. Windows and
original context lengths are shorter than the sequence, and biases and norms are random, so that a
detail that is left out shows.
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "llama"
TIME, NEW = 24, 8

SMALL = {
  "vocab_size": 64,
  "hidden_size": 32,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "eos_token_id": None,
  "bos_token_id": None,
}

LLAMA3_ROPE = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 3.0,
  "original_max_position_embeddings": 20,
}
YARN_ROPE = {
  "rope_type": "yarn",
  "rope_theta": 1000.0,
  "factor": 4.0,
  "original_max_position_embeddings": 16,
  "beta_fast": 4.0,
}

# The families of which a model of this size says all there is to say.
TINY = SMALL | {
  "vocab_size": 30,  # unlike any linear layer but the head
  "hidden_size": 16,
  "intermediate_size": 20,
  "pad_token_id": None,
}
LONG_ROPE = {
  "rope_type": "longrope",
  "rope_theta": 100.0,
  "partial_rotary_factor": 0.75,
  "short_factor": [1.0, 1.5, 2.0],
  "long_factor": [1.2, 3.0, 5.0],
}
WIDE_HEADS = {"head_dim": 8, "sliding_window": 5}
GEMMA3_ROPE = {
  "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
  "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}

# Name -> model type, what differs from `SMALL` or, of the new families, `TINY`. The place of a name
# is the seed of its weights, so that new ones stand at the end.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
  "llama2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
  "llama3": (
    "llama",
    {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 16},
  ),
  "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
  "llama_linear": (
    "llama",
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
  ),
  "mistral": ("mistral", {"sliding_window": 7}),
  "qwen2": (
    "qwen2",
    {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
  ),
  "qwen2_yarn": ("qwen2", {"rope_parameters": YARN_ROPE, "tie_word_embeddings": True}),
  "qwen3": ("qwen3", {"head_dim": 12}),
  "gemma2": (
    "gemma2",
    WIDE_HEADS
    | {
      "query_pre_attn_scalar": 20,
      "attn_logit_softcapping": 2.0,
      "final_logit_softcapping": 1.0,
    },
  ),
  "gemma3": (
    "gemma3_text",
    WIDE_HEADS
    | {
      "query_pre_attn_scalar": 6,
      "rope_parameters": GEMMA3_ROPE,
      "layer_types": ["sliding_attention", "full_attention"],
    },
  ),
  "phi3": ("phi3", {"sliding_window": 7}),
  "phi3_long": (
    "phi3",
    {
      "num_attention_heads": 2,
      "rope_parameters": LONG_ROPE,
      "original_max_position_embeddings": 16,
    },
  ),
  "smollm3": (
    "smollm3",
    {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5},
  ),
  "olmo2": ("olmo2", {}),
  "granite": (
    "granite",
    {
      "embedding_multiplier": 3.0,
      "residual_multiplier": 0.6,
      "attention_multiplier": 0.3,
      "logits_scaling": 2.0,
    },
  ),
  "gemma": ("gemma", {"head_dim": 8}),
}
FIRST = ("llama", "mistral", "qwen2", "qwen3")
OFFSET = 20  # of the new families' seeds: greedy tokens differ from each other


def build(name: str) -> Any:
  """A random model of transformers, in float32 with weights that float16 holds."""
  import torch
  import transformers

  kind, changes = CASES[name]
  sizes = SMALL if kind in FIRST else TINY
  config = transformers.AutoConfig.for_model(kind, **(sizes | changes))
  model = transformers.AutoModelForCausalLM.from_config(
    config, dtype=torch.float32, attn_implementation="eager"
  )
  random = np.random.default_rng(list(CASES).index(name) + (0 if kind in FIRST else OFFSET))
  with torch.no_grad():
    for parameter_name, parameter in model.named_parameters():
      value = random.standard_normal(tuple(parameter.shape))
      if parameter_name.endswith("norm.weight"):
        value = (not kind.startswith("gemma")) + 0.2 * value  # Gemma's has 1 added to it
      elif parameter.ndim == 1:
        value = 0.5 * value
      elif "embed" in parameter_name:
        value = (0.1 if kind.startswith("gemma") else 0.3) * value  # Gemma multiplies it
      else:
        value = 1.5 * value / parameter.shape[1] ** 0.5
      parameter.copy_(torch.from_numpy(value.astype(np.float16)))
  return model.eval()


def measure(model: Any) -> dict[str, np.ndarray]:
  """Ids, logits and greedy tokens."""
  import torch

  ids = np.random.default_rng(99).integers(0, model.config.vocab_size, (1, TIME))
  with torch.no_grad():
    logits = model(torch.from_numpy(ids)).logits
    generated = model.generate(torch.from_numpy(ids), max_new_tokens=NEW, do_sample=False)
  return {"ids": ids, "logits": logits.numpy(), "generated": generated[:, TIME:].numpy()}


def save(name: str, config: dict[str, Any], weights: dict[str, Any], measured: Any) -> None:
  """The weights in one array: a file has some 250 bytes for each that it holds."""
  shapes = {key: weight.shape for key, weight in weights.items()}
  flat = np.concatenate([weight.ravel() for weight in weights.values()])
  about = {"config": json.dumps(config), "shapes": json.dumps(shapes)}
  np.savez_compressed(FOLDER / f"{name}.npz", weights=flat, **about, **measured)


def read(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
  """The ``config.json``, the weights, and what `measure` gave."""
  stored = dict(np.load(FOLDER / f"{name}.npz"))
  config = json.loads(str(stored.pop("config")))
  measured = {key: stored.pop(key) for key in ("ids", "logits", "generated")}
  if "shapes" not in stored:  # the first ones were written an array each
    return config, stored, measured
  weights, start = {}, 0
  for key, shape in json.loads(str(stored["shapes"])).items():
    end = start + int(np.prod(shape))
    weights[key] = stored["weights"][start:end].reshape(shape)
    start = end
  return config, weights, measured


def save_directory(folder: Any, config: dict[str, Any], weights: dict[str, Any]) -> pathlib.Path:
  """A Hugging Face directory of what `read` gives."""
  from safetensors.numpy import save_file

  folder = pathlib.Path(folder)
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  save_file(weights, folder / "model.safetensors")
  return folder


def main() -> None:
  FOLDER.mkdir(exist_ok=True)
  for name in sys.argv[1:] or CASES:
    model = build(name)
    weights = {k: v.numpy().astype(np.float16) for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
      del weights["lm_head.weight"]
    save(name, model.config.to_diff_dict(), weights, measure(model))


if __name__ == "__main__":
  main()
