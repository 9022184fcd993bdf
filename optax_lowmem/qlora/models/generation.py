"""Continues prompts with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optax_lowmem.qlora.models.cache import Cache


class Generated(NamedTuple):
  """What `generate` gives."""

  tokens: jax.Array  # (B, new_tokens) int32; behind a row's stop, that stop again
  steps: jax.Array  # int32, how many tokens were made before every row had stopped


def choose(
  logits: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array
) -> jax.Array:
  """One token of each row: the likeliest at temperature 0, else drawn.

  Args:
    logits: (B, vocabulary).
    key: for the draw.
    temperature: the logits are divided by it.
    top_p: only the likeliest tokens are drawn that together have at least this probability.

  Returns:
    Token ids (B,), int32.
  """
  logits = logits.astype(jnp.float32)

  def likeliest(_: Any) -> jax.Array:
    return logits.argmax(axis=-1).astype(jnp.int32)

  def nucleus(logits: jax.Array) -> jax.Array:
    ordered = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(ordered, axis=-1)
    kept = jnp.cumsum(probability, axis=-1) - probability < top_p  # the first one always is
    lowest = jnp.where(kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)

  def drawn(_: Any) -> jax.Array:
    scaled = logits / temperature
    scaled = jax.lax.cond(top_p < 1, nucleus, lambda x: x, scaled)
    return jax.random.categorical(key, scaled).astype(jnp.int32)

  return jax.lax.cond(temperature > 0, drawn, likeliest, None)


def padded(prompts: Sequence[Sequence[int] | np.ndarray], smallest: int = 32) -> Any:
  """Prompts in one array (B, T), T a power of two if not `smallest`, and their lengths (B,)."""
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  time = max(smallest, 1 << int(lengths.max() - 1).bit_length())
  ids = np.zeros((len(prompts), time), np.int32)
  for row, prompt in zip(ids, prompts, strict=True):
    row[: len(prompt)] = prompt
  return ids, lengths


def read(model: Any, ids: jax.Array, cache: Cache, lengths: jax.Array, *draw: Any) -> Any:
  """The token that follows each row, by `choose` with `draw`, and the cache with the rows in it."""
  hidden, cache = model.extend(ids, cache, lengths)
  last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
  return choose(model.head(last), *draw), cache


def generate(
  graph: Any,
  stop_ids: tuple[int, ...],
  new_tokens: int,
  variables: Any,
  ids: jax.Array,
  lengths: jax.Array,
  key: jax.Array,
  temperature: jax.Array,
  top_p: jax.Array,
) -> Generated:
  """Continues each row by at most `new_tokens` tokens, until all rows have stopped.

  Args:
    graph, variables: a model in evaluation mode, as ``nnx.split`` gives it.
    stop_ids: any of these ends a row; none if empty.
    new_tokens: at least 1.
    ids: prompts (B, T), padded on the right.
    lengths: (B,) how many tokens each prompt has, at least 1.
    key, temperature, top_p: as in `choose`.

  Returns:
    The new tokens and how many steps were made.
  """
  stops = jnp.array(stop_ids, jnp.int32)

  def fresh() -> Any:  # for each trace: variables of the outer one cannot be set inside the loop
    return nnx.merge(graph, *variables, copy=True)

  def more(carry: Any) -> jax.Array:
    step, done = carry[0], carry[-1]
    return (step < new_tokens) & ~done.all()

  def body(carry: Any) -> Any:
    step, token, cache, tokens, key, done = carry
    key, now = jax.random.split(key)
    one = jnp.ones_like(lengths)
    new, cache = read(fresh(), token[:, None], cache, one, now, temperature, top_p)
    token = jnp.where(done, token, new)
    tokens = tokens.at[:, step].set(token)
    return step + 1, token, cache, tokens, key, done | jnp.isin(token, stops)

  key, now = jax.random.split(key)
  batch, time = ids.shape
  cache = fresh().init_cache(batch, time + new_tokens)
  token, cache = read(fresh(), ids, cache, lengths, now, temperature, top_p)
  tokens = jnp.broadcast_to(token[:, None], (batch, new_tokens))
  first = jnp.int32(1), token, cache, tokens, key, jnp.isin(token, stops)
  steps, token, _, tokens, _, _ = jax.lax.while_loop(more, body, first)
  made = jnp.arange(new_tokens) < steps
  return Generated(jnp.where(made, tokens, token[:, None]), steps)


class Generator:
  """Continues prompts of any lengths.

  A prompt is padded to a power of two, so that one compiled program serves many lengths; another
  number of rows needs another program. Temperature and top-p do not.

  Args:
    graph: of a model in evaluation mode, as ``nnx.split`` gives it.
    stop_ids: any of these ends a row.
    new_tokens: how many tokens a row may get.
    smallest: the shortest length that prompts are padded to.

  Raises:
    ValueError: if `new_tokens` or `smallest` is less than 1.
  """

  def __init__(
    self, graph: Any, stop_ids: Sequence[int], new_tokens: int = 48, *, smallest: int = 32
  ):
    if new_tokens < 1 or smallest < 1:
      raise ValueError(
        f"`new_tokens` and `smallest` must be at least 1, got {new_tokens} and {smallest}."
      )
    self.stop_ids, self.new_tokens, self.smallest = tuple(stop_ids), new_tokens, smallest
    self.compiled = jax.jit(partial(generate, graph, self.stop_ids, new_tokens))

  def __call__(
    self,
    variables: Any,
    prompts: Sequence[np.ndarray],
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
  ) -> list[np.ndarray]:
    """What follows each prompt, without the token that stops it.

    Args:
      variables: the rest of what ``nnx.split`` gave.
      prompts: token ids, one array a row.
      temperature: 0 takes the likeliest token each time.
      top_p: of the draw at other temperatures; see `choose`.
      seed: of the draw.

    Returns:
      One int32 array a prompt.

    Raises:
      ValueError: for no prompts or an empty one, a negative temperature, or a `top_p` that is no
        probability above 0.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
      raise ValueError("`prompts` must hold at least one prompt, each of at least one token.")
    if not 0 <= temperature < float("inf"):
      raise ValueError(f"`temperature` must be 0 or a positive number, got {temperature}.")
    if not 0 < top_p <= 1:
      raise ValueError(f"`top_p` must be above 0 and at most 1, got {top_p}.")
    ids, lengths = padded(prompts, self.smallest)
    draw = jax.random.key(seed), jnp.float32(temperature), jnp.float32(top_p)
    made = self.compiled(variables, ids, lengths, *draw)
    return [self._until_stop(row) for row in np.asarray(made.tokens)]

  def _until_stop(self, tokens: np.ndarray) -> np.ndarray:
    stops = np.flatnonzero(np.isin(tokens, self.stop_ids))
    return tokens[: stops[0]] if len(stops) else tokens
