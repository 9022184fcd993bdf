"""A frozen `nnx.Einsum` or `nnx.LinearGeneral` whose weight is stored in 4 or 8 bits."""

from __future__ import annotations

from typing import Any, Literal

import jax
from flax import nnx

from optax_lowmem._linear.contraction import Contraction
from optax_lowmem._linear.packed_weight import quantize_stack, requantized
from optax_lowmem.nn._layers.packed_layer import PackedLayer, QuantizedWeight, floating, placed
from optax_lowmem.nn._proofs.flax_layers import flax_contraction


class QuantizedEinsum(PackedLayer):
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
    self._hold(flax_contraction(layer), layer.kernel[...], layer.bias, *options)

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
    matrix = contraction.to_matrix(kernel)
    self.weight = QuantizedWeight(quantize_stack(matrix, codebook, block_size, double))
    self.bias = nnx.data(bias)

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
