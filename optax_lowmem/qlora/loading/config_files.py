"""Reads a `LlamaConfig` from a Hugging Face ``config.json``, and writes one.

A configuration that asks for something this model does not compute is refused by name. A feature
that is ignored gives plausible text and wrong numbers, which is worse than an error. So is a key
that nobody here has heard of: `HARMLESS_KEYS` are those that are known not to change the function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from optax_lowmem.qlora.families import FAMILIES, Family
from optax_lowmem.qlora.models.llama_config import LlamaConfig, check_size

REQUIRED_KEYS = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
)

# Where null does not mean what an absent key means.
NULLABLE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")

# Key -> the values that mean what is computed here, for the families that do not read the key.
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
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
READ_KEYS = (*REQUIRED_KEYS, *ROPE_KEYS, *DEFAULTS, "model_type")

# What follows does not change what the model computes: names and versions; which tokens are
# special; how weights were made, and dropout, which acts in training only (here only the adapters
# have one); how Hugging Face computes and returns it; generation's settings, which old files keep
# here; and what SmolLM3's and Gemma 2's files hold and Hugging Face does not read. Keys that begin
# with an underscore are ignored too, unless a family reads them.
HARMLESS_KEYS = frozenset(
  "architectures auto_map dtype torch_dtype transformers_version transformers.js_config "
  "unsloth_version unsloth_fixed is_llama_config tokenizer_class name_or_path "
  "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id "
  "initializer_range attention_dropout resid_pdrop embd_pdrop pretraining_tp tie_encoder_decoder "
  "use_cache cache_implementation attn_implementation return_dict output_hidden_states "
  "output_attentions torchscript use_bfloat16 chunk_size_feed_forward is_decoder "
  "cross_attention_hidden_size tf_legacy_loss "
  "id2label label2id num_labels problem_type finetuning_task task_specific_params prefix "
  "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
  "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
  "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
  "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
  "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
  "max_window_layers sliding_window_size".split()
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
    ValueError: `model_type` is 'gpt2'; supported: 'llama', 'mistral', 'qwen2', 'qwen3', ...
  """
  kind = config.get("model_type")
  family = FAMILIES.get(str(kind))
  if family is None:
    hint = ""
    if f"{kind}_text" in FAMILIES:
      hint = f" Of a model of images and text, save the language model alone, a '{kind}_text'."
    known = ", ".join(map(repr, FAMILIES))
    raise ValueError(f"`model_type` is {kind!r}; supported: {known}.{hint}")
  _check_keys(config, family)

  sizes = {key: config[key] for key in REQUIRED_KEYS}
  for key, value in sizes.items():
    check_size(key, value)
  read = dict(config)
  for key, default in {**DEFAULTS, **family.defaults}.items():
    if config.get(key) is None and not (key in NULLABLE and key in config):
      read[key] = default
  heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
  if read["head_dim"] is None and hidden % heads:
    raise ValueError(
      f"`hidden_size` ({hidden}) is not a multiple of `num_attention_heads` ({heads}) "
      "and config.json has no `head_dim`."
    )
  for key, default in {"head_dim": hidden // heads, "num_key_value_heads": heads}.items():
    sizes[key] = default if read[key] is None else read[key]
  check_size("max_position_embeddings", read["max_position_embeddings"])
  shared = {key: read[key] for key in ("max_position_embeddings", *DEFAULTS)}
  return LlamaConfig(**sizes, **shared, **family.rope(read), **family.options(read))


def _check_keys(config: Mapping[str, Any], family: Family) -> None:
  missing = [key for key in REQUIRED_KEYS if config.get(key) is None]
  if missing:
    raise ValueError(f"config.json lacks {', '.join(missing)}.")
  known = {*family.defaults, *READ_KEYS, *HARMLESS_KEYS}
  for key, value in config.items():
    if value is None or key in known or key[0] == "_":
      continue
    supported = {**ONLY_SUPPORTED, **family.supported}.get(key)
    if supported is None:
      raise ValueError(
        f"`{key}` is {value!r}, a key that is not known for a {family.model_type}. If it "
        "does not change what the model computes, delete it from config.json."
      )
    if value not in supported:
      wanted = " or ".join(repr(each) for each in supported) or "no such key"
      raise ValueError(f"`{key}` is {value!r}, which is not supported; needs {wanted}.")


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
  """The dictionary of a ``config.json`` from which `config_from_hf` reads the same again.

  Raises:
    ValueError: where the model is not one of the plain kinds.
  """
  kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
  names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
  plain = {"max_position_embeddings", "rope_theta", *REQUIRED_KEYS, *DEFAULTS}
  plain |= {"num_key_value_heads", "head_dim"}
  sizes = {key: getattr(config, key) for key in sorted(plain)}
  written = {"model_type": kind, "architectures": [names[kind]], "hidden_act": "silu", **sizes}
  windows = config.windows if any(config.windows) else ()
  if config_from_hf(written) != dataclasses.replace(config, windows=windows):
    raise ValueError(
      "No config.json is written for a model with rope scaling, sliding windows, unusual biases or "
      "another family's options. Take that of its Hugging Face directory."
    )
  return written
