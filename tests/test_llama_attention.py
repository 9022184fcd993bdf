"""Attention in chunks: the numbers of whole scores, in memory that grows with the length only."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optax_lowmem.qlora.loading.llama import Llama
from optax_lowmem.qlora.models import attention
from optax_lowmem.qlora.models.attention import attend_within
from optax_lowmem.qlora.models.chunked_attention import CHUNK, chunked_attention
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.models.scores import PLAIN, Scoring
from optax_lowmem.qlora.run.checks import check_attention
from optax_lowmem.qlora.run.settings import Settings
from programs import temporaries_of


def inputs(time, heads, groups, size=8, dtype=jnp.float32, rows=2):
  keys = jax.random.split(jax.random.key(time), 4)
  shapes = [(rows, time, n, size) for n in (heads, groups, groups, heads)]
  return [jax.random.normal(*pair).astype(dtype) for pair in zip(keys, shapes, strict=True)]


def results(attend, q, k, v, slope):
  """What is seen, and the gradients in queries, keys and values."""

  @jax.jit
  def both(q, k, v, slope):
    out, pull_back = jax.vjp(attend, q, k, v)
    return out, *pull_back(slope)

  return [np.asarray(x, np.float32) for x in both(q, k, v, slope)]


def whole(segments, window, scoring=PLAIN):
  return lambda *qkv: attend_within(segments, window, "xla", scoring)(*qkv)[0]


@pytest.mark.parametrize(
  ("window", "scoring"),
  [(None, PLAIN), (5, PLAIN), (5, Scoring(0.7, 1.5))],
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
  ("time", "heads", "groups", "chunk"), [(48, 4, 2, 16), (37, 2, 2, 16), (50, 3, 1, 8)]
)
def test_chunks_give_the_numbers_of_whole_scores(
  time, heads, groups, chunk, packed, window, scoring
):
  given = inputs(time, heads, groups)
  segments = window_ = None
  if packed:  # sorted numbers, and a segment that is taken up again
    segments = jnp.sort(jax.random.randint(jax.random.key(1), (2, time), 0, 4), axis=1)
    segments = segments.at[:, -3:].set(1)
  if window is not None:
    window_ = jnp.int32(window)

  def chunked(q, k, v):
    return chunked_attention(q, k, v, segments, window_, chunk, scoring)

  wanted = results(whole(segments, window_, scoring), *given)
  for got, want in zip(results(chunked, *given), wanted, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def test_capped_scores_are_those_of_a_loop():
  q, k, v, _ = inputs(12, 4, 2)
  got = whole(None, jnp.int32(5), Scoring(0.7, 1.5))(q, k, v)
  for row, i, head in ((0, 0, 0), (1, 7, 1), (0, 11, 3)):
    seen = slice(max(0, i - 4), i + 1)
    scores = 1.5 * np.tanh(0.7 * (k[row, seen, head // 2] @ q[row, i, head]) / 1.5)
    weights = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(
      got[row, i, head], weights @ v[row, seen, head // 2], rtol=0, atol=1e-6
    )
  near, plain = (whole(None, None, Scoring(0.7, cap))(q, k, v) for cap in (1e4, None))
  np.testing.assert_allclose(near, plain, rtol=0, atol=1e-5)


def test_chunks_in_16_bits_are_as_near_to_32_bits_as_whole_scores():
  given = inputs(100, 4, 2, dtype=jnp.bfloat16)
  exact = results(whole(None, None), *(x.astype(jnp.float32) for x in given))
  ways = [lambda q, k, v: chunked_attention(q, k, v, None, None, 16), whole(None, None)]
  errors = [
    [np.sqrt(np.square(a - b).mean()) for a, b in zip(results(way, *given), exact, strict=True)]
    for way in ways
  ]
  assert np.all(np.array(errors[0]) < 1.25 * np.array(errors[1])), errors


def test_short_rows_have_whole_scores_and_long_ones_never():
  def text(time, kind):
    q, k, v, _ = (jax.ShapeDtypeStruct((1, time, n, 8), jnp.float32) for n in (2, 1, 1, 2))
    return jax.jit(lambda *qkv: attend_within(None, None, kind)(*qkv)[0]).lower(q, k, v).as_text()

  assert text(CHUNK, "auto") == text(CHUNK, "xla")
  long = 2 * CHUNK + 8
  assert f"{long}x{long}x" in text(long, "xla") and f"{long}x{long}x" not in text(long, "auto")


def test_memory_grows_with_the_length():
  def temporaries(time):
    shapes = [jax.ShapeDtypeStruct((1, time, 4, 16), jnp.float32)] * 4

    def gradients(q, k, v, slope):
      return jax.vjp(lambda *qkv: attend_within(None, None)(*qkv)[0], q, k, v)[1](slope)

    return temporaries_of(jax.jit(gradients).lower(*shapes).compile())

  short, long = temporaries(4 * CHUNK), temporaries(8 * CHUNK)
  assert long < 1.7 * short and long < 4 * (8 * CHUNK) ** 2 * 4 / 5  # of the scores, in float32


def test_layers_do_not_keep_the_masks_of_all_pairs_of_chunks():
  q, k, v, slope = inputs(48, 2, 1)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def layer(x, _):
    return x + chunked_attention(x, k, v, None, None, 16), None

  def loss(q):
    return (jax.lax.scan(layer, q, None, length=2)[0] * slope).sum()

  assert "bool[6," not in str(jax.make_jaxpr(jax.grad(loss))(q))  # 3 chunks meet in 6 pairs


@pytest.mark.parametrize("windows", [(), (None, 700)])
def test_a_model_with_long_rows(windows):
  config = LlamaConfig(32, 16, 24, 2, 2, 1, 8, windows=windows)
  ids = jax.random.randint(jax.random.key(0), (1, CHUNK + 300), 0, 32)
  hidden = [Llama(config, attention=kind, rngs=nnx.Rngs(0)).hidden(ids) for kind in ("auto", "xla")]
  np.testing.assert_allclose(*hidden, rtol=0, atol=1e-5)


def test_cudnn_is_refused_where_it_would_be_wrong():
  q, k, v, _ = inputs(16, 2, 1)
  with pytest.raises(ValueError, match="takes no rows of several segments"):
    attend_within(jnp.ones((2, 16), jnp.int32), None, "cudnn")(q, k, v)
  with pytest.raises(ValueError, match="takes no windows"):
    attend_within(None, jnp.int32(4), "cudnn")(q, k, v)
  with pytest.raises(ValueError, match="takes no capped scores"):
    attend_within(None, None, "cudnn", Scoring(cap=50.0))(q, k, v)
  with pytest.raises(ValueError, match=r"cannot take queries of shape \(2, 16, 2, 8\) in float32"):
    attend_within(None, None, "cudnn")(q, k, v)
  config = LlamaConfig(32, 16, 24, 2, 2, 1, 8, windows=(None, 4))
  check_attention(Settings(dtype="bfloat16"), config)
  capped = LlamaConfig(32, 16, 24, 2, 2, 1, 8, attn_logit_softcapping=50.0)
  for each, message in ((config, "takes no windows"), (capped, "takes no capped scores")):
    with pytest.raises(ValueError, match=message):
      check_attention(Settings(dtype="bfloat16", attention="cudnn"), each)


def test_cudnn_is_asked_for_a_causal_mask_and_nothing_else(monkeypatch):
  asked = {}

  def attention_of_jax(q, k, v, **options):
    asked.update(options)
    return q

  monkeypatch.setattr(attention.jax.nn, "dot_product_attention", attention_of_jax)
  q, k, v, _ = inputs(16, 2, 1, dtype=jnp.bfloat16)
  attend_within(None, None, "cudnn")(q, k, v)
  assert asked == {"is_causal": True, "implementation": "cudnn", "scale": None}


def test_an_unknown_kind_is_refused():
  with pytest.raises(ValueError, match="must be one of auto, chunked, xla, cudnn, got 'flash'"):
    unknown: Any = "flash"
    Llama(LlamaConfig(32, 16, 24, 2, 2, 1, 8), attention=unknown, rngs=nnx.Rngs(0))
