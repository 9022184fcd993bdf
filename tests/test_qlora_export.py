"""Adapters for llama.cpp: what the file says, and that a base plus it is the adapted model."""

import dataclasses
import json
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from conftest import GOLDEN
from optax_lowmem import nn
from optax_lowmem.qlora.commands.export import read_factors, write_factors
from optax_lowmem.qlora.loading.gguf_files import by_adjacent_pairs, by_halves
from optax_lowmem.qlora.loading.llama import load_llama
from optax_lowmem.qlora.loading.weights import open_checkpoint
from optax_lowmem.qlora.models.llama_config import linear_shapes
from optax_lowmem.qlora.run.settings import Settings
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer
from qlora_cases import main, save_model

sys.path.insert(0, str(GOLDEN))
import make_llama

from test_llama_architectures import write_gguf
from test_llama_files import write_gguf as write_whole_gguf

FAMILIES = {"mistral": "llama", "qwen2": "qwen2", "gemma2": "gemma2", "gemma3": "gemma3"}
FAMILIES |= {"phi3": "phi3", "smollm3": "smollm3", "olmo2": "olmo2", "granite": "granite"}


@nnx.jit
def logits_of(model, ids):
  return model(ids)


def saved(base, folder, dtype=jnp.float32, **options):
  """The folder of an adapter of random numbers on all linear layers of the model in `base`."""
  model = nn.add_lora(
    load_llama(base), 4, 8, "all-linear", param_dtype=dtype, rngs=nnx.Rngs(0), **options
  )
  lora = nnx.state(model, nnx.LoRAParam)
  leaves, tree = jax.tree.flatten(lora)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  drawn = [0.1 * jax.random.normal(k, w.shape, w.dtype) for k, w in zip(keys, leaves, strict=True)]
  nnx.update(model, jax.tree.unflatten(tree, drawn))
  return nn.save_peft(model, folder)


def read(path):
  reader = gguf.GGUFReader(path)
  fields = {key: field.contents() for key, field in reader.fields.items()}
  tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
  return fields, tensors


def test_orders_of_rows_are_each_others_inverse():
  weight = np.arange(48).reshape(16, 3)
  turned = by_adjacent_pairs(weight, 8)
  assert turned[:4, 0].tolist() == [0, 12, 3, 15]  # rows 0 and 4, then 1 and 5
  np.testing.assert_array_equal(by_halves(turned, 8), weight)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_holds_the_adapter_under_the_names_of_its_family(tmp_path, name):
  base = make_llama.save_directory(tmp_path / "base", *make_llama.read(name)[:2])
  adapter = saved(base, tmp_path / "adapter")
  checkpoint = open_checkpoint(base)
  write_factors(tmp_path / "a.gguf", read_factors(adapter), checkpoint)
  fields, tensors = read(tmp_path / "a.gguf")
  assert fields["general.architecture"] == FAMILIES[name]
  assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
  assert fields["adapter.lora.alpha"] == 8.0 and fields["general.file_type"] == 0
  stored = load_file(adapter / "adapter_model.safetensors")
  layers = checkpoint.config.num_hidden_layers * len(linear_shapes(checkpoint.config))
  assert len(tensors) == 2 * layers
  enum = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[FAMILIES[name]]
  names = gguf.get_tensor_name_map(enum, 2)
  adjacent = FAMILIES[name] in ("llama", "smollm3", "granite")
  for key, value in stored.items():
    inner, part = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_")
    if part == "B" and adjacent and inner.endswith(("q_proj", "k_proj")):
      value = by_adjacent_pairs(value, checkpoint.config.head_dim)
    got = tensors.pop(f"{names.get_name(inner)}.weight.lora_{part.lower()}")
    np.testing.assert_array_equal(got, value)
  assert not tensors


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("llama2", {}),
    ("llama2", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*proj": 3}}),
    ("llama2", {"use_rslora": True, "rank_pattern": {"down_proj": 1}}),
    ("qwen3", {}),
  ],
)
def test_a_base_file_and_what_the_adapter_says_is_the_adapted_model(tmp_path, name, options):
  config, weights, measured = make_llama.read(name)
  base = make_llama.save_directory(tmp_path / "base", config, weights)
  adapter = saved(base, tmp_path / "adapter", **options)
  wanted = logits_of(nn.load_peft(load_llama(base), adapter), measured["ids"])
  checkpoint, whole = open_checkpoint(base), tmp_path / "base.gguf"
  write_factors(tmp_path / "a.gguf", read_factors(adapter), checkpoint)
  fields, tensors = read(tmp_path / "a.gguf")
  wide = {key: value.astype(np.float32) for key, value in weights.items()}
  write_gguf(whole, checkpoint.config, wide, checkpoint.model_type, kind=np.float32)
  before = logits_of(load_llama(whole), measured["ids"])
  file = gguf.GGUFReader(whole, "r+")
  for tensor in file.tensors:
    if f"{tensor.name}.lora_a" in tensors:  # as llama.cpp: alpha over the rank, B A
      a, b = (tensors.pop(f"{tensor.name}.lora_{part}") for part in "ab")
      tensor.data[...] += fields["adapter.lora.alpha"] / len(a) * (b @ a)
  assert not tensors
  file.data.flush()
  got = logits_of(load_llama(whole), measured["ids"])
  # A sum of products in another order: as merged weights are, everywhere.
  np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
  assert np.abs(before - wanted).max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_llama_cpp_itself(tmp_path, dtype):
  xllamacpp = pytest.importorskip("xllamacpp", reason="runs llama.cpp, which xllamacpp brings")
  base = save_model(tmp_path / "base", tied=False)
  adapter = saved(
    base, tmp_path / "adapter", rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3}
  )
  checkpoint = open_checkpoint(base)
  backend = ChatTokenizer.from_model(base).backend

  def tokenizer(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([backend.id_to_token(i) for i in range(backend.get_vocab_size())])
    merges = json.loads(backend.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(2)

  weights = load_file(base / "model.safetensors")
  write_whole_gguf(tmp_path / "base.gguf", weights, checkpoint.config, add=tokenizer)
  write_factors(tmp_path / "a.gguf", read_factors(adapter), checkpoint, dtype)
  ids = np.arange(5, 29)[None] * 11 % 270

  def probabilities(*adapters):
    """The logarithms of what llama.cpp says of the next token."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers = str(tmp_path / "base.gguf"), 64, 0
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(a), 1.0) for a in adapters]
    asked = {"prompt": ids[0].tolist(), "n_predict": 1, "temperature": 0, "n_probs": 300}
    answer = xllamacpp.Server(params).handle_completions(asked)
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return np.array([each["logprob"] for each in sorted(found, key=lambda each: each["id"])])

  plain = load_llama(base)
  adapted = nn.load_peft(load_llama(base), adapter)
  want = [jax.nn.log_softmax(logits_of(model, ids)[0, -1]) for model in (plain, adapted)]
  assert np.abs(want[0] - want[1]).max() > 1
  assert all(each.argmax() > 2 for each in want)  # of tokens that end a text it says nothing
  # Its cache of keys and values is float16, with an adapter and without.
  np.testing.assert_allclose(probabilities(), want[0], rtol=0, atol=0.02)
  np.testing.assert_allclose(probabilities(tmp_path / "a.gguf"), want[1], rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_adapters_are_exported_exactly(tmp_path, dtype):
  base = GOLDEN / "peft" / "base"
  factors = read_factors(saved(base, tmp_path / "adapter", dtype=jnp.dtype(dtype)))
  write_factors(tmp_path / "a.gguf", factors, open_checkpoint(base), dtype)
  fields, tensors = read(tmp_path / "a.gguf")
  assert fields["general.file_type"] == {"float16": 1, "bfloat16": 32}[dtype]
  name = "model.layers.1.mlp.down_proj"
  np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight.lora_b"], factors[name].b)
  np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight.lora_a"], factors[name].a)
  sizes = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
  assert sizes == {{"float16": "F16", "bfloat16": "BF16"}[dtype]}


def test_the_command_exports_a_run_once(tmp_path, capsys):
  base = GOLDEN / "peft" / "base"
  saved(base, tmp_path / "run" / "last")
  settings = dataclasses.asdict(Settings(model=str(base)))
  (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": settings}))
  argv = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "a.gguf")]
  assert main(argv) == 0
  assert "The adapter, of 14 layers" in capsys.readouterr().out
  assert len(read(tmp_path / "a.gguf")[1]) == 28
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "run"]
  for more, message in (([], "exists. Choose another name"), (["--best"], "There is no best/")):
    if more:
      (tmp_path / "a.gguf").unlink()
    with pytest.raises(SystemExit) as exit:
      main([*argv, *more])
    assert exit.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"use_dora": True}, "`use_dora` True, and a GGUF adapter holds nothing but"),
    ({"lora_bias": True}, "`lora_bias` True"),
    ({"modules_to_save": ["norm"]}, r"`modules_to_save` \['model.norm'\]"),
  ],
)
def test_what_is_no_pair_of_factors_is_refused(tmp_path, options, message):
  adapter = saved(GOLDEN / "peft" / "base", tmp_path / "adapter", **options)
  with pytest.raises(ValueError, match=message):
    read_factors(adapter)


def test_embeddings_tied_heads_and_overflow_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"the tensor .*lora_embedding_A"):
    read_factors(GOLDEN / "peft" / "lora_embed_head")
  checkpoint, out = open_checkpoint(GOLDEN / "peft" / "base"), tmp_path / "a.gguf"
  factors = read_factors(saved(GOLDEN / "peft" / "base", tmp_path / "adapter"))
  tied = dataclasses.replace(
    checkpoint, config=dataclasses.replace(checkpoint.config, tie_word_embeddings=True)
  )
  one = next(iter(factors.values()))
  for given, base, dtype, message in (
    ({"lm_head": one}, tied, "float32", "`lm_head` has an adapter, and a GGUF file of a 'llama'"),
    ({"model.layers.0.other": one}, checkpoint, "float32", "`model.layers.0.other` has"),
    (factors | {"lm_head": one._replace(a=1e6 * one.a)}, checkpoint, "float16", "beyond float16"),
  ):
    with pytest.raises(ValueError, match=message):
      write_factors(out, given, base, dtype)
    assert not list(tmp_path.glob("a.gguf*"))
  write_factors(out, {"lm_head": one}, checkpoint)
  assert set(read(out)[1]) == {"output.weight.lora_a", "output.weight.lora_b"}
