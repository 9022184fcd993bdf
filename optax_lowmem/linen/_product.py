"""What a layer of Flax Linen computes: packed weights, and low-rank corrections."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._linear.contraction import Contraction
from optax_lowmem._linear.packed_product import contract
from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem._variants.variant import Arrays, Variant

STACKED = (
  "Layers are stacked along the leading axes of their variables: give `nn.scan` or `nn.vmap` "
  "axis 0 for them in `variable_axes`."
)


def packed_product(
  x: jax.Array,
  weight: QuantizedArray,
  contraction: Contraction,
  bias: jax.Array | None,
  dtype: Any,
  precision: Any,
) -> jax.Array:
  """What a linear layer of Linen computes with the decoded weight, which is never kept.

  As there, a `dtype` of None is that to which the input, the weight and the bias promote.
  """
  if weight.shape != contraction.matrix_shape:
    raise ValueError(
      f"a packed kernel has shape {weight.shape} (out, in), and its layer needs "
      f"{contraction.matrix_shape}. {STACKED}"
    )
  if dtype is None:
    dtype = jnp.result_type(x, weight.dtype, *([] if bias is None else [bias]))
  if not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(f"`dtype` must be floating point, got {jnp.dtype(dtype).name}.")
  x = jnp.asarray(x, dtype)
  y = contract(x, weight, contraction, precision)
  return y if bias is None else y + contraction.spread_bias(jnp.asarray(bias, dtype), x.ndim)


def correction(
  x: jax.Array, variant: Variant, parts: Arrays, contraction: Contraction, dtype: Any
) -> jax.Array:
  """What an adapter adds, in the dtype and with the axes of the layer's output.

  Its scale is in `parts` already.
  """
  x, parts = jnp.asarray(x, dtype), {name: part.astype(dtype) for name, part in parts.items()}
  return contraction.unflatten(variant.product(parts, contraction.flatten(x)), x)


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
  """Zeroes a share of the elements and scales up the others, as `flax.linen.Dropout`."""
  keep = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
