"""The Llama of the example: against Hugging Face's, in 4 bits, and in training."""

import dataclasses
import doctest
import shutil
import time
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import optax_lowmem as lowmem
from conftest import GOLDEN
from optax_lowmem import nn
from optax_lowmem.qlora.loading import llama
from optax_lowmem.qlora.loading.llama import abstract_llama, load_llama
from optax_lowmem.qlora.loading.weights import expected_shapes, open_checkpoint
from optax_lowmem.qlora.models import llama_config
from optax_lowmem.qlora.models.llama_config import LlamaConfig, linear_shapes
from programs import temporaries_of

BASE = GOLDEN / "peft" / "base"
IDS = np.load(GOLDEN / "peft" / "input_ids.npy")
LOGITS = np.load(GOLDEN / "peft" / "logits_base.npy")  # transformers 5.23.0
SMALL = LlamaConfig(64, 128, 192, 3, 4, 2, 32)


@nnx.jit
def logits_of(model, ids, lengths=None, positions=None):
  return model(ids, lengths=lengths, positions=positions)


@pytest.fixture(scope="module")
def tiny():
  return load_llama(BASE)


# --- numbers --------------------------------------------------------------------------------------


def test_logits_are_those_of_hugging_face(tiny):
  np.testing.assert_allclose(logits_of(tiny, IDS), LOGITS, rtol=0, atol=1e-5)  # measured 2.4e-6


def test_bfloat16_holds_and_computes_in_bfloat16():
  model: Any = load_llama(BASE, dtype=jnp.bfloat16)
  assert model.model.layers.mlp.up_proj.kernel[...].dtype == jnp.bfloat16
  assert model.model.layers.input_layernorm.scale[...].dtype == jnp.float32
  logits = logits_of(model, IDS)
  assert logits.dtype == jnp.bfloat16
  np.testing.assert_allclose(logits.astype(jnp.float32), LOGITS, rtol=0, atol=0.07)


def test_adapter_written_by_peft_gives_the_logits_of_peft():
  model = nn.load_peft(load_llama(BASE), GOLDEN / "peft" / "lora")
  expected = np.load(GOLDEN / "peft" / "lora" / "logits.npy")
  assert np.abs(expected - LOGITS).max() > 0.1
  np.testing.assert_allclose(logits_of(model, IDS), expected, rtol=0, atol=2e-5)


def test_causal_and_padded_by_lengths(tiny):
  later = IDS.copy()
  later[:, 8:] = (later[:, 8:] + 1) % 128
  lengths = jnp.array([8, 5])
  whole, changed, padded = (
    logits_of(tiny, IDS),
    logits_of(tiny, later),
    logits_of(tiny, later, lengths),
  )
  np.testing.assert_allclose(changed[:, :8], whole[:, :8], rtol=0, atol=1e-5)
  assert np.abs(changed[:, 8:] - whole[:, 8:]).max() > 0.1
  np.testing.assert_allclose(padded[0, :8], whole[0, :8], rtol=0, atol=1e-5)
  np.testing.assert_allclose(padded[1, :5], whole[1, :5], rtol=0, atol=1e-5)
  # Tokens beyond the length are not attended to, not even by padding.
  assert np.abs(padded[1, 8:] - changed[1, 8:]).max() > 1e-3
  assert np.isfinite(logits_of(tiny, IDS, jnp.array([0, 12]))).all()


def test_only_distances_between_positions_matter(tiny):
  shifted = logits_of(tiny, IDS, None, jnp.arange(12)[None] + 40)
  np.testing.assert_allclose(shifted, LOGITS, rtol=0, atol=1e-4)
  stretched = logits_of(tiny, IDS, None, jnp.arange(12)[None] * 2)
  assert np.abs(stretched - LOGITS).max() > 0.01


# --- quantized ------------------------------------------------------------------------------------


def test_packed_bits_are_those_of_each_layer_alone():
  model = load_llama(BASE, "nf4")
  weights = load_file(BASE / "model.safetensors")
  # Compiled: op by op, the mean of the scales may differ in its last bit.
  quantize = jax.jit(lambda w: lowmem.quantize(w, "nf4", 64, double_quantize=True))
  for name in linear_shapes(model.config):
    holder, child = name.split(".")
    linear = getattr(getattr(model.model.layers, holder), child)
    assert isinstance(linear, nn.NF4Linear)
    for i in range(2):
      alone = quantize(weights[f"model.layers.{i}.{name}.weight"])
      layer = jax.tree.map(lambda leaf, i=i: leaf[i], linear.weight.get_value())
      assert jax.tree.structure(layer) == jax.tree.structure(alone)
      for got, wanted in zip(jax.tree.leaves(layer), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(got, wanted)
  assert isinstance(model.lm_head, nnx.Linear)
  np.testing.assert_array_equal(model.lm_head.kernel[...].T, weights["lm_head.weight"])


def test_quantized_computes_with_the_dequantized_weights(tmp_path):
  weights = load_file(BASE / "model.safetensors")
  for name, weight in weights.items():
    if name.removesuffix(".weight").endswith("_proj"):
      q = lowmem.quantize(jnp.asarray(weight), "nf4", 64, double_quantize=True)
      weights[name] = np.asarray(q.dequantize())
  shutil.copy(BASE / "config.json", tmp_path)
  save_file(weights, tmp_path / "model.safetensors")
  expected = logits_of(load_llama(tmp_path), IDS)
  np.testing.assert_allclose(logits_of(load_llama(BASE, "nf4"), IDS), expected, rtol=0, atol=1e-5)


def test_other_codes_are_those_of_quantize_model():
  error = {}
  for codebook in ("fp4", "nf4", "int8"):
    loaded = load_llama(BASE, codebook)
    wanted = nn.quantize_model(load_llama(BASE), codebook=codebook)
    assert nnx.graphdef(loaded) == nnx.graphdef(wanted)
    for got, expected in zip(
      jax.tree.leaves(nnx.state(loaded)), jax.tree.leaves(nnx.state(wanted)), strict=True
    ):
      np.testing.assert_array_equal(got, expected)
    error[codebook] = np.abs(logits_of(loaded, IDS) - LOGITS).mean()
  assert 0 < 4 * error["int8"] < error["nf4"] < error["fp4"]


@pytest.mark.parametrize("quantize", [None, "nf4", "fp4", "int8"])
def test_abstract_model_has_the_shapes_of_the_loaded_one(quantize):
  loaded = load_llama(BASE, quantize)
  abstract = abstract_llama(loaded.config, quantize)
  assert nnx.graphdef(abstract) == nnx.graphdef(loaded)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.state(loaded))
  leaves = jax.tree.leaves(nnx.state(abstract))
  assert leaves == jax.tree.leaves(shapes)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_loading_holds_one_matrix_at_a_time():
  checkpoint, seen = open_checkpoint(BASE), []

  def read(name):
    if len(seen) > 1 and name.endswith("_proj.weight"):
      for _ in range(100):  # on a busy machine the runtime lets go of it a moment after its use
        if seen[-2]() is None:
          break
        time.sleep(0.05)
        jnp.zeros(1).block_until_ready()
      assert seen[-2]() is None, "the last matrix but one is still in memory"
    weight = checkpoint.read(name)
    seen.append(weakref.ref(weight))
    return weight

  load_llama(dataclasses.replace(checkpoint, read=read), "nf4")
  assert len(seen) == len(expected_shapes(checkpoint.config))


def test_parameter_count_is_the_sum_of_the_shapes():
  for tied in (False, True):
    config = dataclasses.replace(SMALL, tie_word_embeddings=tied)
    assert config.parameter_count() == sum(np.prod(s) for s in expected_shapes(config).values())


# --- training -------------------------------------------------------------------------------------


def quantized_with_adapters(config, dropout=0.0):
  model = nn.quantize_model(llama.Llama(config, rngs=nnx.Rngs(0)))
  return nn.add_lora(model, 4, 8, r".*_proj", dropout=dropout, rngs=nnx.Rngs(1))


def test_gradient_memory_is_under_a_quarter_of_the_weights():
  config = LlamaConfig(512, 256, 704, 16, 4, 2, 64)
  graph, lora, rest = nnx.split(quantized_with_adapters(config), nnx.LoRAParam, ...)

  def loss(lora, rest, ids):
    return nnx.merge(graph, lora, rest)(ids).sum()

  step = jax.jit(jax.value_and_grad(loss))
  compiled = step.lower(lora, rest, jnp.ones((1, 16), int)).compile()
  shapes = expected_shapes(config)
  weights = 4 * sum(np.prod(s) for name, s in shapes.items() if name.endswith("_proj.weight"))
  assert temporaries_of(compiled) < weights / 4  # measured: 0.12


def test_trains_adapters_only_and_dropout_moves_on():
  model = quantized_with_adapters(SMALL, dropout=0.3)
  optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
  ids = jax.random.randint(jax.random.key(0), (2, 17), 0, SMALL.vocab_size)

  def loss(model, ids):
    logits = model(ids[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

  @nnx.jit
  def step(model, optimizer, ids):
    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, ids)
    optimizer.update(model, grads)
    return value

  def frozen():
    state = nnx.split(model, nnx.LoRAParam, nnx.RngState, ...)[3]
    return jax.tree.map(np.array, jax.tree.leaves(state))

  before = frozen()
  counters = nnx.state(model, nnx.RngCount)
  assert all(leaf.shape == (3,) for leaf in jax.tree.leaves(counters))  # one for each layer
  losses = [float(step(model, optimizer, ids)) for _ in range(12)]
  assert losses[-1] < losses[0] - 0.1
  assert all(int(leaf.min()) == 12 for leaf in jax.tree.leaves(nnx.state(model, nnx.RngCount)))
  for old, new in zip(before, frozen(), strict=True):
    np.testing.assert_array_equal(old, new)
  model.train()
  assert np.abs(logits_of(model, ids) - logits_of(model, ids)).max() > 1e-4
  model.eval()
  np.testing.assert_array_equal(logits_of(model, ids), logits_of(model, ids))


# --- arguments and examples ----------------------------------------------------------------------


def test_unknown_arguments():
  with pytest.raises(ValueError, match="`quantize` must be 'nf4', 'fp4', 'int8' or None"):
    load_llama(BASE, "int4")  # pyright: ignore[reportArgumentType]
  with pytest.raises(ValueError, match="`dtype` must be float32 or bfloat16, got float16"):
    abstract_llama(SMALL, dtype=jnp.float16)


@pytest.mark.parametrize("module", [llama, llama_config])
def test_examples_in_docstrings(module):
  failed, attempted = doctest.testmod(module)
  assert attempted > 0 and failed == 0


# --- the real model -------------------------------------------------------------------------------

ENGLISH = """The house stood at the end of a narrow road, half hidden behind old apple trees. In the
morning the children walked to school along the river, and in the evening their grandmother told
them stories about the time when the mill was still working. She said that the water had been so
high one spring that people went from door to door in boats. Nobody believed her at first, but one
day they found a photograph in the attic which showed exactly what she had described."""


@pytest.mark.slow
def test_real_model_against_transformers():
  """SmolLM2-135M-Instruct, read from GGUF by transformers itself."""
  torch = pytest.importorskip("torch", reason="compares with transformers, which needs torch")
  transformers = pytest.importorskip("transformers", reason="compares with transformers")
  pytest.importorskip("accelerate", reason="transformers needs it to read GGUF")
  from optax_lowmem.qlora.files.fetch import FetchError, default_model
  from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer

  try:
    path = default_model()
  except FetchError as error:
    pytest.skip(f"no default model: {error}")
  ids = np.array([ChatTokenizer.from_model(path).encode(ENGLISH)])
  shuffled = np.random.default_rng(0).permutation(ids[0])[None]

  peer = transformers.LlamaForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )
  with torch.no_grad():
    expected = peer(torch.from_numpy(ids)).logits.numpy()
  del peer
  model = load_llama(path)
  logits = np.asarray(logits_of(model, ids))
  difference = np.abs(logits - expected).max()
  print(f"largest difference {difference:.2e}, largest logit {np.abs(expected).max():.1f}")
  assert difference < 2e-4

  def perplexity(model, ids):
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits_of(model, ids)[:, :-1], ids[:, 1:]
    )
    return float(jnp.exp(losses.mean()))

  plain, noise = perplexity(model, ids), perplexity(model, shuffled)
  packed = perplexity(load_llama(path, "nf4"), ids)
  print(f"perplexity {plain:.2f}, of shuffled tokens {noise:.0f}, in NF4 {packed:.2f}")
  assert plain < 30 and noise > 300
  assert packed != plain and packed < 1.3 * plain
