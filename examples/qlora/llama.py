"""A Llama for fine-tuning, in Flax NNX: `load_llama(path, quantize="nf4")`.

The modules carry Hugging Face's names. The layers are one `Block` whose weights have a leading
layer axis; it is scanned, so the program does not grow with depth, and each layer's forward pass
is computed again in the backward pass, so that gradients never hold more than one layer's
dequantized weights. (Unrolled layers of a 16-layer NF4 model kept 10 times the memory.)
"""

from __future__ import annotations

import functools
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import optax_lowmem as lowmem
from llama_config import LlamaConfig
from optax_lowmem import nn as lowmem_nn
from weights import Checkpoint, open_checkpoint

LINEARS = (
  "self_attn.q_proj",
  "self_attn.k_proj",
  "self_attn.v_proj",
  "self_attn.o_proj",
  "mlp.gate_proj",
  "mlp.up_proj",
  "mlp.down_proj",
)

Quantize = Literal["nf4"] | None


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
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


def apply_rope(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns the pairs (i, i + d/2) of each head of `x` (B, T, heads, d)."""
  cos, sin = rope
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Attention(nnx.Module):
  """Causal grouped-query attention; scores and softmax in float32."""

  def __init__(self, config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs):
    d, self.head_dim = config.hidden_size, config.head_dim
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    linear = functools.partial(
      nnx.Linear, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs
    )
    self.q_proj, self.k_proj, self.v_proj = linear(d, q), linear(d, kv), linear(d, kv)
    self.o_proj = linear(q, d)

  def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], lengths: jax.Array):
    q, k, v = (
      proj(x).reshape(*x.shape[:-1], -1, self.head_dim)
      for proj in (self.q_proj, self.k_proj, self.v_proj)
    )
    out = jax.nn.dot_product_attention(
      apply_rope(q, rope),
      apply_rope(k, rope),
      v,
      is_causal=True,
      key_value_seq_lengths=lengths,
    )
    return self.o_proj(out.reshape(*x.shape[:-1], -1))


class MLP(nnx.Module):
  """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

  def __init__(self, config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs):
    d, ff = config.hidden_size, config.intermediate_size
    linear = functools.partial(
      nnx.Linear, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs
    )
    self.gate_proj, self.up_proj, self.down_proj = linear(d, ff), linear(d, ff), linear(ff, d)

  def __call__(self, x: jax.Array):
    return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
  """One layer: attention and SwiGLU, each on the normalized residual stream."""

  def __init__(self, config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs):
    norm = functools.partial(
      nnx.RMSNorm, config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs
    )
    self.input_layernorm, self.post_attention_layernorm = norm(), norm()
    self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
    self.mlp = MLP(config, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], lengths: jax.Array):
    x = x + self.self_attn(self.input_layernorm(x), rope, lengths)
    return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nnx.Module):
  """Token ids to the last hidden state.

  Invariants: every variable under `layers` has a leading axis of `config.num_hidden_layers`.
  """

  def __init__(self, config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs):
    self.rope_theta, self.head_dim = config.rope_theta, config.head_dim
    self.embed_tokens = nnx.Embed(
      config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs
    )

    @nnx.split_rngs(splits=config.num_hidden_layers)
    @nnx.vmap
    def stacked(rngs):
      return Block(config, dtype=dtype, rngs=rngs)

    self.layers = stacked(rngs)
    self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs)

  def __call__(self, input_ids: jax.Array, positions: jax.Array, lengths: jax.Array):
    rope = rope_tables(positions, self.head_dim, self.rope_theta)  # once, not once a layer
    # jax.lax.scan over the split module and not nnx.scan: that refuses variables of different
    # trace levels, which is what `jax.grad` over `nnx.merge` of some of them gives.
    graphdef, random, weights = nnx.split(self.layers, nnx.RngState, ...)

    # Only the layer's input is kept. Keeping the results of the matrix products of SmolLM2-135M
    # at 4 x 128 tokens saves 14 % of a step's time and costs 260 MiB on top of 96.
    # prevent_cse: the two passes are in different loops, there is nothing to merge.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def layer(x, state):
      block = nnx.merge(graphdef, *state)
      return block(x, rope, lengths), nnx.state(block, nnx.RngState)

    x, random = jax.lax.scan(layer, self.embed_tokens(input_ids), (random, weights))
    nnx.update(self.layers, random)  # dropout's counters move on
    return self.norm(x)


class Llama(nnx.Module):
  """Hugging Face's ``LlamaForCausalLM``; made by `load_llama` or `abstract_llama`.

  Args:
    config: the model's configuration.
    dtype: of the weights and of the computation. Norms, rotary embeddings and softmax are
      float32 in any case.
    rngs: gives random initial weights.
  """

  def __init__(self, config: LlamaConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
    self.config = config
    self.model = LlamaModel(config, dtype=dtype, rngs=rngs)
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
    lengths: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the logits (B, T, vocabulary): `head` of `hidden`."""
    return self.head(self.hidden(input_ids, positions=positions, lengths=lengths))

  def hidden(
    self,
    input_ids: jax.Array,
    *,
    positions: jax.Array | None = None,
    lengths: jax.Array | None = None,
  ) -> jax.Array:
    """The last hidden state, normalized.

    Args:
      input_ids: token ids (B, T), padded on the right.
      positions: (B, T) or (1, T); counted from 0 by default.
      lengths: (B,) the number of tokens of each row that are not padding; all by default.
        What comes out at padding means nothing.

    Returns:
      An array (B, T, hidden_size).
    """
    batch, time = input_ids.shape
    positions = jnp.arange(time)[None] if positions is None else positions
    lengths = jnp.full(batch, time) if lengths is None else lengths
    return self.model(input_ids, positions, lengths)

  def head(self, hidden: jax.Array) -> jax.Array:
    """Logits of hidden states (..., hidden_size); take a few at a time to save memory."""
    if not self.config.tie_word_embeddings:
      return self.lm_head(hidden)
    # nnx.Embed.attend multiplies by the transpose, of which XLA keeps a copy under
    # jax.value_and_grad on CPU: 108 MiB more for SmolLM2-135M's table.
    table = self.model.embed_tokens.embedding[...].astype(hidden.dtype)
    return jax.lax.dot_general(hidden, table, (((hidden.ndim - 1,), (1,)), ((), ())))


def abstract_llama(config: LlamaConfig, quantize: Quantize = None, dtype: Any = jnp.float32):
  """The model with shapes and dtypes in place of weights, for a look at its memory.

  Args:
    config: the model's configuration.
    quantize: as in `load_llama`.
    dtype: as in `load_llama`.

  Returns:
    A `Llama` whose variables hold `jax.ShapeDtypeStruct`.

  Raises:
    ValueError: for an unknown `quantize`.

  Example:
    >>> config = LlamaConfig(128, 64, 160, 2, 4, 2, 16)
    >>> model = abstract_llama(config, quantize="nf4")
    >>> model.model.layers.mlp.up_proj.weight.get_value().codes.shape
    (2, 160, 32)
  """
  _check_arguments(quantize, dtype)

  def build():
    model = Llama(config, dtype=dtype, rngs=nnx.Rngs(0))
    return lowmem_nn.quantize_model(model) if quantize else model

  return nnx.eval_shape(build)


def load_llama(
  path: str | os.PathLike[str] | Checkpoint,
  quantize: Quantize = None,
  *,
  dtype: Any = jnp.float32,
) -> Llama:
  """Loads a model, quantizing each matrix as it is read.

  The files are read one tensor at a time: beside the result, no more than one matrix is in
  float32 at any moment.

  Args:
    path: a Hugging Face directory of safetensors, a GGUF file, or what `open_checkpoint` made of
      one.
    quantize: ``"nf4"`` packs the linear layers into 4 bits (`optax_lowmem.nn.NF4Linear`); the
      embeddings, the norms and the output layer are never quantized. None packs nothing.
    dtype: of the computation and of the weights that are not quantized. Norms are float32.

  Returns:
    The model; ``model(input_ids)`` gives logits.

  Raises:
    FileNotFoundError: if there is nothing at `path`.
    ValueError: for an unknown `quantize`, an unsupported architecture, a truncated file, or
      missing, misshapen, unexpected or non-finite tensors.
  """
  _check_arguments(quantize, dtype)
  checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
  model = abstract_llama(checkpoint.config, None, dtype)
  read = functools.partial(_read, checkpoint)

  def fill(variable: Any, value: np.ndarray):
    variable.set_value(jnp.asarray(value, variable.get_value().dtype))

  inner, layers = model.model, model.model.layers
  fill(inner.embed_tokens.embedding, read("model.embed_tokens.weight"))
  fill(inner.norm.scale, read("model.norm.weight"))
  if not checkpoint.config.tie_word_embeddings:
    fill(model.lm_head.kernel, read("lm_head.weight").T)
  for name in ("input_layernorm", "post_attention_layernorm"):
    fill(getattr(layers, name).scale, _stack(checkpoint, name, np.asarray))
  for name in LINEARS:
    holder, child = name.split(".")
    parent = getattr(layers, holder)
    linear = getattr(parent, child)
    if quantize:
      packed = _stack(checkpoint, name, _pack)
      setattr(parent, child, lowmem_nn.NF4Linear.from_quantized(packed, dtype=dtype))
    else:
      fill(linear.kernel, _stack(checkpoint, name, lambda w: w.T.astype(dtype)))
  return model


def _check_arguments(quantize: Quantize, dtype: Any) -> None:
  if quantize not in (None, "nf4"):
    raise ValueError(f"`quantize` must be 'nf4' or None, got {quantize!r}.")
  if jnp.dtype(dtype).name not in ("float32", "bfloat16"):
    # float16 overflows in Llamas' activations, and XLA's CPU backend has no product for it.
    raise ValueError(f"`dtype` must be float32 or bfloat16, got {jnp.dtype(dtype).name}.")


def _read(checkpoint: Checkpoint, name: str) -> np.ndarray:
  weight = checkpoint.read(name)
  if not np.isfinite(weight).all():  # 4-bit codes would hide it
    raise ValueError(f"{name} holds NaN or Inf. The file is damaged, or its training diverged.")
  return weight


@jax.jit
def _pack(weight: jax.Array) -> lowmem.QuantizedArray:
  return lowmem.quantize(weight.astype(jnp.float32), "nf4", block_size=64, double_quantize=True)


def _stack(checkpoint: Checkpoint, name: str, convert: Any) -> Any:
  """Reads one tensor of every layer, converts each, and stacks the leaves of the results."""
  out: Any = None
  count = checkpoint.config.num_hidden_layers
  for i in range(count):
    one = convert(_read(checkpoint, f"model.layers.{i}.{name}.weight"))
    if out is None:  # one buffer for all layers: a list would need twice the memory to stack
      out = jax.tree.map(lambda leaf: np.empty((count, *leaf.shape), leaf.dtype), one)
    jax.tree.map(lambda buffer, leaf, i=i: buffer.__setitem__(i, leaf), out, one)
  return jax.tree.map(jnp.asarray, out)
