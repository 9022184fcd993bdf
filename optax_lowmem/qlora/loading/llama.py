"""A Llama for fine-tuning: `load_llama(path, quantize="nf4")`.

The modules are in ``llama_model.py``; here they are filled from a file, or with shapes alone.
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
from optax_lowmem import nn as lowmem_nn
from optax_lowmem.qlora.loading.checkpoint import Checkpoint
from optax_lowmem.qlora.loading.weights import open_checkpoint
from optax_lowmem.qlora.models.attention import AttentionKind
from optax_lowmem.qlora.models.llama_config import LlamaConfig, linear_shapes, norm_sizes
from optax_lowmem.qlora.models.llama_model import Llama as Llama

Quantize = Literal["nf4", "fp4", "int8"] | None


def abstract_llama(
  config: LlamaConfig,
  quantize: Quantize = None,
  dtype: Any = jnp.float32,
  attention: AttentionKind = "auto",
) -> Any:
  """The model with shapes and dtypes in place of weights, for a look at its memory.

  Args:
    config: the model's configuration.
    quantize: as in `load_llama`.
    dtype: as in `load_llama`.
    attention: as in `load_llama`.

  Returns:
    A `Llama` whose variables hold `jax.ShapeDtypeStruct`.

  Raises:
    ValueError: for an unknown `quantize` or `attention`.

  Example:
    >>> config = LlamaConfig(128, 64, 160, 2, 4, 2, 16)
    >>> model = abstract_llama(config, quantize="nf4")
    >>> model.model.layers.mlp.up_proj.weight.get_value().codes.shape
    (2, 160, 32)
  """
  _check_arguments(quantize, dtype)

  def build():
    model = Llama(config, dtype=dtype, attention=attention, rngs=nnx.Rngs(0))
    return lowmem_nn.quantize_model(model, codebook=quantize) if quantize else model

  return nnx.eval_shape(build)


def load_llama(
  path: str | os.PathLike[str] | Checkpoint,
  quantize: Quantize = None,
  *,
  dtype: Any = jnp.float32,
  attention: AttentionKind = "auto",
) -> Llama:
  """Loads a model, quantizing each matrix as it is read.

  The files are read one tensor at a time: beside the result, no more than one matrix is in
  float32 at any moment.

  Args:
    path: a Hugging Face directory of safetensors, a GGUF file, or what `open_checkpoint` made of
      one.
    quantize: ``"nf4"`` or ``"fp4"`` packs the linear layers into 4 bits, ``"int8"`` into 8
      (`optax_lowmem.nn.QuantizedLinear`), as `optax_lowmem.nn.quantize_model` does; biases, the
      embeddings, the norms and the output layer are never quantized. None packs nothing.
    dtype: of the computation and of the weights that are not quantized. Norms are float32.
    attention: how whole rows attend, as in `attention.attend_within`.

  Returns:
    The model; ``model(input_ids)`` gives logits.

  Raises:
    FileNotFoundError: if there is nothing at `path`.
    ValueError: for an unknown `quantize` or `attention`, an unsupported architecture, a truncated
      file, or missing, misshapen, unexpected or non-finite tensors.
  """
  _check_arguments(quantize, dtype)
  checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
  model = abstract_llama(checkpoint.config, None, dtype, attention)
  read = functools.partial(_read, checkpoint)

  def fill(variable: Any, value: np.ndarray):
    variable.set_value(jnp.asarray(value, variable.get_value().dtype))

  inner, layers = model.model, model.model.layers
  fill(inner.embed_tokens.embedding, read("model.embed_tokens.weight"))
  fill(inner.norm.scale, read("model.norm.weight"))
  if not checkpoint.config.tie_word_embeddings:
    fill(model.lm_head.kernel, read("lm_head.weight").T)
  for name in norm_sizes(checkpoint.config):
    norm: Any = functools.reduce(getattr, name.split("."), layers)
    fill(norm.scale, _stack(checkpoint, f"{name}.weight", np.asarray))
  for name in linear_shapes(checkpoint.config):
    holder, child = name.split(".")
    parent = getattr(layers, holder)
    linear = getattr(parent, child)
    if linear.use_bias:
      fill(linear.bias, _stack(checkpoint, f"{name}.bias", lambda w: w.astype(dtype)))
    if quantize:
      packed = _stack(checkpoint, f"{name}.weight", functools.partial(_pack, codebook=quantize))
      kind = lowmem_nn.NF4Linear if quantize == "nf4" else lowmem_nn.QuantizedLinear
      setattr(parent, child, kind.from_quantized(packed, linear.bias, dtype=dtype))
    else:
      fill(linear.kernel, _stack(checkpoint, f"{name}.weight", lambda w: w.T.astype(dtype)))
  return model


def _check_arguments(quantize: Quantize, dtype: Any) -> None:
  if quantize not in (None, "nf4", "fp4", "int8"):
    raise ValueError(f"`quantize` must be 'nf4', 'fp4', 'int8' or None, got {quantize!r}.")
  if jnp.dtype(dtype).name not in ("float32", "bfloat16"):
    # float16 overflows in Llamas' activations, and XLA's CPU backend has no product for it.
    raise ValueError(f"`dtype` must be float32 or bfloat16, got {jnp.dtype(dtype).name}.")


def _read(checkpoint: Checkpoint, name: str) -> np.ndarray:
  weight = checkpoint.read(name)
  if not np.isfinite(weight).all():  # 4-bit codes would hide it
    raise ValueError(f"{name} holds NaN or Inf. The file is damaged, or its training diverged.")
  return weight


def _pack(weight: np.ndarray, codebook: Literal["nf4", "fp4", "int8"]) -> lowmem.QuantizedArray:
  dense = jnp.asarray(weight, jnp.float32)
  return lowmem_nn.QuantizedLinear.from_weight(dense, codebook=codebook).weight.get_value()


def _stack(checkpoint: Checkpoint, name: str, convert: Any) -> Any:
  """Reads one tensor of every layer, converts each, and stacks the leaves of the results."""
  out: Any = None
  count = checkpoint.config.num_hidden_layers
  for i in range(count):
    one = convert(_read(checkpoint, f"model.layers.{i}.{name}"))
    if out is None:  # one buffer for all layers: a list would need twice the memory to stack
      out = jax.tree.map(lambda leaf: np.empty((count, *leaf.shape), leaf.dtype), one)
    jax.tree.map(lambda buffer, leaf, i=i: buffer.__setitem__(i, leaf), out, one)
  return jax.tree.map(jnp.asarray, out)
