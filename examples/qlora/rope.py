"""Rotary position embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from llama_config import LlamaConfig

Rope = tuple[jax.Array, jax.Array]


def rope_tables(positions: jax.Array, config: LlamaConfig) -> Rope:
  r"""Cosines and sines of the rotary embedding.

  The angle of pair :math:`i` at position :math:`p` is :math:`p f_i`, where the frequency
  :math:`f_i` is :math:`\theta^{-2i/d}`, changed by the configuration's `rope_scaling`.

  Args:
    positions: integer positions, (..., T).
    config: gives the head's size d, the base and the scaling.

  Returns:
    Two float32 arrays (..., T, 1, head_dim / 2); the 1 stands for the heads.
  """
  frequency = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
  magnitude = 1.0
  if config.rope_scaling is not None:
    frequency = config.rope_scaling(frequency, config.rope_theta)
    magnitude = config.rope_scaling.magnitude
  angle = positions.astype(jnp.float32)[..., None, None] * frequency.astype(np.float32)
  return magnitude * jnp.cos(angle), magnitude * jnp.sin(angle)


def apply_rope(x: jax.Array, rope: Rope) -> jax.Array:
  """Turns the pairs (i, i + d/2) of each head of `x` (B, T, heads, d)."""
  cos, sin = rope
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)
