"""A small GPT over bytes in Flax NNX, and text for it: what the examples beside this file train.

Nothing is downloaded. There are two texts, and both come with Python: its language reference, which
`help("assert")` prints, and the source code of some of its modules.
"""

import argparse
import inspect
import tarfile
from collections.abc import Callable, Iterator
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 256, 2, 4, 96, 8
ENGLISH = "\n\n".join(topics[name] for name in sorted(topics))
CODE = "\n\n".join(inspect.getsource(module) for module in (argparse, inspect, tarfile))


class Block(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.norm1 = nnx.RMSNorm(WIDTH, rngs=rngs)
    self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs)
    self.out = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
    self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs)
    self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
    self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    heads = (*x.shape[:-1], HEADS, WIDTH // HEADS)
    q, k, v = (part.reshape(heads) for part in jnp.split(self.qkv(self.norm1(x)), 3, axis=-1))
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + self.out(attended.reshape(x.shape))
    return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
  """Of (batch, length) bytes, the logits of the byte that follows each."""

  def __init__(self, rngs: nnx.Rngs):
    self.embed = nnx.Embed(256, WIDTH, rngs=rngs)
    self.position = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
    self.blocks = nnx.List(Block(rngs) for _ in range(LAYERS))
    self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
    self.lm_head = nnx.Linear(WIDTH, 256, use_bias=False, rngs=rngs)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))
    for block in self.blocks:
      x = block(x)
    return self.lm_head(self.norm(x))


def loss_of(model: Callable[[Any], jax.Array], tokens: jax.Array | np.ndarray) -> jax.Array:
  """Mean cross-entropy of each byte but the first, in nats."""
  logits = model(tokens[:, :-1])
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


class Text:
  """Batches of a text's first nine tenths, to learn from, and of the last, to measure with."""

  def __init__(self, text: str):
    data = np.frombuffer(text.encode(), np.uint8)
    self.learn, self.held_out = np.split(data, [len(data) * 9 // 10])

  def batch(self, step: int) -> np.ndarray:
    """What step number `step` sees: so a run that is resumed goes on where it was."""
    return _rows(self.learn, np.random.default_rng(step))

  def measured(self) -> Iterator[np.ndarray]:
    """Always the same eight batches."""
    rng = np.random.default_rng(0)
    return (_rows(self.held_out, rng) for _ in range(8))


def _rows(data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  starts = rng.integers(0, len(data) - CONTEXT - 1, BATCH)
  return data[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int32)
