"""Norms of the residual stream, of queries and of keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem.qlora.models.llama_config import LlamaConfig


class OffsetRMSNorm(nnx.RMSNorm):
  """Gemma's norm, which multiplies by one more than its weight.

  The weight is kept as the file has it, so that one that is trained is written as Gemma's.
  """

  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    wide = x.astype(jnp.float32)
    power = jnp.square(wide).mean(axis=-1, keepdims=True, where=mask)
    assert self.scale is not None  # `rms_norm` makes none without
    scale = 1 + self.scale[...].astype(jnp.float32)
    return (wide * jax.lax.rsqrt(power + self.epsilon) * scale).astype(self.dtype)


def rms_norm(config: LlamaConfig, size: int, *, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
  """A norm of the last axis, of the kind that the model has."""
  kind = OffsetRMSNorm if config.norm_offset else nnx.RMSNorm
  start = jax.nn.initializers.zeros if config.norm_offset else jax.nn.initializers.ones
  return kind(size, epsilon=config.rms_norm_eps, dtype=dtype, scale_init=start, rngs=rngs)
