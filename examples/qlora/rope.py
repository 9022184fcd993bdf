"""Rotary position embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Rope = tuple[jax.Array, jax.Array]


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> Rope:
  r"""Cosines and sines of the rotary embedding.

  The angle of pair :math:`i` at position :math:`p` is :math:`p \cdot \theta^{-2i/d}`.

  Args:
    positions: integer positions, (..., T).
    head_dim: the head's size d.
    theta: the base.

  Returns:
    Two float32 arrays (..., T, 1, head_dim / 2); the 1 stands for the heads.
  """
  frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angle = positions.astype(jnp.float32)[..., None, None] * frequency
  return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: jax.Array, rope: Rope) -> jax.Array:
  """Turns the pairs (i, i + d/2) of each head of `x` (B, T, heads, d)."""
  cos, sin = rope
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)
