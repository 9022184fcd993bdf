"""A Llama, or one of its relatives, in Flax NNX, for fine-tuning.

The modules carry Hugging Face's names. The layers are one `Block` whose weights have a leading
layer axis; it is scanned, so the program does not grow with depth, and each layer's forward pass
is computed again in the backward pass, so that gradients never hold more than one layer's
dequantized weights. (Unrolled layers of a 16-layer NF4 model kept 10 times the memory.)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem.qlora.models.attention import (
  AttentionKind,
  attend_within,
  check_kind,
  positions_in_segments,
  segments_of_lengths,
  windows_of_layers,
)
from optax_lowmem.qlora.models.cache import Cache, attend_cached, empty_cache
from optax_lowmem.qlora.models.llama_block import Block
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.models.norms import rms_norm
from optax_lowmem.qlora.models.rope import rope_of, rope_tables, ropes_of_layers
from optax_lowmem.qlora.models.scores import Scoring, capped


class LlamaModel(nnx.Module):
  """Token ids to the last hidden state.

  Invariants: every variable under `layers` has a leading axis of `config.num_hidden_layers`.
  """

  def __init__(self, config: LlamaConfig, *, dtype: Any, attention: AttentionKind, rngs: nnx.Rngs):
    self.config = config
    self.attention: AttentionKind = attention
    self.scoring = Scoring(config.attention_scale, config.attn_logit_softcapping)
    self.embed_tokens = nnx.Embed(
      config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs
    )

    @nnx.split_rngs(splits=config.num_hidden_layers)
    @nnx.vmap
    def stacked(rngs):
      return Block(config, dtype=dtype, rngs=rngs)

    self.layers = stacked(rngs)
    self.norm = rms_norm(config, config.hidden_size, dtype=dtype, rngs=rngs)

  def __call__(self, input_ids: jax.Array, positions: jax.Array, segments: jax.Array | None):
    around = self.around(input_ids, positions, segments)  # once, not once a layer
    # jax.lax.scan over the split module and not nnx.scan: that refuses variables of different
    # trace levels, which is what `jax.grad` over `nnx.merge` of some of them gives.
    graphdef, random, weights = nnx.split(self.layers, nnx.RngState, ...)

    # Only the layer's input is kept. Keeping the results of the matrix products of SmolLM2-135M
    # at 4 x 128 tokens saves 14 % of a step's time and costs 260 MiB on top of 96.
    # prevent_cse: the two passes are in different loops, there is nothing to merge.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def layer(x, inputs):
      state, own = inputs
      block = nnx.merge(graphdef, *state)
      x = self.layer(block, x, around, own)
      return x, nnx.state(block, nnx.RngState)

    inputs = (random, weights), self.of_layers()
    x, random = jax.lax.scan(layer, self.embedded(input_ids), inputs)
    nnx.update(self.layers, random)  # dropout's counters move on
    return self.norm(x)

  def around(
    self, input_ids: jax.Array, positions: jax.Array, segments: jax.Array | None
  ) -> tuple[Any, Any]:
    """What all layers are given beside the residual stream."""
    return rope_tables(positions, self.config, input_ids.shape[1]), segments

  def of_layers(self) -> tuple[Any, Any]:
    """What each layer is given of its own, along the first axis."""
    return windows_of_layers(self.config), ropes_of_layers(self.config)

  def layer(self, block: Block, x: jax.Array, around: Any, own: Any) -> jax.Array:
    """The residual stream after one layer, of what `around` and `of_layers` give."""
    (ropes, segments), (window, way) = around, own
    attend = attend_within(segments, window, self.attention, self.scoring)
    return block(x, rope_of(ropes, way), attend)[0]

  def embedded(self, input_ids: jax.Array) -> jax.Array:
    """The residual stream before the first layer."""
    x = self.embed_tokens(input_ids)
    multiplier = self.config.embedding_multiplier
    return x if multiplier == 1 else x * multiplier  # rounded to the dtype first, as Gemma's is

  def extend(self, input_ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """As `__call__`, for tokens that follow those in the cache; its lengths stay as they are."""
    positions = cache.lengths[:, None] + jnp.arange(input_ids.shape[1], dtype=jnp.int32)
    ropes = rope_tables(positions, self.config, cache.slots)
    graphdef, random, weights = nnx.split(self.layers, nnx.RngState, ...)

    # The cache is carried, not scanned over: a scan would copy all of it for every token.
    def layer(carry, inputs):
      x, cache = carry
      state, number, window, way = inputs
      block = nnx.merge(graphdef, *state)
      attend = attend_cached(cache, number, positions, window, self.scoring)
      x, (keys, values) = block(x, rope_of(ropes, way), attend)
      return (x, cache._replace(keys=keys, values=values)), nnx.state(block, nnx.RngState)

    numbers = jnp.arange(self.config.num_hidden_layers)
    options = windows_of_layers(self.config), ropes_of_layers(self.config)
    inputs = (random, weights), numbers, *options
    (x, cache), random = jax.lax.scan(layer, (self.embedded(input_ids), cache), inputs)
    nnx.update(self.layers, random)
    return self.norm(x), cache


class Llama(nnx.Module):
  """Hugging Face's ``LlamaForCausalLM`` or a relative; made by `load_llama` or `abstract_llama`.

  Args:
    config: the model's configuration.
    dtype: of the weights and of the computation. Norms, rotary embeddings and softmax are
      float32 in any case.
    attention: how whole rows attend, as in `attend_within`; what is read into a cache has its
      own way.
    rngs: gives random initial weights.
  """

  def __init__(
    self,
    config: LlamaConfig,
    *,
    dtype: Any = jnp.float32,
    attention: AttentionKind = "auto",
    rngs: nnx.Rngs,
  ):
    check_kind(attention)
    self.config = config
    self.model = LlamaModel(config, dtype=dtype, attention=attention, rngs=rngs)
    if not config.tie_word_embeddings:
      self.lm_head = nnx.Linear(
        config.hidden_size,
        config.vocab_size,
        use_bias=False,
        dtype=dtype,
        param_dtype=dtype,
        rngs=rngs,
      )

  def __call__(
    self,
    input_ids: jax.Array,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    lengths: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the logits (B, T, vocabulary): `head` of `hidden`."""
    return self.head(
      self.hidden(input_ids, positions=positions, segments=segments, lengths=lengths)
    )

  def hidden(
    self,
    input_ids: jax.Array,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    lengths: jax.Array | None = None,
  ) -> jax.Array:
    """The last hidden state, normalized.

    A row may hold several sequences one after another, and padding. A token attends to the tokens
    of its own segment up to itself and to no other, so that each sequence comes out as it would
    alone.

    Args:
      input_ids: token ids (B, T).
      positions: (B, T) or (1, T) integers; by default they count from 0 in each segment.
      segments: (B, T) int32, the number of the sequence a token belongs to; 0 is padding, of which
        what comes out means nothing. By default a row is one sequence.
      lengths: (B,) the number of tokens of each row that are not padding: short for segments of 1
        with 0 behind them.

    Returns:
      An array (B, T, hidden_size).

    Raises:
      ValueError: for both `segments` and `lengths`, or for shapes that do not fit `input_ids`.
    """
    batch, time = input_ids.shape
    if lengths is not None:
      if segments is not None:
        raise ValueError("`segments` and `lengths` were both given; `segments` says it all.")
      segments = segments_of_lengths(lengths, time)
    if segments is not None and segments.shape != (batch, time):
      raise ValueError(
        f"`segments` must have the shape of `input_ids`, {(batch, time)}, got {segments.shape}."
      )
    if positions is None:
      one = jnp.arange(time, dtype=jnp.int32)[None]
      positions = one if segments is None else positions_in_segments(segments)
    elif positions.shape not in ((batch, time), (1, time)):
      raise ValueError(
        f"`positions` must be of shape {(batch, time)} or {(1, time)}, got {positions.shape}."
      )
    return self.model(input_ids, positions, segments)

  def init_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
    """An empty cache for `extend`.

    Args:
      batch: the number of rows.
      length: how many tokens a row may come to have.
      dtype: of the stored keys and values; by default that of the computation.

    Returns:
      Zeros; 2 * layers * key-value heads * head_dim numbers for each slot of a row.
    """
    dtype = self.model.embed_tokens.dtype if dtype is None else dtype
    return empty_cache(self.config, batch, length, dtype)

  def extend(
    self, input_ids: jax.Array, cache: Cache, lengths: jax.Array | None = None
  ) -> tuple[jax.Array, Cache]:
    """The hidden states of tokens that follow those in the cache.

    A prompt and a single token are both read by this: ``extend(prompt, init_cache(...))``, then
    ``extend(token, cache)``. The caller sees to it that rows do not outgrow the cache; under `jit`
    that cannot be checked.

    Args:
      input_ids: (B, T), each row padded on the right.
      cache: what was read before.
      lengths: (B,) how many of each row's tokens are not padding; all by default.

    Returns:
      The hidden states (B, T, hidden_size), as `hidden` gives them, and the cache with the tokens.

    Raises:
      ValueError: if `input_ids` and the cache differ in their number of rows, or if `input_ids`
        alone is longer than the cache.
    """
    batch, time = input_ids.shape
    if batch != len(cache.lengths) or time > cache.slots:
      raise ValueError(
        f"`input_ids` of shape {(batch, time)} do not fit a cache of {len(cache.lengths)} rows "
        f"and {cache.slots} slots."
      )
    hidden, cache = self.model.extend(input_ids, cache)
    return hidden, cache._replace(lengths=cache.lengths + (time if lengths is None else lengths))

  def head(self, hidden: jax.Array) -> jax.Array:
    """Logits of hidden states (..., hidden_size); take a few at a time to save memory."""
    config = self.config
    if config.tie_word_embeddings:
      # nnx.Embed.attend multiplies by the transpose, of which XLA keeps a copy under
      # jax.value_and_grad on CPU: 108 MiB more for SmolLM2-135M's table.
      table = self.model.embed_tokens.embedding[...].astype(hidden.dtype)
      logits = jax.lax.dot_general(hidden, table, (((hidden.ndim - 1,), (1,)), ((), ())))
    else:
      logits = self.lm_head(hidden)
    if config.logits_scaling != 1:
      logits = logits / config.logits_scaling
    return capped(logits, config.final_logit_softcapping)
