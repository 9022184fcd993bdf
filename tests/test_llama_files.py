"""The files a Llama is loaded from: safetensors, GGUF, and everything that can be wrong in them."""

import dataclasses
import json
import shutil

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from conftest import GOLDEN
from optax_lowmem.qlora.loading.config_files import config_from_hf
from optax_lowmem.qlora.loading.llama import load_llama
from optax_lowmem.qlora.loading.weights import open_checkpoint

BASE = GOLDEN / "peft" / "base"


def write_gguf(path, weights, config, omit=(), architecture="llama", add=None, **extra):
  """Writes a GGUF file as llama.cpp's converter would, q and k permuted."""
  writer = gguf.GGUFWriter(path, architecture)
  if add is not None:
    add(writer)
  writer.add_block_count(config.num_hidden_layers)
  writer.add_context_length(config.max_position_embeddings)
  writer.add_embedding_length(config.hidden_size)
  writer.add_feed_forward_length(config.intermediate_size)
  writer.add_head_count(config.num_attention_heads)
  writer.add_head_count_kv(config.num_key_value_heads)
  writer.add_key_length(config.head_dim)
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_layer_norm_rms_eps(config.rms_norm_eps)
  for key, value in extra.items():
    writer.add_string(key.replace("__", "."), value)
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
  for name, weight in weights.items():
    if name in omit:
      continue
    if name.endswith(("q_proj.weight", "k_proj.weight")):
      heads = weight.shape[0] // config.head_dim
      halves = weight.reshape(heads, 2, config.head_dim // 2, -1)
      weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
    stored = names.get_name(name, (".weight",))
    assert stored is not None, name
    writer.add_tensor(stored, weight)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.fixture(scope="module")
def tiny_weights():
  return load_file(BASE / "model.safetensors"), config_from_hf(
    json.loads((BASE / "config.json").read_text())
  )


def test_gguf_gives_the_same_model(tmp_path, tiny_weights):
  weights, config = tiny_weights
  write_gguf(tmp_path / "tiny.gguf", weights, config)
  model = load_llama(tmp_path / "tiny.gguf")
  assert model.config == dataclasses.replace(config, rms_norm_eps=model.config.rms_norm_eps)
  assert model.config.rms_norm_eps == pytest.approx(config.rms_norm_eps)
  for got, wanted in zip(
    jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(load_llama(BASE))), strict=True
  ):
    np.testing.assert_array_equal(got, wanted)


def test_tied_head_uses_the_embeddings(tmp_path, tiny_weights):
  weights, config = tiny_weights
  tied = dict(weights)
  del tied["lm_head.weight"]
  write_gguf(tmp_path / "tied.gguf", tied, config)
  model = load_llama(tmp_path / "tied.gguf")
  assert model.config.tie_word_embeddings and not hasattr(model, "lm_head")
  tied["lm_head.weight"] = tied["model.embed_tokens.weight"]
  write_gguf(tmp_path / "copy.gguf", tied, config)
  copy = load_llama(tmp_path / "copy.gguf")
  ids = jnp.arange(12).reshape(2, 6)
  np.testing.assert_allclose(model(ids), copy(ids), rtol=0, atol=1e-5)


def directory(path, weights, files=("model.safetensors",), **changes):
  """Writes a Hugging Face directory, the tensors dealt out to `files`."""
  path.mkdir(exist_ok=True)
  config = json.loads((BASE / "config.json").read_text()) | changes
  (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
  shards = {file: {} for file in files}
  for i, (name, weight) in enumerate(weights.items()):
    shards[files[i % len(files)]][name] = weight
  for file, shard in shards.items():
    save_file(shard, path / file)
  if len(files) > 1:
    index = {name: file for file, shard in shards.items() for name in shard}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
  return path


def test_shards_and_bfloat16_files(tmp_path, tiny_weights):
  rounded = {name: w.astype(ml_dtypes.bfloat16) for name, w in tiny_weights[0].items()}
  files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
  model = load_llama(directory(tmp_path / "sharded", rounded, files))
  got = model.model.layers.self_attn.v_proj.kernel[...]
  assert got.dtype == jnp.float32
  for i in range(2):
    wanted = rounded[f"model.layers.{i}.self_attn.v_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(got[i].T, wanted)
  (tmp_path / "sharded" / files[1]).unlink()
  with pytest.raises(ValueError, match=f"files that are not there: {files[1]}"):
    open_checkpoint(tmp_path / "sharded")


def test_tied_directory_may_hold_a_copy_of_the_table_but_nothing_else(tmp_path, tiny_weights):
  weights = dict(tiny_weights[0])
  with pytest.raises(ValueError, match=r"lm_head.weight differs"):
    open_checkpoint(directory(tmp_path, weights, tie_word_embeddings=True))
  weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
  assert open_checkpoint(directory(tmp_path, weights, tie_word_embeddings=True))


def test_rope_theta_is_read_from_both_places(tiny_weights):
  config = json.loads((BASE / "config.json").read_text())
  config["rope_parameters"]["rope_theta"] = 5e5
  assert config_from_hf(config).rope_theta == 5e5
  del config["rope_parameters"]
  assert config_from_hf(config).rope_theta == 1e4
  assert config_from_hf(config | {"rope_theta": 1e6}).rope_theta == 1e6


# --- refusals -------------------------------------------------------------------------------------

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "mixtral"}, "`model_type` is 'mixtral'; supported: 'llama'"),
    ({"model_type": ...}, "`model_type` is None"),
    ({"hidden_size": ..., "vocab_size": ...}, "config.json lacks vocab_size, hidden_size"),
    ({"attention_bias": True}, "missing 8 tensors: model.layers.0.self_attn.q_proj.bias"),
    ({"mlp_bias": True}, "missing 6 tensors: model.layers.0.mlp.gate_proj.bias"),
    ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu', which is not supported; needs 'silu'"),
    ({"sliding_window": 4096}, "`sliding_window` is 4096"),
    ({"quantization_config": {"bits": 4}}, "`quantization_config` is"),
    ({"rope_parameters": LLAMA3_ROPE}, "'llama3' lacks low_freq_factor, high_freq_factor"),
    ({"rope_scaling": {"type": "ntk", "factor": 2.0}, "rope_parameters": ...}, "'ntk'"),
    ({"num_attention_heads": 3, "head_dim": ...}, "not a multiple of `num_attention_heads`"),
    ({"num_key_value_heads": 3}, r"must be a multiple of `num_key_value_heads` \(3\)"),
    ({"num_hidden_layers": 0}, "`num_hidden_layers` must be a positive integer, got 0"),
    ({"hidden_size": "64"}, "`hidden_size` must be a positive integer, got '64'"),
    ({"head_dim": 15}, "`head_dim` must be even"),
    ({"rms_norm_eps": 0.0}, "`rms_norm_eps` must be a positive number"),
    ({"tie_word_embeddings": "yes"}, "`tie_word_embeddings` must be true or false"),
    ({"intermediate_size": 96}, r"gate_proj.weight \(160, 64\), expected \(96, 64\)"),
    ({"num_hidden_layers": 3}, "missing 9 tensors: model.layers.2.input_layernorm.weight"),
    ({"num_hidden_layers": 1}, "unexpected 9 tensors: model.layers.1.input_layernorm.weight"),
  ],
)
def test_config_that_is_not_supported(tmp_path, tiny_weights, changes, message):
  with pytest.raises(ValueError, match=message) as error:
    load_llama(directory(tmp_path, tiny_weights[0], **changes))
  assert str(tmp_path) in str(error.value)


def test_directory_that_is_not_complete(tmp_path, tiny_weights):
  weights = dict(tiny_weights[0])
  with pytest.raises(FileNotFoundError, match="no model at"):
    load_llama(tmp_path / "nowhere")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"no config.json"):
    load_llama(tmp_path / "empty")
  shutil.copy(BASE / "config.json", tmp_path / "empty")
  with pytest.raises(ValueError, match=r"neither model.safetensors nor"):
    load_llama(tmp_path / "empty")
  (tmp_path / "empty" / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
    load_llama(tmp_path / "empty")

  path = directory(tmp_path / "model", weights)
  whole = (path / "model.safetensors").read_bytes()
  for size in (0, 100, 3000, len(whole) - 1):
    (path / "model.safetensors").write_bytes(whole[:size])
    with pytest.raises(ValueError, match=f"truncated or not a safetensors file .* {size} bytes"):
      load_llama(path)


def test_tensors_that_do_not_belong(tmp_path, tiny_weights):
  weights = dict(tiny_weights[0])
  ignored = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
  assert open_checkpoint(directory(tmp_path, weights | ignored))
  bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)}
  with pytest.raises(
    ValueError, match=r"unexpected 1 tensor: model.layers.0.self_attn.q_proj.bias"
  ):
    open_checkpoint(directory(tmp_path, weights | bias))
  renamed = dict(weights)
  renamed["model.embed_token.weight"] = renamed.pop("model.embed_tokens.weight")
  with pytest.raises(ValueError, match=r"it has model.embed_token.weight"):
    open_checkpoint(directory(tmp_path, renamed))
  whole = weights | {"model.norm.weight": np.ones(64, np.int8)}
  with pytest.raises(ValueError, match=r"model.norm.weight is of type I8; supported: F32, F16"):
    open_checkpoint(directory(tmp_path, whole))
  damaged = weights["model.layers.1.mlp.up_proj.weight"].copy()
  damaged[3, 4] = np.nan
  path = directory(tmp_path, weights | {"model.layers.1.mlp.up_proj.weight": damaged})
  with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or Inf"):
    load_llama(path, "nf4")


def test_gguf_that_is_not_supported(tmp_path, tiny_weights):
  weights, config = tiny_weights
  path = tmp_path / "tiny.gguf"
  write_gguf(path, weights, config)
  whole = path.read_bytes()
  for size in (0, 3, 200, 2000, len(whole) - 400):
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=rf"tiny.gguf: truncated or not .* {size} bytes"):
      load_llama(path)
  write_gguf(path, weights, config, architecture="gemma")
  with pytest.raises(ValueError, match=r"`general.architecture` is 'gemma'; supported: 'llama'"):
    load_llama(path)
  write_gguf(path, weights, config, llama__rope__scaling__type="yarn")
  with pytest.raises(ValueError, match=r"`llama.rope.scaling.type` is 'yarn', which is not supp"):
    load_llama(path)
  gone = ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight")
  write_gguf(path, weights, config, omit=gone)
  with pytest.raises(ValueError, match="missing 2 tensors: " + "; ".join(gone)):
    load_llama(path)
