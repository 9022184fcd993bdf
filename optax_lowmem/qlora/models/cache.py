"""Keys and values of what a model has read, so that one more token costs one token."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_lowmem.qlora.models.attention import Attend, attend_masked
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.models.scores import PLAIN, Scoring


class Cache(NamedTuple):
  """What the layers remember of each row.

  Slot p of a row holds its token at position p. Rows are of different lengths, so padding stands on
  the right; what it leaves in the slots behind a row's end is overwritten by the tokens to come
  before any of them looks there.
  """

  keys: jax.Array  # (layers, B, slots, key-value heads, head_dim)
  values: jax.Array  # the same
  lengths: jax.Array  # (B,) int32, how many tokens each row has

  @property
  def slots(self) -> int:
    return self.keys.shape[2]


def empty_cache(config: LlamaConfig, batch: int, length: int, dtype: Any) -> Cache:
  """A cache of `length` slots for each of `batch` rows; see `Llama.init_cache`."""
  if batch < 1 or length < 1:
    raise ValueError(f"`batch` and `length` must be at least 1, got {batch} and {length}.")
  heads = config.num_key_value_heads, config.head_dim
  shape = (config.num_hidden_layers, batch, length, *heads)
  return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))


def attend_cached(
  cache: Cache,
  layer: jax.Array,
  positions: jax.Array,
  window: jax.Array | None,
  scoring: Scoring = PLAIN,
) -> Attend:
  """Attention of new tokens to the cache and to each other.

  What is kept is the cache's keys and values, with those of the new tokens in their slots. Padding
  beyond the last slot is dropped.

  Args:
    cache: as the layers before left it.
    layer: the layer's number.
    positions: (B, T), those of the new tokens.
    window, scoring: as in `attend_within`.
  """

  def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
    place = layer, jnp.arange(len(positions))[:, None], positions
    keys = cache.keys.at[place].set(k.astype(cache.keys.dtype), mode="drop")
    values = cache.values.at[place].set(v.astype(cache.values.dtype), mode="drop")
    distance = positions[:, :, None] - jnp.arange(cache.slots)
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    held = keys[layer].astype(q.dtype), values[layer].astype(q.dtype)
    out = attend_masked(q, *held, seen[:, None], scoring)
    return out, (keys, values)

  return attend
