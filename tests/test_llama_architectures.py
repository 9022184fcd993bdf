"""Each family of models: the example's model against that of transformers."""

import dataclasses
import doctest
import functools
import json
import sys
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optax_lowmem as lowmem
from conftest import GOLDEN
from optax_lowmem import nn
from optax_lowmem.qlora.loading import config_files, gguf_files
from optax_lowmem.qlora.loading.config_files import config_from_hf, config_to_hf
from optax_lowmem.qlora.loading.llama import abstract_llama, load_llama
from optax_lowmem.qlora.loading.weights import expected_shapes, open_checkpoint
from optax_lowmem.qlora.models import rope_scaling, scores
from optax_lowmem.qlora.models.llama_config import linear_shapes

sys.path.insert(0, str(GOLDEN))
import make_llama
from make_llama import CASES
from make_llama import read as read_case
from make_llama import save_directory as save_case

STORED = {path.stem: path for path in sorted((GOLDEN / "llama").glob("*.npz"))}


@nnx.jit
def logits_of(model, ids):
  return model(ids)


def test_every_case_is_stored():
  assert set(STORED) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(tmp_path, name):
  config, weights, measured = read_case(name)
  model = load_llama(save_case(tmp_path, config, weights))
  logits = logits_of(model, measured["ids"])
  # 1e-4 is what is promised; measured 1.1e-5 at most, of logits up to 7.
  np.testing.assert_allclose(logits, measured["logits"], rtol=0, atol=1e-4)


# What would go unnoticed if a detail were left out: each change must show in the logits.
@pytest.mark.parametrize(
  ("name", "field", "value"),
  [
    ("llama_linear", "rope_scaling", None),
    ("llama3", "rope_scaling", None),
    ("llama3", "rope_scaling", rope_scaling.Linear(8.0)),
    ("qwen2_yarn", "rope_scaling", None),
    ("qwen2_yarn", "rope_scaling", rope_scaling.Linear(4.0)),
    ("mistral", "windows", ()),
    ("mistral", "windows", (6, 6)),
    ("qwen2", "windows", (5, 5)),
    ("qwen3", "rms_norm_eps", 1e-2),
    ("gemma", "norm_offset", False),
    ("gemma", "hidden_act", "silu"),
    ("gemma", "embedding_multiplier", 1.0),
    ("gemma2", "windows", ()),
    ("gemma2", "windows", (None, 5)),
    ("gemma2", "hidden_act", "silu"),
    ("gemma2", "norm_offset", False),
    ("gemma2", "attention_scale", None),
    ("gemma2", "attn_logit_softcapping", None),
    ("gemma2", "final_logit_softcapping", None),
    ("gemma2", "embedding_multiplier", 1.0),
    ("gemma3", "windows", (5, 5)),
    ("gemma3", "rope_local_theta", None),
    ("gemma3", "rope_scaling", None),
    ("phi3", "windows", ()),
    ("phi3_long", "rope_scaling", None),
    ("smollm3", "unrotated", ()),
    ("smollm3", "windows", ()),
    ("olmo2", "rms_norm_eps", 1e-2),
    ("granite", "embedding_multiplier", 1.0),
    ("granite", "residual_multiplier", 1.0),
    ("granite", "attention_scale", None),
    ("granite", "logits_scaling", 1.0),
  ],
)
def test_each_detail_matters(tmp_path, name, field, value):
  config, weights, measured = read_case(name)
  checkpoint = open_checkpoint(save_case(tmp_path, config, weights))
  changed = dataclasses.replace(checkpoint.config, **{field: value})
  logits = logits_of(load_llama(dataclasses.replace(checkpoint, config=changed)), measured["ids"])
  assert np.abs(logits - measured["logits"]).max() > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_transformers_itself(tmp_path, name):
  """As above, with the installed transformers and what it writes."""
  pytest.importorskip("torch", reason="compares with transformers, which needs torch")
  pytest.importorskip("transformers", reason="compares with transformers")
  peer = make_llama.build(name)
  peer.save_pretrained(tmp_path)
  measured = make_llama.measure(peer)
  model = load_llama(tmp_path)
  np.testing.assert_allclose(
    logits_of(model, measured["ids"]), measured["logits"], rtol=0, atol=1e-4
  )


def test_longrope_has_other_factors_for_short_rows(tmp_path):
  config, weights, measured = read_case("phi3_long")
  model = load_llama(save_case(tmp_path, config, weights))
  scaling: Any = model.config.rope_scaling
  short, long = (rope_scaling.Divided(f, scaling.magnitude) for f in (
    scaling.short_factor, scaling.long_factor))  # fmt: skip
  assert scaling.at(16) == short and scaling.at(17) == long
  checkpoint = open_checkpoint(tmp_path)

  def of(scaling):
    changed = dataclasses.replace(checkpoint.config, rope_scaling=scaling)
    return load_llama(dataclasses.replace(checkpoint, config=changed))

  ids = measured["ids"][:, :16]
  np.testing.assert_array_equal(logits_of(model, ids), logits_of(of(short), ids))
  # A cache holds to what its slots ask for, so that no key in it is turned in another way.
  read = nnx.jit(lambda model, ids, cache: model.head(model.extend(ids, cache)[0]))
  for slots, same in ((16, short), (17, long)):
    got = read(model, ids, model.init_cache(1, slots))
    np.testing.assert_allclose(got, logits_of(of(same), ids), rtol=0, atol=2e-5)


def test_longrope_of_short_rows_is_that_of_transformers(tmp_path):
  torch = pytest.importorskip("torch", reason="compares with transformers, which needs torch")
  pytest.importorskip("transformers", reason="compares with transformers")
  peer = make_llama.build("phi3_long")
  peer.save_pretrained(tmp_path)
  ids = read_case("phi3_long")[2]["ids"][:, :16]
  with torch.no_grad():
    expected = peer(torch.from_numpy(ids)).logits.numpy()
  np.testing.assert_allclose(logits_of(load_llama(tmp_path), ids), expected, rtol=0, atol=1e-4)


def test_old_configurations_say_the_same():
  for name in ("llama3", "llama_linear", "qwen2_yarn"):
    config, _, _ = read_case(name)
    old = {k: v for k, v in config.items() if k not in ("rope_parameters", "layer_types")}
    rope = dict(config["rope_parameters"])
    old["rope_theta"], rope["type"] = rope.pop("rope_theta"), rope.pop("rope_type")
    assert config_from_hf(old | {"rope_scaling": rope}) == config_from_hf(config)
  config, _, _ = read_case("qwen2")
  del config["layer_types"]
  assert config_from_hf(config).windows == (None, 5)

  new = read_case("gemma3")[0]
  old = {k: v for k, v in new.items() if k not in ("rope_parameters", "layer_types")}
  old |= {"sliding_window_pattern": 2, "rope_theta": 1000.0, "rope_local_base_freq": 50.0}
  old |= {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
  assert config_from_hf(old) == config_from_hf(new)
  del old["sliding_window_pattern"]
  assert config_from_hf(old | {"_sliding_window_pattern": 2}) == config_from_hf(new)
  for model_type, key in (("gemma2", "layer_types"), ("smollm3", "layer_types")):
    new = read_case(model_type)[0]
    assert config_from_hf(new | {key: None}) == config_from_hf(new)
  new = read_case("phi3_long")[0]
  old = {k: v for k, v in new.items() if k != "rope_parameters"}
  rope = {k: v for k, v in new["rope_parameters"].items() if k.endswith("_factor")}
  rope, part = {"type": "su"} | rope, rope.pop("partial_rotary_factor")
  old |= {"rope_theta": 100.0, "rope_scaling": rope, "partial_rotary_factor": part}
  assert config_from_hf(old) == config_from_hf(new)


@pytest.mark.parametrize("name", CASES)
def test_a_written_configuration_is_read_again_or_refused(name):
  config = config_from_hf(read_case(name)[0])
  plain = ("llama", "qwen2", "qwen3")
  unusual = config.rope_scaling or any(config.windows) or config.o_bias or config.mlp_bias
  if unusual or read_case(name)[0]["model_type"] not in plain:
    with pytest.raises(ValueError, match="Hugging Face directory"):
      config_to_hf(config)
  else:
    again = config_from_hf(json.loads(json.dumps(config_to_hf(config))))
    assert again == dataclasses.replace(config, windows=())


def test_defaults_are_those_of_each_type():
  sizes = {
    "vocab_size": 64,
    "hidden_size": 4096,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
  }
  mistral = config_from_hf(sizes | {"model_type": "mistral"})
  assert mistral.num_key_value_heads == 8 and mistral.windows == (4096, 4096)
  assert config_from_hf(sizes | {"model_type": "mistral", "sliding_window": None}).windows == ()
  qwen2 = config_from_hf(sizes | {"model_type": "qwen2", "hidden_size": 2048})
  assert qwen2.head_dim == 64 and qwen2.qkv_bias and not qwen2.o_bias and not qwen2.windows
  qwen3 = config_from_hf(sizes | {"model_type": "qwen3", "hidden_size": 1024})
  assert qwen3.head_dim == 128 and qwen3.qk_norm and not qwen3.qkv_bias
  original = {"original_max_position_embeddings": 9, "rope_scaling": LLAMA3_ROPE}
  llama: Any = config_from_hf(sizes | {"model_type": "llama"} | original)
  assert llama.rope_scaling.original_max_position_embeddings == 9
  gemma2 = config_from_hf(sizes | {"model_type": "gemma2"})
  assert gemma2.windows == (4096, None) and gemma2.tie_word_embeddings and gemma2.head_dim == 256
  assert gemma2.attn_logit_softcapping == 50 and gemma2.attention_scale == 1 / 16
  assert gemma2.embedding_multiplier == 64 and gemma2.final_logit_softcapping == 30
  nothing = {"attn_logit_softcapping": None}
  assert config_from_hf(sizes | {"model_type": "gemma2"} | nothing).attn_logit_softcapping is None
  gemma3 = config_from_hf(sizes | {"model_type": "gemma3_text", "num_hidden_layers": 6})
  assert gemma3.windows == (4096,) * 5 + (None,) and gemma3.final_logit_softcapping is None
  assert (gemma3.rope_theta, gemma3.rope_local_theta) == (1e6, 1e4)
  smollm3 = config_from_hf(sizes | {"model_type": "smollm3", "num_hidden_layers": 5})
  assert smollm3.unrotated == (False, False, False, True, False) and not smollm3.windows
  assert smollm3.rope_theta == 2e6 and smollm3.num_key_value_heads == 4
  phi3 = config_from_hf(sizes | {"model_type": "phi3"})
  assert phi3.fused_linears and phi3.rms_norm_eps == 1e-5 and phi3.num_key_value_heads == 32
  olmo2 = config_from_hf(sizes | {"model_type": "olmo2"})
  assert olmo2.rms_norm_eps == 1e-5 and olmo2.norms.before_attention is None
  granite = config_from_hf(sizes | {"model_type": "granite"})
  assert granite.attention_scale == 1 and granite.logits_scaling == 1


# --- quantized, with adapters, abstract -----------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_biases", "qwen2", "qwen3", "gemma2", "phi3"])
def test_quantized_linears_keep_their_biases(tmp_path, name):
  config, weights, measured = read_case(name)
  save_case(tmp_path, config, weights)
  model = load_llama(tmp_path, "nf4")
  assert nnx.graphdef(abstract_llama(model.config, "nf4")) == nnx.graphdef(model)
  for linear in linear_shapes(model.config):
    module: Any = functools.reduce(getattr, linear.split("."), model.model.layers)
    named = [f"model.layers.{i}.{linear}.bias" for i in range(2)]
    if named[0] in weights:
      for got, stored in zip(module.bias[...], named, strict=True):
        np.testing.assert_array_equal(got, weights[stored])
    else:
      assert module.bias is None
  # Same bits in weights that are not packed: nothing but the codes makes the difference.
  dense = {
    k: packed_and_back(w) if k.endswith("_proj.weight") else w.astype(np.float32)
    for k, w in weights.items()
  }
  expected = logits_of(load_llama(save_case(tmp_path / "dense", config, dense)), measured["ids"])
  np.testing.assert_allclose(logits_of(model, measured["ids"]), expected, rtol=0, atol=2e-5)
  assert np.abs(expected - measured["logits"]).max() > 0.05


def packed_and_back(weight):
  q = lowmem.quantize(jnp.asarray(weight, jnp.float32), "nf4", 64, double_quantize=True)
  return np.asarray(q.dequantize())


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_adapters_on_biased_linears_learn_and_merge(tmp_path, quantize):
  config, weights, measured = read_case("llama_biases")
  model = load_llama(save_case(tmp_path, config, weights), quantize)
  before = logits_of(model, measured["ids"])
  model = nn.add_lora(model, 4, 8, r".*_proj", rngs=nnx.Rngs(0))
  np.testing.assert_allclose(logits_of(model, measured["ids"]), before, rtol=0, atol=1e-6)

  @nnx.jit
  @nnx.grad(argnums=nnx.DiffState(0, nnx.LoRAParam))
  def slopes(model):
    return (model(measured["ids"]) ** 2).sum()

  moved = jax.tree.map(lambda w, g: w - 1e-3 * g, nnx.state(model, nnx.LoRAParam), slopes(model))
  nnx.update(model, moved)
  after = logits_of(model, measured["ids"])
  assert np.abs(after - before).max() > 0.1
  merged = logits_of(nn.merge_lora(model), measured["ids"])
  np.testing.assert_allclose(merged, after, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_abstract_model_and_count(tmp_path, name):
  config, weights, _ = read_case(name)
  model = load_llama(save_case(tmp_path, config, weights))
  assert nnx.graphdef(abstract_llama(model.config)) == nnx.graphdef(model)
  leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
  assert sum(leaf.size for leaf in leaves) == model.config.parameter_count()
  assert {k: v.shape for k, v in weights.items()} == expected_shapes(model.config)


# --- GGUF -----------------------------------------------------------------------------------------


def write_gguf(
  path, config, weights, architecture, factors=None, linear=None, kind: type = np.float16
):
  """As llama.cpp's converter writes it: q and k permuted for "llama" only."""
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_block_count(config.num_hidden_layers)
  writer.add_context_length(config.max_position_embeddings)
  writer.add_embedding_length(config.hidden_size)
  writer.add_feed_forward_length(config.intermediate_size)
  writer.add_head_count(config.num_attention_heads)
  writer.add_head_count_kv(config.num_key_value_heads)
  if config.head_dim * config.num_attention_heads != config.hidden_size:
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_layer_norm_rms_eps(config.rms_norm_eps)
  if linear:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(linear)
  model_arch = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture]
  names = gguf.get_tensor_name_map(model_arch, config.num_hidden_layers)
  if factors is not None:
    writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
  for name, weight in weights.items():
    if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
      halves = weight.reshape(-1, 2, config.head_dim // 2, *weight.shape[1:])
      weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
    dtype = np.float32 if weight.ndim == 1 else kind
    stored = names.get_name(name, (".weight", ".bias"))
    assert stored is not None, name
    writer.add_tensor(stored, weight.astype(dtype))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


GGUF_CASES = {
  "llama2": "llama",
  "llama_biases": "llama",
  "llama_linear": "llama",
  "llama3": "llama",
  "qwen3": "qwen3",
}


@pytest.mark.parametrize("name", GGUF_CASES)
def test_gguf_gives_the_logits_of_transformers(tmp_path, name):
  stored, weights, measured = read_case(name)
  config, extra = config_from_hf(stored), {}
  scaling: Any = config.rope_scaling
  if name == "llama3":  # the converter writes how much each frequency is divided by
    plain = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    extra["factors"] = plain / scaling(plain, config.rope_theta)
    config = dataclasses.replace(config, rope_scaling=None)
  if name == "llama_linear":
    extra["linear"] = scaling.factor
  write_gguf(tmp_path / "model.gguf", config, weights, GGUF_CASES[name], **extra)
  model = load_llama(tmp_path / "model.gguf")
  logits = logits_of(model, measured["ids"])
  np.testing.assert_allclose(logits, measured["logits"], rtol=0, atol=2e-5)


def test_gguf_of_qwen2_has_biases_and_is_not_permuted(tmp_path):
  stored, weights, measured = read_case("qwen2")
  stored |= {"use_sliding_window": False, "layer_types": None}  # GGUF files hold no windows
  expected = logits_of(load_llama(save_case(tmp_path, stored, weights)), measured["ids"])
  write_gguf(tmp_path / "model.gguf", config_from_hf(stored), weights, "qwen2")
  logits = logits_of(load_llama(tmp_path / "model.gguf"), measured["ids"])
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_gguf_of_other_families_is_refused_and_their_directory_is_asked_for():
  for kind in ("gemma2", "phi3", "granite"):
    metadata = {"general.architecture": kind}
    with pytest.raises(ValueError, match=f"is '{kind}'.*Give the Hugging Face directory"):
      gguf_files.config_from_gguf(metadata, tied=True, vocab_size=8)


# --- refusals -------------------------------------------------------------------------------------

LLAMA3_ROPE = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
}


LINEAR = {"rope_type": "linear", "factor": 2.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.0, 2.0]}


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("qwen3", {"mlp_bias": True}, "`mlp_bias` is True, which is not supported"),
    ("qwen2", {"attention_bias": True}, "`attention_bias` is True"),
    ("llama2", {"sliding_window": 8}, "`sliding_window` is 8"),
    ("llama2", {"logit_scale": 2.0}, "`logit_scale` is 2.0, a key that is not known for a llama"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "`layer_types` is"),
    ("mistral", {"sliding_window": 0}, "`windows` must be a positive integer, got 0"),
    ("qwen2", {"layer_types": ["full_attention"]}, "`layer_types` must name .* of 2 layers"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "got .'chunked_attention'"),
    ("qwen2", {"use_sliding_window": False}, "'sliding_attention', but there is no"),
    ("qwen2", {"use_mrope": True}, "`use_mrope` is True"),
    ("llama2", {"rope_parameters": {"rope_type": "longrope"}}, "lacks short_factor, long_factor"),
    ("llama2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2}}, "'dynamic'"),
    ("llama2", {"rope_parameters": {"rope_type": "linear"}}, "'linear' lacks factor"),
    ("llama2", {"rope_parameters": {"factor": 2.0}}, "'default' has unknown keys: factor"),
    ("llama2", {"rope_parameters": LLAMA3_ROPE | {"factor": -1}}, "`factor` must be a positive"),
    ("llama2", {"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 5}}, "must be above"),
    ("llama2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "`partial_rotary_factor`"),
    ("llama2", {"model_type": "gemma3"}, "save the language model alone, a 'gemma3_text'"),
    ("gemma2", {"use_bidirectional_attention": True}, "`use_bidirectional_attention` is True"),
    ("gemma2", {"hidden_activation": "relu"}, "`hidden_act` must be one of silu, gelu"),
    ("gemma2", {"attn_logit_softcapping": -1.0}, "`attn_logit_softcapping` must be a positive"),
    ("gemma3", {"rope_parameters": {"sliding_attention": LINEAR}}, "scale the layers with 'slid"),
    ("phi3", {"attention_bias": True}, "`attention_bias` is True"),
    ("phi3_long", {"partial_rotary_factor": 0.4, "rope_parameters": LINEAR}, "must leave an even"),
    ("phi3_long", {"rope_parameters": LONGROPE}, "has 2 factors, but 8 numbers of a head"),
    ("phi3_long", {"rope_parameters": LONGROPE | {"long_factor": 3}}, "`long_factor` must be a l"),
    ("smollm3", {"no_rope_layers": [1]}, "`no_rope_layers` must hold 0 or 1 for each of 2"),
    ("granite", {"logits_scaling": 0}, "`logits_scaling` must be a positive number, got 0"),
    ("granite", {"position_embedding_type": "nope"}, "a key that is not known for a granite"),
  ],
)
def test_what_is_not_computed_is_refused(name, changes, message):
  config, _, _ = read_case(name)
  with pytest.raises(ValueError, match=message):
    config_from_hf(config | changes)


@pytest.mark.parametrize("module", [config_files, gguf_files, rope_scaling, scores])
def test_examples_in_docstrings(module):
  failed, attempted = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
  assert attempted > 0 and failed == 0
