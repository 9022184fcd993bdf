"""A frozen `nnx.Einsum` or `nnx.LinearGeneral` whose weight is stored in 4 or 8 bits."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem._linear.contraction import Contraction
from optax_lowmem._linear.packed_product import multiply
from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem.nn._layers.quantized_linear import (
  QuantizedWeight,
  dequantize_stack,
  floating,
  placed,
  quantize_stack,
  requantized,
)


class QuantizedEinsum(nnx.Module):
  """What `nnx.Einsum` or `nnx.LinearGeneral` computes, with a frozen weight in 4 or 8 bits.

  The kernel is held as a matrix (out, in) of the product of its output axes by the product of
  those that are summed over, or as one such matrix for each index that it has in common with
  input and output; blocks lie along the summed axes. As in `QuantizedLinear`, it is decoded for
  each product and never kept, gets no gradient, and may have leading axes that stack layers; the
  dtypes are those of the float layer.

  Args:
    layer: the float layer.
    codebook: `"nf4"`, `"fp4"` or `"int8"`.
    block_size: how many inputs share a scale; None is all inputs of an output.
    double_quantize: store the scales in 8 bits too; None does so for 4-bit codes.

  Raises:
    ValueError: the equation is not a plain product, or `codebook` or `block_size` is none.

  >>> import jax.numpy as jnp
  >>> from flax import nnx
  >>> from optax_lowmem import nn
  >>> heads = nnx.LinearGeneral(64, (4, 16), rngs=nnx.Rngs(0))
  >>> nn.QuantizedEinsum(heads)(jnp.ones((2, 7, 64))).shape
  (2, 7, 4, 16)
  """

  def __init__(
    self,
    layer: nnx.Einsum | nnx.LinearGeneral,
    *,
    codebook: Literal["nf4", "fp4", "int8"] = "nf4",
    block_size: int | None = 64,
    double_quantize: bool | None = None,
  ):
    self.dtype, self.precision = layer.dtype, layer.precision
    options = (codebook, block_size, double_quantize)
    self._hold(Contraction.of(layer), layer.kernel[...], layer.bias, *options)

  def _hold(
    self,
    contraction: Contraction,
    kernel: jax.Array,
    bias: Any,
    codebook: str,
    block_size: int | None,
    double: bool | None,
  ) -> None:
    self.contraction = contraction
    if double is None:
      double = codebook != "int8"
    matrix = contraction.to_matrix(kernel)
    self.weight = QuantizedWeight(quantize_stack(matrix, codebook, block_size, double))
    self.bias = nnx.data(bias)

  @property
  def kernel(self) -> jax.ShapeDtypeStruct:
    """The shape of the float layer's kernel, which models ask for; there is no such array."""
    q = self.weight.get_value()
    lead = q.shape[: q.ndim - len(self.contraction.matrix_shape)]
    return jax.ShapeDtypeStruct((*lead, *self.contraction.kernel_shape), q.dtype)

  def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
    """The dense weight as matrices (..., out, in)."""
    return dequantize_stack(self.weight.get_value(), dtype)

  def requantized(self, weight: jax.Array) -> QuantizedEinsum:
    """A layer of the same kind with other matrices, quantized in the same way."""
    new = nnx.merge(*nnx.split(self))
    new.weight = QuantizedWeight(requantized(weight, self.weight.get_value()))
    new.bias = self.bias
    return new

  def float_layer(self) -> Any:
    """The layer that this was, with shapes in place of a kernel and without a bias."""
    c = self.contraction
    options: Any = {"dtype": self.dtype, "precision": self.precision}

    def make():
      if c.equation is not None:
        return nnx.Einsum(c.equation, c.kernel_shape, rngs=nnx.Rngs(0), **options)
      batch, ends = c.kernel_shape[: c.batch], c.batch + len(c.axis)
      return nnx.LinearGeneral(
        c.kernel_shape[c.batch : ends],
        c.kernel_shape[ends:],
        axis=c.axis,
        batch_axis=dict(enumerate(batch)),
        use_bias=False,
        rngs=nnx.Rngs(0),
        **options,
      )

    return nnx.eval_shape(make)

  def __call__(self, inputs: jax.Array, *, out_sharding: Any = None) -> jax.Array:
    x = floating(inputs, self.dtype, self.weight.get_value(), self.bias)
    y = self._product(x, self.contraction, self.precision)
    return placed(self._with_bias(y, self.contraction, x.ndim), out_sharding)

  def _product(self, x: jax.Array, contraction: Contraction, precision: Any) -> jax.Array:
    """What an input gives in its own dtype, without the bias."""
    q: QuantizedArray = self.weight.get_value()
    shape = contraction.matrix_shape
    if q.ndim != len(shape):
      raise ValueError(
        f"this {type(self).__name__} holds a stack of layers, its weight has shape {q.shape}. "
        "Call it under `nnx.scan` or `nnx.vmap` over the leading axis."
      )
    flat = contraction.flatten(x)
    if len(shape) == 2:
      y: Any = multiply(flat, q, precision)
    else:
      y = jax.vmap(lambda x, q: multiply(x, q, precision))(flat, q)
    return contraction.unflatten(y, x)

  def _with_bias(self, y: jax.Array, contraction: Contraction, ndim: int) -> jax.Array:
    if self.bias is None:
      return y
    return y + contraction.spread_bias(self.bias[...].astype(y.dtype), ndim)
