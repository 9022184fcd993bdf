"""The weight of a linear layer in 4 or 8 bits: a matrix (out, in), or a stack of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem._quantization.codebooks import CodebookName
from optax_lowmem._quantization.quantize import quantize

CODEBOOKS: dict[str, CodebookName] = {"nf4": "nf4", "fp4": "fp4", "int8": "linear"}


def check_codebook(codebook: str) -> str:
  """The name under which `quantize` knows a codebook for weights."""
  if codebook not in CODEBOOKS:
    raise ValueError(f"`codebook` must be one of {', '.join(CODEBOOKS)}, got {codebook!r}.")
  return CODEBOOKS[codebook]


def codebook_of(q: QuantizedArray) -> str:
  """`"nf4"`, `"fp4"` or `"int8"`."""
  return next(key for key, value in CODEBOOKS.items() if value == q.codebook.name)


def over_stack(fn, levels: int, mapper=jax.vmap):
  """`fn`, mapped over `levels` leading axes."""
  for _ in range(levels):
    fn = functools.partial(jax.lax.map, fn) if mapper is jax.lax.map else mapper(fn)
  return fn


def quantize_stack(
  weight: jax.Array, codebook: str, block_size: int | None, double_quantize: bool | None
) -> QuantizedArray:
  """Quantizes each (out, in) matrix on its own, one after another to keep temporaries small.

  A `block_size` of None is one scale a row; a `double_quantize` of None is that of 4-bit codes.
  """
  check_codebook(codebook)
  if block_size is None:
    block_size = weight.shape[-1] + weight.shape[-1] % 2
  double = codebook != "int8" if double_quantize is None else double_quantize
  return _quantize_stack(weight, codebook, block_size, double)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize_stack(
  weight: jax.Array, codebook: str, block_size: int, double_quantize: bool
) -> QuantizedArray:
  one = functools.partial(
    quantize,
    codebook=CODEBOOKS[codebook],
    block_size=block_size,
    double_quantize=double_quantize,
  )
  return over_stack(one, weight.ndim - 2, jax.lax.map)(weight)


def dequantize_stack(q: QuantizedArray, dtype: Any = jnp.float32) -> jax.Array:
  return over_stack(lambda one: one.dequantize(dtype), q.ndim - 2)(q)


def requantized(weight: jax.Array, q: QuantizedArray) -> QuantizedArray:
  """A weight in `q`'s place: quantized as `q` was, and of the dtype that `q` had before."""
  return dataclasses.replace(quantize_like(weight, q), dtype=q.dtype)


def quantize_like(weight: jax.Array, q: QuantizedArray) -> QuantizedArray:
  """Quantizes a dense weight as `q` was."""
  double = isinstance(q.scales, QuantizedArray)
  return quantize_stack(weight, codebook_of(q), q.block[0], double)


def check_weight(name: str, weight: jax.Array) -> None:
  """Refuses a weight that is not a floating-point matrix, or that holds NaN or Inf."""
  if weight.ndim < 2:
    raise ValueError(
      f"`{name}` must have at least two axes, got shape {weight.shape}. "
      "A linear layer's weight is a matrix; leading axes stack layers."
    )
  if not jnp.issubdtype(weight.dtype, jnp.floating):
    raise ValueError(
      f"`{name}` must be floating point, got {weight.dtype}. "
      "Convert it with `.astype(jnp.float32)` if its values are the weights."
    )
  # Under jit and eval_shape there are no values to look at.
  if not isinstance(weight, jax.core.Tracer) and not bool(jnp.isfinite(weight).all()):
    raise ValueError(
      f"`{name}` holds NaN or Inf, which no code and no adapter can stand for. "
      "Check the file that it was loaded from."
    )
