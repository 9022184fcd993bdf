"""What the model says: continuations of held-out prompts."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chat import ChatTokenizer
from data import Row

NEW_TOKENS = 48
TEMPERATURE = 0.7


def generate(
  graph: Any, stop_ids: tuple[int, ...], variables: Any, ids: jax.Array, start: jax.Array
) -> jax.Array:
  """Continues each row of `ids` from its position `start` by at most `NEW_TOKENS` tokens.

  There is no cache of keys and values: each new token costs a forward pass over the whole row.

  Args:
    graph, variables: a model, as ``nnx.split`` gives it.
    stop_ids: any of these ends a row.
    ids: (rows, length); what stands from `start` on is overwritten.
    start: (rows,), how many tokens of each row are the prompt.
  """
  row = jnp.arange(len(ids))

  def body(carry: Any) -> Any:
    i, ids, key, done = carry
    model = nnx.merge(graph, *variables, copy=True)
    logits = model.head(model.hidden(ids)[row, start + i - 1]).astype(jnp.float32)
    key, now = jax.random.split(key)
    token = jax.random.categorical(now, logits / TEMPERATURE)
    token = jnp.where(done, stop_ids[0], token)
    ids = ids.at[row, start + i].set(token)
    return i + 1, ids, key, done | jnp.isin(token, jnp.asarray(stop_ids))

  first = (0, ids, jax.random.key(0), jnp.zeros(len(ids), bool))
  return jax.lax.while_loop(lambda c: (c[0] < NEW_TOKENS) & ~c[3].all(), body, first)[1]


class Samples:
  """Two held-out prompts, to be continued before and after training.

  A prompt is what stands before the first answer of a row; in plain text, its first tokens.
  """

  def __init__(self, graph: Any, tokenizer: ChatTokenizer, rows: Sequence[Row], count: int = 2):
    self.tokenizer, self.rows = tokenizer, list(rows[:count])
    self.starts = np.array([_prompt_length(row) for row in self.rows], np.int32)
    self.generate = jax.jit(partial(generate, graph, tokenizer.stop_ids))

  def __call__(self, *variables: Any) -> list[dict[str, str]]:
    """``{"prompt", "data", "model"}``: a prompt, its answer in the data, and the model's."""
    ids = np.zeros((len(self.rows), int(self.starts.max()) + NEW_TOKENS), np.int32)
    for row, start, line in zip(self.rows, self.starts, ids, strict=True):
      line[:start] = row.ids[:start]
    said = np.asarray(self.generate(variables, ids, self.starts))
    return [
      {
        "prompt": self.tokenizer.decode(row.ids[:start]),
        "data": self.tokenizer.decode(self._answer(row.ids[start:])),
        "model": self.tokenizer.decode(self._answer(line[start : start + NEW_TOKENS])),
      }
      for row, start, line in zip(self.rows, self.starts, said, strict=True)
    ]

  def _answer(self, ids: np.ndarray) -> np.ndarray:
    stops = np.flatnonzero(np.isin(ids, self.tokenizer.stop_ids))
    return ids[: stops[0]] if len(stops) else ids


def _prompt_length(row: Row) -> int:
  first = int(row.learned.argmax())
  return first if first > 0 else max(1, min(16, len(row.ids) // 2))
