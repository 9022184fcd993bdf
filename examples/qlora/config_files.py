"""Reads a `LlamaConfig` from a Hugging Face ``config.json``, and writes one.

A configuration that asks for something this model does not compute is refused by name. A feature
that is ignored gives plausible text and wrong numbers, which is worse than an error. So is a key
that nobody here has heard of: `HARMLESS_KEYS` are those that are known not to change the function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama_config import LlamaConfig, check_size
from rope_scaling import rope_scaling_from_hf

REQUIRED_KEYS = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
)

# Model type -> what Hugging Face takes where a key is absent. None: from other keys.
DEFAULTS: dict[str, dict[str, Any]] = {
  "llama": {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
  },
  "mistral": {
    "num_key_value_heads": 8,
    "head_dim": None,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
  },
  "qwen2": {
    "num_key_value_heads": 32,
    "head_dim": None,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
  },
  "qwen3": {
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
  },
}

# Key -> the values that mean what is computed here, for the types that do not read the key.
# A key that is absent or null is fine.
ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
  "hidden_act": ("silu", "swish"),
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "sliding_window": (),
  "use_sliding_window": (False,),
  "partial_rotary_factor": (1,),
  "rope_interleaved": (False,),
  "use_mrope": (False,),
  "quantization_config": (),
  "is_encoder_decoder": (False,),
  "add_cross_attention": (False,),
  "pruned_heads": ({},),
}

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
READ_KEYS = (*REQUIRED_KEYS, *ROPE_KEYS, "model_type", "rms_norm_eps", "tie_word_embeddings")

# What follows does not change what the model computes: names and versions; which tokens are
# special; how weights were made, and dropout of attention, which acts in training only (here there
# is none); how Hugging Face computes and returns it; and generation's settings, which old files
# keep here. Keys that begin with an underscore are ignored too.
HARMLESS_KEYS = frozenset(
  "architectures auto_map dtype torch_dtype transformers_version transformers.js_config "
  "unsloth_version unsloth_fixed is_llama_config tokenizer_class name_or_path "
  "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id "
  "initializer_range attention_dropout pretraining_tp tie_encoder_decoder "
  "use_cache attn_implementation return_dict output_hidden_states output_attentions torchscript "
  "use_bfloat16 chunk_size_feed_forward is_decoder cross_attention_hidden_size tf_legacy_loss "
  "id2label label2id num_labels problem_type finetuning_task task_specific_params prefix "
  "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
  "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
  "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
  "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
  "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens".split()
)


def config_from_hf(config: Mapping[str, Any]) -> LlamaConfig:
  """Reads the dictionary of a Hugging Face ``config.json``.

  Args:
    config: the parsed file. Absent optional keys take Hugging Face's defaults for the type.

  Returns:
    The configuration.

  Raises:
    ValueError: if the architecture is another one, if a required key is missing, or if the
      configuration asks for a feature that is not computed, or has a key that is not known.

  Example:
    >>> config_from_hf({"model_type": "gpt2"})
    Traceback (most recent call last):
    ...
    ValueError: `model_type` is 'gpt2'; supported: 'llama', 'mistral', 'qwen2', 'qwen3'.
  """
  kind = config.get("model_type")
  if kind not in DEFAULTS:
    raise ValueError(f"`model_type` is {kind!r}; supported: {', '.join(map(repr, DEFAULTS))}.")
  defaults = DEFAULTS[kind]
  _check_keys(config, defaults)

  values = {key: config[key] for key in REQUIRED_KEYS}
  for key, value in values.items():
    check_size(key, value)
  read = {k: v if config.get(k) is None else config[k] for k, v in defaults.items()}
  heads, hidden = values["num_attention_heads"], values["hidden_size"]
  if read["head_dim"] is None and hidden % heads:
    raise ValueError(
      f"`hidden_size` ({hidden}) is not a multiple of `num_attention_heads` ({heads}) "
      "and config.json has no `head_dim`."
    )
  values["head_dim"] = hidden // heads if read["head_dim"] is None else read["head_dim"]
  values["num_key_value_heads"] = (
    heads if read["num_key_value_heads"] is None else read["num_key_value_heads"]
  )
  values["max_position_embeddings"] = read["max_position_embeddings"]
  check_size("max_position_embeddings", values["max_position_embeddings"])
  for key, default in {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}.items():
    values[key] = default if config.get(key) is None else config[key]
  bias = read.get("attention_bias", False)
  return LlamaConfig(
    **values,
    **_rope(config, values["max_position_embeddings"]),
    windows=_windows(config, read, values["num_hidden_layers"]),
    qkv_bias=True if kind == "qwen2" else bias,
    o_bias=bias,
    mlp_bias=read.get("mlp_bias", False),
    qk_norm=kind == "qwen3",
  )


def _check_keys(config: Mapping[str, Any], read: Mapping[str, Any]) -> None:
  missing = [key for key in REQUIRED_KEYS if config.get(key) is None]
  if missing:
    raise ValueError(f"config.json lacks {', '.join(missing)}.")
  for key, value in config.items():
    if value is None or key in read or key in READ_KEYS or key in HARMLESS_KEYS or key[0] == "_":
      continue
    supported = ONLY_SUPPORTED.get(key)
    if supported is None:
      raise ValueError(
        f"`{key}` is {value!r}, a key that is not known for a {config['model_type']}. If it "
        "does not change what the model computes, delete it from config.json."
      )
    if value not in supported:
      wanted = " or ".join(repr(each) for each in supported) or "no such key"
      raise ValueError(f"`{key}` is {value!r}, which is not supported; needs {wanted}.")


def _rope(config: Mapping[str, Any], longest: int) -> dict[str, Any]:
  # transformers 5 writes `rope_parameters`; before that, `rope_theta` and `rope_scaling`.
  rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
  if rope.get("partial_rotary_factor") not in (None, 1):
    raise ValueError("`partial_rotary_factor` other than 1 is not supported.")
  if (original := config.get("original_max_position_embeddings")) is not None:
    check_size("original_max_position_embeddings", original)
    rope.pop("original_max_position_embeddings", None)  # in transformers too, the outer one wins
    longest = original
  theta = rope.get("rope_theta", config.get("rope_theta"))
  return {
    "rope_theta": 10000.0 if theta is None else theta,
    "rope_scaling": rope_scaling_from_hf(rope, longest),
  }


def _windows(
  config: Mapping[str, Any], read: Mapping[str, Any], layers: int
) -> tuple[int | None, ...]:
  """Each layer's window; Hugging Face's window counts the token itself, as here."""
  if "sliding_window" not in read:
    return ()
  window = read["sliding_window"]
  if "sliding_window" in config and config["sliding_window"] is None:
    window = None  # null means no window, unlike an absent key
  if not read.get("use_sliding_window", True):
    window = None
  types = read.get("layer_types")
  if types is None:
    first = read.get("max_window_layers", 0)
    types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if window is None:
      return ()
  if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
    raise ValueError(
      f"`layer_types` must name 'full_attention' or 'sliding_attention' for each of {layers} "
      f"layers, got {types!r}."
    )
  if "sliding_attention" not in types:
    return ()
  if window is None:
    raise ValueError("`layer_types` names 'sliding_attention', but there is no `sliding_window`.")
  return tuple(window if kind == "sliding_attention" else None for kind in types)


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
  """The dictionary of a ``config.json`` from which `config_from_hf` reads the same again.

  Raises:
    ValueError: where the model is not one of the plain kinds.
  """
  if config.rope_scaling or any(config.windows) or config.o_bias or config.mlp_bias:
    raise ValueError(
      "No config.json is written for a model with rope scaling, sliding windows or unusual biases. "
      "Take that of its Hugging Face directory."
    )
  kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
  names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
  plain = ("rope_scaling", "windows", "qkv_bias", "o_bias", "mlp_bias", "qk_norm")
  sizes = {k: v for k, v in dataclasses.asdict(config).items() if k not in plain}
  return {"model_type": kind, "architectures": [names[kind]], "hidden_act": "silu", **sizes}
