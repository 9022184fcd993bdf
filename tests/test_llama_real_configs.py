"""Configurations of models that are in use: they are read, and ask for the tensors those have.

The counts are those of the models that transformers 5.24 makes of the same configurations. The
factors of Phi-4 mini's LongRoPE are left out: 48 numbers each stand in their place.
"""

from typing import Any

import pytest

from optax_lowmem.qlora.families import FAMILIES
from optax_lowmem.qlora.loading.config_files import config_from_hf
from optax_lowmem.qlora.models.llama_config import expected_shapes

SHARED = {
  "attention_bias": False,
  "attention_dropout": 0.0,
  "initializer_range": 0.02,
  "torch_dtype": "bfloat16",
  "use_cache": True,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}

# Name -> the number of parameters, and the file.
MODELS = {
  "gemma-2b": (
    2_506_172_416,
    {
      "bos_token_id": 2,
      "eos_token_id": 1,
      "head_dim": 256,
      "hidden_act": "gelu",
      "hidden_size": 2048,
      "intermediate_size": 16384,
      "max_position_embeddings": 8192,
      "model_type": "gemma",
      "num_attention_heads": 8,
      "num_hidden_layers": 18,
      "num_key_value_heads": 1,
      "pad_token_id": 0,
      "rms_norm_eps": 1e-06,
      "rope_scaling": None,
      "rope_theta": 10000.0,
      "vocab_size": 256000,
    },
  ),
  "gemma-2-9b": (
    9_241_705_984,
    {
      "attn_logit_softcapping": 50.0,
      "bos_token_id": 2,
      "cache_implementation": "hybrid",
      "eos_token_id": 1,
      "final_logit_softcapping": 30.0,
      "head_dim": 256,
      "hidden_act": "gelu_pytorch_tanh",
      "hidden_activation": "gelu_pytorch_tanh",
      "hidden_size": 3584,
      "intermediate_size": 14336,
      "max_position_embeddings": 8192,
      "model_type": "gemma2",
      "num_attention_heads": 16,
      "num_hidden_layers": 42,
      "num_key_value_heads": 8,
      "pad_token_id": 0,
      "query_pre_attn_scalar": 256,
      "rms_norm_eps": 1e-06,
      "rope_theta": 10000.0,
      "sliding_window": 4096,
      "sliding_window_size": 4096,
      "vocab_size": 256000,
    },
  ),
  "gemma-3-1b-it": (
    999_885_952,
    {
      "attn_logit_softcapping": None,
      "cache_implementation": "hybrid",
      "eos_token_id": [1, 106],
      "final_logit_softcapping": None,
      "head_dim": 256,
      "hidden_activation": "gelu_pytorch_tanh",
      "hidden_size": 1152,
      "intermediate_size": 6912,
      "max_position_embeddings": 32768,
      "model_type": "gemma3_text",
      "num_attention_heads": 4,
      "num_hidden_layers": 26,
      "num_key_value_heads": 1,
      "query_pre_attn_scalar": 256,
      "rms_norm_eps": 1e-06,
      "rope_local_base_freq": 10000,
      "rope_scaling": None,
      "rope_theta": 1000000,
      "sliding_window": 512,
      "sliding_window_pattern": 6,
      "vocab_size": 262144,
    },
  ),
  "Phi-3-mini-4k-instruct": (
    3_821_079_552,
    {
      "embd_pdrop": 0.0,
      "hidden_act": "silu",
      "hidden_size": 3072,
      "intermediate_size": 8192,
      "max_position_embeddings": 4096,
      "model_type": "phi3",
      "num_attention_heads": 32,
      "num_hidden_layers": 32,
      "num_key_value_heads": 32,
      "original_max_position_embeddings": 4096,
      "resid_pdrop": 0.0,
      "rms_norm_eps": 1e-05,
      "rope_scaling": None,
      "rope_theta": 10000.0,
      "sliding_window": 2047,
      "tie_word_embeddings": False,
      "vocab_size": 32064,
    },
  ),
  "Phi-4-mini-instruct": (
    3_836_021_760,
    {
      "embd_pdrop": 0.0,
      "full_attn_mod": 1,
      "hidden_act": "silu",
      "hidden_size": 3072,
      "intermediate_size": 8192,
      "interpolate_factor": 1,
      "lm_head_bias": False,
      "max_position_embeddings": 131072,
      "mlp_bias": False,
      "model_type": "phi3",
      "num_attention_heads": 24,
      "num_hidden_layers": 32,
      "num_key_value_heads": 8,
      "original_max_position_embeddings": 4096,
      "partial_rotary_factor": 0.75,
      "resid_pdrop": 0.0,
      "rms_norm_eps": 1e-05,
      "rope_scaling": LONGROPE,
      "rope_theta": 10000.0,
      "sliding_window": 262144,
      "tie_word_embeddings": True,
      "vocab_size": 200064,
    },
  ),
  "SmolLM3-3B": (
    3_075_098_624,
    {
      "eos_token_id": 128012,
      "hidden_act": "silu",
      "hidden_size": 2048,
      "intermediate_size": 11008,
      "layer_types": ["full_attention"] * 36,
      "max_position_embeddings": 65536,
      "max_window_layers": 28,
      "mlp_bias": False,
      "model_type": "smollm3",
      "no_rope_layer_interval": 4,
      "no_rope_layers": [1, 1, 1, 0] * 9,
      "num_attention_heads": 16,
      "num_hidden_layers": 36,
      "num_key_value_heads": 4,
      "pad_token_id": 128004,
      "pretraining_tp": 2,
      "rms_norm_eps": 1e-06,
      "rope_scaling": None,
      "rope_theta": 5000000.0,
      "sliding_window": None,
      "use_sliding_window": False,
      "vocab_size": 128256,
    },
  ),
  "OLMo-2-0425-1B": (
    1_484_916_736,
    {
      "hidden_act": "silu",
      "hidden_size": 2048,
      "intermediate_size": 8192,
      "max_position_embeddings": 4096,
      "model_type": "olmo2",
      "num_attention_heads": 16,
      "num_hidden_layers": 16,
      "num_key_value_heads": 16,
      "rms_norm_eps": 1e-06,
      "rope_scaling": None,
      "rope_theta": 500000,
      "tie_word_embeddings": False,
      "vocab_size": 100352,
    },
  ),
  "granite-3.3-8b": (
    8_170_864_640,
    {
      "attention_multiplier": 0.0078125,
      "embedding_multiplier": 12.0,
      "hidden_act": "silu",
      "hidden_size": 4096,
      "intermediate_size": 12800,
      "logits_scaling": 16.0,
      "max_position_embeddings": 131072,
      "mlp_bias": False,
      "model_type": "granite",
      "num_attention_heads": 32,
      "num_hidden_layers": 40,
      "num_key_value_heads": 8,
      "residual_multiplier": 0.22,
      "rms_norm_eps": 1e-05,
      "rope_scaling": None,
      "rope_theta": 10000000.0,
      "tie_word_embeddings": True,
      "vocab_size": 49159,
    },
  ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_use_has_the_tensors_of_its_configuration(name):
  count, said = MODELS[name]
  config = config_from_hf(SHARED | said)
  assert config.parameter_count() == count
  shapes = expected_shapes(config)
  first = {n.removeprefix("model.layers.0.") for n in shapes if n.startswith("model.layers.0.")}
  last = f"model.layers.{config.num_hidden_layers - 1}."
  assert {n.removeprefix(last) for n in shapes if n.startswith(last)} == first


def test_what_differs_between_them_is_read():
  read = {name: config_from_hf(SHARED | said) for name, (_, said) in MODELS.items()}
  gemma = read["gemma-2b"]
  assert gemma.hidden_act == "gelu_pytorch_tanh" and gemma.tie_word_embeddings
  assert gemma.norm_offset and gemma.embedding_multiplier == 2048**0.5
  gemma2, gemma3 = read["gemma-2-9b"], read["gemma-3-1b-it"]
  assert gemma2.windows == (4096, None) * 21 and gemma2.embedding_multiplier == 3584**0.5
  assert [i for i, window in enumerate(gemma3.windows) if window is None] == [5, 11, 17, 23]
  assert (gemma3.rope_theta, gemma3.rope_local_theta) == (1e6, 1e4)
  phi4: Any = read["Phi-4-mini-instruct"]
  assert phi4.rotary_dim == 96 and phi4.rope_scaling.magnitude == pytest.approx(1.1902380714)
  assert read["Phi-3-mini-4k-instruct"].windows == (2047,) * 32
  assert read["SmolLM3-3B"].unrotated == (False, False, False, True) * 9
  assert read["granite-3.3-8b"].attention_scale == 1 / 128


def test_every_family_is_registered_under_its_name_and_makes_a_model():
  sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 4}
  for name, family in FAMILIES.items():
    assert family.model_type == name
    config = config_from_hf(sizes | {"num_attention_heads": 32, "model_type": name})
    assert config.num_hidden_layers == 4 and config.vocab_size == 32
