"""Writes ``llama/*.npz``: tiny models of transformers, their logits and their greedy tokens.

    python tests/golden/make_llama.py

Each file holds the ``config.json`` that transformers writes, the weights in float16 (which hold
them exactly), one sequence, its logits and what greedy generation appends to it. Windows and
original context lengths are shorter than the sequence, and biases and norms are random, so that a
detail that is left out shows.
"""

import json
import pathlib
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

# Name -> model type, what differs from `SMALL`.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
  "llama2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
  "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
  "llama_linear": (
    "llama",
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
  ),
  "llama3": (
    "llama",
    {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 16},
  ),
  "mistral": ("mistral", {"sliding_window": 7}),
  "qwen2": (
    "qwen2",
    {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
  ),
  "qwen2_yarn": ("qwen2", {"rope_parameters": YARN_ROPE, "tie_word_embeddings": True}),
  "qwen3": ("qwen3", {"head_dim": 12}),
}


def build(name: str) -> Any:
  """A random model of transformers, in float32 with weights that float16 holds."""
  import torch
  import transformers

  kind, changes = CASES[name]
  config = transformers.AutoConfig.for_model(kind, **(SMALL | changes))
  model = transformers.AutoModelForCausalLM.from_config(
    config, dtype=torch.float32, attn_implementation="eager"
  )
  random = np.random.default_rng(sorted(CASES).index(name))
  with torch.no_grad():
    for parameter_name, parameter in model.named_parameters():
      value = random.standard_normal(tuple(parameter.shape))
      if parameter_name.endswith("norm.weight"):
        value = 1 + 0.2 * value
      elif parameter.ndim == 1:
        value = 0.5 * value
      elif "embed" in parameter_name:
        value = 0.3 * value
      else:
        value = 1.5 * value / parameter.shape[1] ** 0.5
      parameter.copy_(torch.from_numpy(value.astype(np.float16)))
  return model.eval()


def measure(model: Any) -> dict[str, np.ndarray]:
  """Ids, logits and greedy tokens."""
  import torch

  ids = np.random.default_rng(99).integers(0, SMALL["vocab_size"], (1, TIME))
  with torch.no_grad():
    logits = model(torch.from_numpy(ids)).logits
    generated = model.generate(torch.from_numpy(ids), max_new_tokens=NEW, do_sample=False)
  return {"ids": ids, "logits": logits.numpy(), "generated": generated[:, TIME:].numpy()}


def main() -> None:
  FOLDER.mkdir(exist_ok=True)
  for name in CASES:
    model = build(name)
    weights = {k: v.numpy().astype(np.float16) for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
      del weights["lm_head.weight"]
    config = model.config.to_diff_dict()
    np.savez_compressed(
      FOLDER / f"{name}.npz", config=json.dumps(config), **measure(model), **weights
    )


if __name__ == "__main__":
  main()
