"""Causal attention whose memory grows with the length of a row, not with its square.

Queries and keys are cut into chunks, and one chunk of queries meets one of keys at a time: of the
scores no more than that is ever held. The softmax is that of the whole row; its largest score and
its sum are carried from chunk to chunk, and the backward pass computes the scores again.

One row of 4,096 tokens of 32 heads of 128, bfloat16, gradient included, compiled for an H100:
4.03 GiB of temporaries with whole scores (`jax.nn.dot_product_attention`), 0.32 here, 0.03 with
cuDNN's kernel; here 0.98 at 16,384 tokens, and 1.86 at 32,768.

References:
  Rabe and Staats, Self-attention Does Not Need O(n^2) Memory, 2021, arXiv:2112.05682.
  Dao, FlashAttention-2, 2023, arXiv:2307.08691.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowmem.qlora.models.scores import PLAIN, Scoring

CHUNK = 512


class Chunks(NamedTuple):
  """Padded to whole chunks, a group's query heads beside the key-value head they share.

  Attributes:
    q: (B, key-value heads, query heads of one, T, head_dim).
    k, v: (B, key-value heads, T, head_dim).
    segments: (B, T), or None.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  segments: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def chunked_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: jax.Array | None,
  window: jax.Array | None,
  chunk: int = CHUNK,
  scoring: Scoring = PLAIN,
) -> jax.Array:
  """Causal attention within segments and a window. Scores and softmax are float32.

  Keys in chunks behind that of the queries are not looked at.

  Args:
    q: queries (B, T, heads, head_dim).
    k: keys (B, T, key-value heads, head_dim).
    v: values, as the keys.
    segments: (B, T) int32, or None where each row is one segment.
    window: how many tokens one sees at most, itself among them; None for no limit.
    chunk: the most queries, and keys, of a chunk; they are of one size.
    scoring: what becomes of a product of a query and a key.

  Returns:
    What the queries see, (B, T, heads, head_dim).
  """
  return _forward(q, k, v, segments, window, chunk, scoring)[0]


def _forward(q, k, v, segments, window, chunk, scoring):
  size = _size(q.shape[1], chunk)
  cut = _cut(q, k, v, segments, size)
  count = cut.k.shape[2] // size

  def step(carry, pair):
    (top, total, seen), (out, norms) = carry
    i, j = pair
    # The first chunk of keys begins the row of queries anew; exp(-inf) is 0.
    top = jnp.where(j == 0, -jnp.inf, top)
    scores = _scores(cut, window, scoring, i, j, size)
    higher = jnp.maximum(top, scores.max(-1))
    weights, fade = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
    total = total * fade + weights.sum(-1)
    seen = seen * fade[..., None] + _dot(
      "bkgqs,bksh->bkgqh", weights.astype(v.dtype), _at(cut.v, j, size)
    )
    out = _put(out, (seen / total[..., None]).astype(q.dtype), i, size)
    norms = _put(norms, (higher + jnp.log(total))[..., None], i, size)
    return ((higher, total, seen), (out, norms)), None

  shape = (*cut.q.shape[:3], size)
  row = jnp.zeros(shape), jnp.zeros(shape), jnp.zeros((*shape, q.shape[-1]))
  start = row, (jnp.zeros_like(cut.q), jnp.zeros((*cut.q.shape[:4], 1)))
  (_, (out, norms)), _ = jax.lax.scan(step, start, _pairs(count, cut))
  out = _joined(out, q)
  return out, (q, k, v, segments, window, out, norms)


def _backward(chunk, scoring, residuals, slope):
  q, k, v, segments, window, out, norms = residuals
  size = _size(q.shape[1], chunk)
  cut = _cut(q, k, v, segments, size)
  count = cut.k.shape[2] // size
  slopes = _cut(slope, k, v, None, size).q
  # The softmax's own share of a score's slope is the same for all keys of a query.
  shared = (slope.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
  shared = _cut(shared, k, v, None, size).q

  def step(carry, pair):
    row, (dq, dk, dv) = carry
    i, j = pair
    keys, values, queries = _at(cut.k, j, size), _at(cut.v, j, size), _at(cut.q, i, size)
    given = _at(slopes, i, size)
    scores = _scores(cut, window, scoring, i, j, size)
    weights = jnp.exp(scores - _at(norms, i, size))
    of_weights = _dot("bkgqh,bksh->bkgqs", given, values)
    of_scores = weights * (of_weights - _at(shared, i, size))
    of_scores = (scoring.slope(scores, q.shape[-1]) * of_scores).astype(q.dtype)
    row = jnp.where(j == 0, 0.0, row) + _dot("bkgqs,bksh->bkgqh", of_scores, keys)
    dq = _put(dq, row.astype(q.dtype), i, size)
    of_keys = _dot("bkgqs,bkgqh->bksh", of_scores, queries)
    of_values = _dot("bkgqs,bkgqh->bksh", weights.astype(q.dtype), given)
    dk = _put(dk, _at(dk, j, size) + of_keys, j, size)
    dv = _put(dv, _at(dv, j, size) + of_values, j, size)
    return (row, (dq, dk, dv)), None

  # Keys and values are summed over all chunks of queries, in float32 as one product would.
  sums = jnp.zeros(cut.k.shape), jnp.zeros(cut.v.shape)
  start = jnp.zeros((*cut.q.shape[:3], size, q.shape[-1])), (jnp.zeros_like(cut.q), *sums)
  (_, (dq, dk, dv)), _ = jax.lax.scan(step, start, _pairs(count, cut))
  dk, dv = (_joined(x[:, :, None], k).astype(k.dtype) for x in (dk, dv))
  return _joined(dq, q), dk, dv, None, None


chunked_attention.defvjp(_forward, _backward)


def _size(time: int, chunk: int) -> int:
  """The size of equal chunks that pad least: 600 tokens are 2 of 304 and not 2 of 512."""
  size = -(-time // -(-time // chunk))
  return size + -size % 8


def _pairs(count: int, cut: Chunks) -> tuple[jax.Array, jax.Array]:
  """Which chunks of queries and of keys meet: each chunk of queries with those up to its own."""
  pairs = tuple(jnp.asarray(x, jnp.int32) for x in np.tril_indices(count))
  # Behind a barrier they are not known before the queries are. Else JAX computes what depends on
  # them alone, the masks, ahead of the layers, and keeps all: 16 GiB for 32,768 tokens of a 7B.
  return jax.lax.optimization_barrier((pairs, cut.q))[0]


def _cut(q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, size: int) -> Chunks:
  pad = -q.shape[1] % size  # behind all others, where causal attention does not look

  def heads_first(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

  q, k, v = heads_first(q), heads_first(k), heads_first(v)
  if segments is not None:
    segments = jnp.pad(segments, ((0, 0), (0, pad)))
  return Chunks(q.reshape(len(q), k.shape[1], -1, *q.shape[2:]), k, v, segments)


def _joined(x: jax.Array, like: jax.Array) -> jax.Array:
  """Heads behind the time again, without the padding."""
  x = x.reshape(len(x), -1, *x.shape[3:]).transpose(0, 2, 1, 3)
  return x[:, : like.shape[1]]


def _at(x: jax.Array, number: jax.Array, size: int) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x, number * size, size, axis=x.ndim - 2)


def _put(x: jax.Array, chunk: jax.Array, number: jax.Array, size: int) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(x, chunk, number * size, axis=x.ndim - 2)


def _dot(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _scores(
  cut: Chunks, window: Any, scoring: Scoring, i: jax.Array, j: jax.Array, size: int
) -> jax.Array:
  """Scores of the i-th chunk of queries at the j-th of keys, (B, ..., size, size) float32."""
  products = _dot("bkgqh,bksh->bkgqs", _at(cut.q, i, size), _at(cut.k, j, size))
  scores = scoring.scores(products, cut.q.shape[-1])
  index = jnp.arange(size, dtype=jnp.int32)
  distance = (i - j) * size + index[:, None] - index
  seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
  if cut.segments is not None:
    own, other = (_at(cut.segments[..., None], n, size)[..., 0] for n in (i, j))
    seen = seen & (own[:, :, None] == other[:, None])[:, None, None]
  # Finite, as in jax.nn: a chunk of which a query sees nothing has no NaN. What it adds to the sum
  # is wiped out when the query comes to a key that it sees, itself at the latest.
  return jnp.where(seen, scores, -0.7 * jnp.finfo(jnp.float32).max)
