"""What attention makes of the product of a query and a key before the softmax."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Scoring(NamedTuple):
  """A product times `scale`, then held between -`cap` and `cap`.

  Attributes:
    scale: by default one over the square root of the head's size.
    cap: scores are ``cap * tanh(score / cap)``; None leaves them as they are.
  """

  scale: float | None = None
  cap: float | None = None

  def factor(self, head_dim: int) -> np.float32:
    return np.float32(1 / np.sqrt(head_dim) if self.scale is None else self.scale)

  def scores(self, products: jax.Array, head_dim: int) -> jax.Array:
    """Scores of products, both float32."""
    return capped(self.factor(head_dim) * products, self.cap)

  def slope(self, scores: jax.Array, head_dim: int) -> jax.Array:
    """How much a score grows with its product; 0 where a mask has put a score out of reach."""
    factor = jnp.asarray(self.factor(head_dim))
    if self.cap is None:
      return factor
    return factor * (1 - jnp.square(jnp.clip(scores / self.cap, -1, 1)))


PLAIN = Scoring()


def capped(x: jax.Array, cap: float | None) -> jax.Array:
  """Soft-capping, as Gemma 2 has it.

  >>> capped(jnp.array([0.0, 1000.0]), 50.0).tolist()
  [0.0, 50.0]
  """
  return x if cap is None else cap * jnp.tanh(x / cap)
