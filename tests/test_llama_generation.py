"""Generation with a cache of keys and values, against the forward pass that has none."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import GOLDEN
from optax_lowmem import nn
from optax_lowmem.qlora.loading.llama import Llama, load_llama
from optax_lowmem.qlora.models.generation import Generator, choose, generate
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from programs import times_compiled

sys.path.insert(0, str(GOLDEN))
import make_llama

CONFIG = LlamaConfig(64, 32, 48, 2, 4, 2, 8, windows=(None, 6), qkv_bias=True, qk_norm=True)
PROMPTS = [np.arange(3, 3 + n, dtype=np.int32) * 7 % 64 for n in (5, 16, 1, 11)]


@nnx.jit
def logits_of(model, ids):
  return model(ids)


@functools.cache
def tiny(quantized=False):
  """A model whose attention is far from uniform, so that a wrong mask shows."""
  model = Llama(CONFIG, rngs=nnx.Rngs(0))
  if quantized:
    model = nn.add_lora(nn.quantize_model(model), 4, 8, r".*_proj", rngs=nnx.Rngs(1))
    lora = nnx.state(model, nnx.LoRAParam)
    keys = iter(jax.random.split(jax.random.key(2), 99))
    moved = jax.tree.map(lambda w: w + 0.3 * jax.random.normal(next(keys), w.shape), lora)
    nnx.update(model, moved)
  else:
    kernels = nnx.state(model.model.layers.self_attn, nnx.Param)
    nnx.update(model.model.layers.self_attn, jax.tree.map(lambda w: 3 * w, kernels))
  return model


def greedy_without_cache(model, prompt, count):
  """Each token from a forward pass over all before it, in a row of one length: one program."""
  ids = np.zeros((1, 28), np.int32)
  ids[0, : len(prompt)] = prompt
  for i in range(len(prompt), len(prompt) + count):
    ids[0, i] = logits_of(model, ids)[0, i - 1].argmax()
  return ids[0, len(prompt) : len(prompt) + count]


# --- the cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True])
def test_logits_with_cache_are_those_without(quantized):
  model = tiny(quantized)
  ids = jax.random.randint(jax.random.key(3), (2, 20), 0, 64)
  expected = logits_of(model, ids)

  @nnx.jit
  def extend(model, ids, cache, lengths=None):
    hidden, cache = model.extend(ids, cache, lengths)
    return model.head(hidden), cache

  # A prompt of 9 and one of 12, the first one padded; then one token at a time; then four.
  starts = np.array([9, 12])
  logits, cache = extend(model, ids[:, :12], model.init_cache(2, 20), jnp.asarray(starts))
  for row, start in enumerate(starts):
    np.testing.assert_allclose(logits[row, :start], expected[row, :start], rtol=0, atol=2e-5)
  for step in range(4):
    at = np.arange(2), starts + step
    logits, cache = extend(model, ids[at][:, None], cache)
    np.testing.assert_allclose(logits[:, 0], expected[at], rtol=0, atol=2e-5)
  at = np.arange(2)[:, None], starts[:, None] + 4 + np.arange(4)
  logits, cache = extend(model, ids[at], cache)
  np.testing.assert_allclose(logits, expected[at], rtol=0, atol=2e-5)
  np.testing.assert_array_equal(cache.lengths, starts + 8)


def test_cache_in_bfloat16_is_half_as_large_and_near():
  model = tiny()
  whole, half = model.init_cache(2, 8), model.init_cache(2, 8, jnp.bfloat16)
  assert whole.keys.dtype == jnp.float32 and 2 * half.keys.nbytes == whole.keys.nbytes
  ids = jnp.arange(16).reshape(2, 8)
  near, exact = (model.head(model.extend(ids, cache)[0]) for cache in (half, whole))
  assert 1e-4 < np.abs(near - exact).max() < 0.2


def test_what_does_not_fit_is_refused():
  model = tiny()
  with pytest.raises(ValueError, match=r"\(2, 9\) do not fit a cache of 2 rows and 8 slots"):
    model.extend(jnp.zeros((2, 9), int), model.init_cache(2, 8))
  with pytest.raises(ValueError, match="do not fit a cache of 3 rows and 8 slots"):
    model.extend(jnp.zeros((2, 4), int), model.init_cache(3, 8))
  with pytest.raises(ValueError, match="`batch` and `length` must be at least 1, got 2 and 0"):
    model.init_cache(2, 0)


# --- greedy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", make_llama.CASES)
def test_greedy_tokens_are_those_of_transformers(tmp_path, name):
  config, weights, measured = make_llama.read(name)
  ids, generated = measured["ids"], measured["generated"]
  make_llama.save_directory(tmp_path, config, weights)
  graph, variables = nnx.split(load_llama(tmp_path))
  made = Generator(graph, (), generated.shape[1])((variables,), list(ids))
  np.testing.assert_array_equal(made, generated)
  assert len(set(generated[0])) > 2


@pytest.mark.parametrize("quantized", [False, True])
def test_rows_of_different_lengths_are_as_each_alone_without_cache(quantized):
  model = tiny(quantized)
  graph, variables = nnx.split(model)
  together = Generator(graph, (), 12)((variables,), PROMPTS)
  for prompt, made in zip(PROMPTS, together, strict=True):
    np.testing.assert_array_equal(made, greedy_without_cache(model, prompt, 12))


def test_rows_end_at_their_stops_and_the_loop_with_the_last():
  graph, variables = nnx.split(tiny())
  whole = Generator(graph, (), 12)((variables,), PROMPTS)
  stops = tuple({int(row[3 + i]) for i, row in enumerate(whole)})
  ends = [int(np.flatnonzero(np.isin(row, stops))[0]) for row in whole]
  stopped = Generator(graph, stops, 12)((variables,), PROMPTS)
  for row, end, made in zip(whole, ends, stopped, strict=True):
    np.testing.assert_array_equal(made, row[:end])

  ids, lengths = np.zeros((4, 16), np.int32), np.array([len(p) for p in PROMPTS], np.int32)
  for row, prompt in zip(ids, PROMPTS, strict=True):
    row[: len(prompt)] = prompt
  nought, one = jnp.float32(0), jnp.float32(1)
  made = jax.jit(functools.partial(generate, graph, stops, 12))(
    (variables,), ids, lengths, jax.random.key(0), nought, one
  )
  assert made.steps == max(ends) + 1 < 12
  assert all(np.isin(row[end:], stops).all() for row, end in zip(made.tokens, ends, strict=True))


def test_one_program_serves_many_lengths_and_temperatures():
  graph, variables = nnx.split(tiny())
  generator = Generator(graph, (), 3, smallest=8)
  for length in (1, 4, 7, 8):
    generator((variables,), [PROMPTS[1][:length]], temperature=length / 8, top_p=0.9)
  assert times_compiled(generator.compiled) == 1
  generator((variables,), [PROMPTS[1][:9]])
  assert times_compiled(generator.compiled) == 2


# --- the draw -------------------------------------------------------------------------------------


def test_draws_have_the_probabilities_of_the_nucleus():
  logits = jnp.log(jnp.array([0.5, 0.1, 0.3, 0.06, 0.04]))
  draw = jax.jit(choose)
  many = jnp.tile(logits, (20_000, 1))

  def shares(temperature, top_p):
    tokens = draw(many, jax.random.key(0), jnp.float32(temperature), jnp.float32(top_p))
    return np.bincount(tokens, minlength=5) / len(tokens)

  np.testing.assert_allclose(shares(1.0, 1.0), [0.5, 0.1, 0.3, 0.06, 0.04], rtol=0, atol=0.015)
  np.testing.assert_allclose(shares(1.0, 0.7), [0.625, 0, 0.375, 0, 0], rtol=0, atol=0.015)
  np.testing.assert_array_equal(shares(1.0, 0.4), [1, 0, 0, 0, 0])
  np.testing.assert_array_equal(shares(0.0, 1.0), [1, 0, 0, 0, 0])
  squared = np.array([0.5, 0.1, 0.3, 0.06, 0.04]) ** 2
  np.testing.assert_allclose(shares(0.5, 1.0), squared / squared.sum(), rtol=0, atol=0.015)


def test_seeds_differ_and_repeat():
  graph, variables = nnx.split(tiny())
  generator = Generator(graph, (), 12)
  one, two, again = (generator((variables,), PROMPTS, temperature=2.0, seed=s) for s in (0, 1, 0))
  np.testing.assert_array_equal(one, again)
  assert (np.array(one) != np.array(two)).any()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"prompts": []}, "`prompts` must hold at least one prompt"),
    ({"prompts": [np.zeros(0, int)]}, "each of at least one token"),
    ({"temperature": -1.0}, "`temperature` must be 0 or a positive number, got -1.0"),
    ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1, got 0.0"),
  ],
)
def test_arguments(changes, message):
  graph, variables = nnx.split(tiny())
  with pytest.raises(ValueError, match=message):
    Generator(graph, ())(**({"variables": (variables,), "prompts": PROMPTS} | changes))
  with pytest.raises(ValueError, match="`new_tokens` and `smallest` must be at least 1, got 0"):
    Generator(graph, (), 0)
