"""Grouped-query attention: causal, and within a row's own segments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem.qlora.models.chunked_attention import CHUNK, chunked_attention
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.models.norms import rms_norm
from optax_lowmem.qlora.models.rope import Rope, apply_rope
from optax_lowmem.qlora.models.scores import PLAIN, Scoring

# Queries, keys and values (B, T, heads, head_dim) to what the queries see, (B, T, heads, head_dim),
# and anything to be kept.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def segments_of_lengths(lengths: jax.Array, time: int) -> jax.Array:
  """One segment a row: (B, `time`) int32, 1 for the first `lengths[b]` tokens and 0 after them.

  >>> segments_of_lengths(jnp.array([2, 3]), 3).tolist()
  [[1, 1, 0], [1, 1, 1]]
  """
  return (jnp.arange(time) < lengths[:, None]).astype(jnp.int32)


def positions_in_segments(segments: jax.Array) -> jax.Array:
  """The place of each token in its segment, (B, T) int32.

  A segment is a run of equal numbers in `segments` (B, T).

  >>> positions_in_segments(jnp.array([[1, 1, 1, 2, 2, 0]])).tolist()
  [[0, 1, 2, 0, 1, 0]]
  """
  index = jnp.arange(segments.shape[1], dtype=jnp.int32)
  begins = segments != jnp.roll(segments, 1, axis=1)
  return index - jax.lax.cummax(jnp.where(begins & (index > 0), index, 0), axis=1)


def windows_of_layers(config: LlamaConfig) -> jax.Array | None:
  """The window of each layer, int32; None where no layer has one, so that no mask is made."""
  if not any(config.windows):
    return None
  unlimited = jnp.iinfo(jnp.int32).max
  return jnp.array([unlimited if w is None else w for w in config.windows], jnp.int32)


AttentionKind = Literal["auto", "chunked", "xla", "cudnn"]
KINDS = ("auto", "chunked", "xla", "cudnn")


def check_kind(kind: str) -> None:
  """Refuses what is no kind of attention."""
  if kind not in KINDS:
    raise ValueError(f"`attention` must be one of {', '.join(KINDS)}, got {kind!r}.")


def attend_within(
  segments: jax.Array | None,
  window: jax.Array | None,
  kind: AttentionKind = "auto",
  scoring: Scoring = PLAIN,
) -> Attend:
  """Causal attention of whole rows; each token sees its own segment up to itself.

  Args:
    segments: (B, T) int32, or None where each row is one segment.
    window: how many tokens one sees at most, itself among them; None for no limit.
    kind: `"xla"` holds all scores of a layer at once; `"chunked"` those of two chunks of a row
      (`chunked_attention`), where a row is longer than a chunk; `"cudnn"` is cuDNN's kernel, which
      holds none. `"auto"` is `"chunked"`: no card has run cuDNN's against it yet.
    scoring: what becomes of a product of a query and a key.

  Returns:
    A function of queries, keys and values. With `"cudnn"` it raises a ValueError for segments, for
    windows, for capped scores, and for what cuDNN, or a machine without it, does not take.
  """
  check_kind(kind)

  def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
    if kind == "cudnn":
      return _cudnn(q, k, v, segments, window, scoring), None
    if kind != "xla" and q.shape[1] > CHUNK:
      return chunked_attention(q, k, v, segments, window, CHUNK, scoring), None
    return _whole(q, k, v, segments, window, scoring), None

  return attend


def _whole(
  q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, window: Any, scoring: Scoring
) -> jax.Array:
  # The mask is made of comparisons, which XLA fuses into the softmax; both are float32.
  mask = None if segments is None else (segments[:, :, None] == segments[:, None])[:, None]
  if window is not None:
    index = jnp.arange(q.shape[1])
    near = (index[:, None] - index < window)[None, None]
    mask = near if mask is None else mask & near
  return attend_masked(q, k, v, mask, scoring, is_causal=True)


def attend_masked(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array | None,
  scoring: Scoring,
  *,
  is_causal: bool = False,
) -> jax.Array:
  """Attention with all scores at once.

  Args:
    q: queries (B, T, heads, head_dim).
    k: keys (B, S, key-value heads, head_dim).
    v: values, as the keys.
    mask: (B or 1, 1, T, S), true where a query sees a key; None for everywhere.
    scoring: what becomes of a product of a query and a key.
    is_causal: no query sees a key that comes after it.

  Returns:
    What the queries see, (B, T, heads, head_dim).
  """
  if scoring.cap is None:
    return jax.nn.dot_product_attention(
      q, k, v, mask=mask, scale=scoring.scale, is_causal=is_causal
    )
  # jax.nn caps no scores.
  if is_causal:
    causal = jnp.tri(q.shape[1], k.shape[1], dtype=bool)[None, None]
    mask = causal if mask is None else mask & causal
  grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
  products = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
  scores = scoring.scores(products, q.shape[-1])
  if mask is not None:
    scores = jnp.where(mask[:, :, None], scores, -0.7 * jnp.finfo(jnp.float32).max)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


def _cudnn(
  q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, window: Any, scoring: Scoring
) -> jax.Array:
  # cuDNN has a causal mask, but none of segments, and a window only of a size that is known when
  # the program is made. A mask given as an array would be as large as the scores.
  refused = {
    "rows of several segments": segments,
    "windows": window,
    "capped scores": scoring.cap,
  }
  for name, given in refused.items():
    if given is not None:
      raise ValueError(f"`attention` 'cudnn' takes no {name}. Choose 'chunked'.")
  try:
    return jax.nn.dot_product_attention(
      q, k, v, scale=scoring.scale, is_causal=True, implementation="cudnn"
    )
  except (RuntimeError, NotImplementedError, ValueError) as error:
    raise ValueError(
      f"`attention` 'cudnn' cannot take queries of shape {q.shape} in {q.dtype.name} here: "
      f"{' '.join(str(error).split()).removesuffix('.')}. It needs an NVIDIA GPU, cuDNN and "
      "bfloat16. Choose 'chunked'."
    ) from error


class Attention(nnx.Module):
  """The projections around an `Attend`."""

  def __init__(self, config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs):
    d, self.head_dim = config.hidden_size, config.head_dim
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=dtype, rngs=rngs)
    inward = functools.partial(linear, use_bias=config.qkv_bias)
    self.fused, self.splits = config.fused_linears, (q, q + kv)
    if self.fused:
      self.qkv_proj = inward(d, q + 2 * kv)
    else:
      self.q_proj, self.k_proj, self.v_proj = inward(d, q), inward(d, kv), inward(d, kv)
    self.o_proj = linear(q, d, use_bias=config.o_bias)
    self.qk_norm, self.qk_norm_by_head = config.qk_norm, config.qk_norm_by_head
    if config.qk_norm:
      norm = functools.partial(rms_norm, config, dtype=dtype, rngs=rngs)
      sizes = (self.head_dim, self.head_dim) if config.qk_norm_by_head else (q, kv)
      self.q_norm, self.k_norm = map(norm, sizes)

  def __call__(self, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, Any]:
    q, k, v = self._projected(x)
    if self.qk_norm and not self.qk_norm_by_head:
      q, k = self.q_norm(q), self.k_norm(k)
    q, k, v = (each.reshape(*x.shape[:-1], -1, self.head_dim) for each in (q, k, v))
    if self.qk_norm and self.qk_norm_by_head:
      q, k = self.q_norm(q), self.k_norm(k)
    out, kept = attend(apply_rope(q, rope), apply_rope(k, rope), v)
    return self.o_proj(out.reshape(*x.shape[:-1], -1)), kept

  def _projected(self, x: jax.Array) -> Sequence[jax.Array]:
    if self.fused:
      return jnp.split(self.qkv_proj(x), self.splits, axis=-1)
    return self.q_proj(x), self.k_proj(x), self.v_proj(x)
