"""Llama 2 and 3, Mistral, Qwen 2 and 3: the example's model against that of transformers."""

import dataclasses
import doctest
import functools
import json
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import config_files
import gguf_files
import optax_lowmem as lowmem
import rope_scaling
from config_files import config_from_hf, config_to_hf
from conftest import GOLDEN
from llama import LINEARS, abstract_llama, load_llama
from optax_lowmem import nn
from weights import expected_shapes, open_checkpoint

sys.path.insert(0, str(GOLDEN))
import make_llama
from make_llama import CASES

STORED = {path.stem: path for path in sorted((GOLDEN / "llama").glob("*.npz"))}


@nnx.jit
def logits_of(model, ids):
  return model(ids)


def read_case(name):
  stored = dict(np.load(STORED[name]))
  config = json.loads(str(stored.pop("config")))
  measured = {key: stored.pop(key) for key in ("ids", "logits", "generated")}
  return config, stored, measured


def save_case(folder, config, weights):
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  save_file(weights, folder / "model.safetensors")
  return folder


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


@pytest.mark.parametrize("name", CASES)
def test_a_written_configuration_is_read_again_or_refused(name):
  config = config_from_hf(read_case(name)[0])
  if config.rope_scaling or any(config.windows) or config.o_bias or config.mlp_bias:
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
  llama = config_from_hf(sizes | {"model_type": "llama"} | original)
  assert llama.rope_scaling.original_max_position_embeddings == 9


# --- quantized, with adapters, abstract -----------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_biases", "qwen2", "qwen3"])
def test_quantized_linears_keep_their_biases(tmp_path, name):
  config, weights, measured = read_case(name)
  save_case(tmp_path, config, weights)
  model = load_llama(tmp_path, "nf4")
  assert nnx.graphdef(abstract_llama(model.config, "nf4")) == nnx.graphdef(model)
  for linear in LINEARS:
    module = functools.reduce(getattr, linear.split("."), model.model.layers)
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


def write_gguf(path, config, weights, architecture, factors=None, linear=None):
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
    kind = np.float32 if weight.ndim == 1 else np.float16
    writer.add_tensor(names.get_name(name, (".weight", ".bias")), weight.astype(kind))
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
  if name == "llama3":  # the converter writes how much each frequency is divided by
    plain = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    extra["factors"] = plain / config.rope_scaling(plain, config.rope_theta)
    config = dataclasses.replace(config, rope_scaling=None)
  if name == "llama_linear":
    extra["linear"] = config.rope_scaling.factor
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


# --- refusals -------------------------------------------------------------------------------------

LLAMA3_ROPE = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
}


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
    ("llama2", {"rope_parameters": {"rope_type": "longrope"}}, "'longrope' is not supported"),
    ("llama2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2}}, "'dynamic'"),
    ("llama2", {"rope_parameters": {"rope_type": "linear"}}, "'linear' lacks factor"),
    ("llama2", {"rope_parameters": {"factor": 2.0}}, "'default' has unknown keys: factor"),
    ("llama2", {"rope_parameters": LLAMA3_ROPE | {"factor": -1}}, "`factor` must be a positive"),
    ("llama2", {"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 5}}, "must be above"),
    ("llama2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "`partial_rotary_factor`"),
  ],
)
def test_what_is_not_computed_is_refused(name, changes, message):
  config, _, _ = read_case(name)
  with pytest.raises(ValueError, match=message):
    config_from_hf(config | changes)


@pytest.mark.parametrize("module", [config_files, gguf_files, rope_scaling])
def test_examples_in_docstrings(module):
  failed, attempted = doctest.testmod(module)
  assert attempted > 0 and failed == 0
