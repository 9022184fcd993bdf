"""One layer of a Llama, or of one of its relatives."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem.qlora.models.attention import Attend, Attention
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.models.norms import rms_norm
from optax_lowmem.qlora.models.rope import Rope

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": jax.nn.gelu}


class MLP(nnx.Module):
  """``down(activation(gate(x)) * up(x))``."""

  def __init__(self, config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs):
    d, ff = config.hidden_size, config.intermediate_size
    linear = functools.partial(
      nnx.Linear, use_bias=config.mlp_bias, dtype=dtype, param_dtype=dtype, rngs=rngs
    )
    self.activation, self.fused = config.hidden_act, config.fused_linears
    if self.fused:
      self.gate_up_proj, self.down_proj = linear(d, 2 * ff), linear(ff, d)
    else:
      self.gate_proj, self.up_proj, self.down_proj = linear(d, ff), linear(d, ff), linear(ff, d)

  def __call__(self, x: jax.Array):
    if self.fused:
      gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
    else:
      gate, up = self.gate_proj(x), self.up_proj(x)
    return self.down_proj(ACTIVATIONS[self.activation](gate) * up)


class Block(nnx.Module):
  """One layer: attention and an MLP, each added to the residual stream.

  Which of the norms are there, and their names, is a matter of `LlamaConfig.norms`.
  """

  def __init__(self, config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs):
    self.norms, self.multiplier = config.norms, config.residual_multiplier
    for name in config.norms:
      if name:
        setattr(self, name, rms_norm(config, config.hidden_size, dtype=dtype, rngs=rngs))
    self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
    self.mlp = MLP(config, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, Any]:
    norms = self.norms
    seen, kept = self.self_attn(self._normed(norms.before_attention, x), rope, attend)
    x = x + self._scaled(self._normed(norms.after_attention, seen))
    made = self.mlp(self._normed(norms.before_mlp, x))
    return x + self._scaled(self._normed(norms.after_mlp, made)), kept

  def _normed(self, name: str | None, x: jax.Array) -> jax.Array:
    return getattr(self, name)(x) if name else x

  def _scaled(self, x: jax.Array) -> jax.Array:
    return x if self.multiplier == 1 else x * self.multiplier
