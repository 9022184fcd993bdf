"""A float layer, quantized: which layer it becomes, and which it cannot."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from optax_lowmem._linear.own_product import own_settings, sets
from optax_lowmem.nn._layers.base_layer import contraction_of, foreign_of
from optax_lowmem.nn._layers.nf4_linear import NF4Linear
from optax_lowmem.nn._layers.quantized_einsum import QuantizedEinsum
from optax_lowmem.nn._layers.quantized_linear import QuantizedLinear
from optax_lowmem.nn._layers.quantized_module import QuantizedModule
from optax_lowmem.nn._proofs.flax_layers import is_kind


def quantized(linear: Any, codebook: str, block_size: int | None, double: bool | None) -> Any:
  """A float layer, quantized."""
  options: Any = {"codebook": codebook, "block_size": block_size, "double_quantize": double}
  if foreign_of(linear) is not None:
    return QuantizedModule(linear, **options)
  if not is_kind(linear, nnx.Linear):
    return QuantizedEinsum(linear, **options)
  kind = NF4Linear if codebook == "nf4" else QuantizedLinear
  return kind.from_weight(
    linear.kernel[...].swapaxes(-1, -2),
    linear.bias,
    **options,
    dtype=linear.dtype,
    precision=linear.precision,
  )


def check_product(name: str, layer: Any) -> None:
  """Refuses a layer that multiplies in a way of its own, which a quantized one would not."""
  contraction_of(layer)
  foreign = foreign_of(layer)
  if foreign is not None:
    if not foreign.plain:
      raise ValueError(
        f"{name} accumulates its product in another dtype (`preferred_element_type`), which a "
        "quantized layer does not. Name it in `exclude`."
      )
    return
  if own := own_settings(layer, jax.lax.dot_general, jnp.einsum, dtypes.promote_dtype):
    raise ValueError(f"{sets(name, own)} Name it in `exclude`, or leave it out of `targets`.")
