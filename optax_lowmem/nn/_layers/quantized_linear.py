"""Frozen linear layers whose weight is stored in 4 or 8 bits."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem._linear.contraction import Contraction
from optax_lowmem._linear.packed_weight import (
  CODEBOOKS,
  check_weight,
  codebook_of,
  quantize_stack,
  requantized,
)
from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem.nn._layers.packed_layer import PackedLayer, QuantizedWeight, floating, placed


class QuantizedLinear(PackedLayer):
  r"""A linear layer with a frozen weight in 4 or 8 bits.

  .. math:: y = x \hat W^T + b

  where :math:`\hat W` is the (out, in) weight decoded from codes and one scale per block of
  inputs. The weight is decoded for the product, and again in the backward pass, and never kept.
  It receives no gradient. The dtypes are those of the float layer.

  The weight may have leading axes, one layer for each index, for use under `nnx.scan` or
  `nnx.vmap`; each layer is quantized on its own.

  Invariants: `weight.shape == (..., out_features, in_features)` and
  `bias.shape == (..., out_features)`.

  Args:
    weight: a `QuantizedArray` of logical shape (out, in), with or without leading axes: NF4,
      FP4, or 8-bit integers (codebook `"linear"`).
    bias: None, an array or an `nnx.Param` of shape (..., out).
    dtype: the dtype of the computation and the output; None, as in `nnx.Linear`, is that to which
      `x`, the weight (before it was packed) and the bias promote.
    precision: passed to `jax.lax.dot_general`.

  Raises:
    TypeError: `weight` is not a `QuantizedArray`.
    ValueError: `weight` is of another codebook or not a matrix, or `bias` does not fit it.

  >>> import jax, jax.numpy as jnp
  >>> from optax_lowmem import nn
  >>> weight = jax.random.normal(jax.random.key(0), (256, 512))
  >>> layer = nn.QuantizedLinear.from_weight(weight, codebook="int8", block_size=None)
  >>> layer(jnp.ones((3, 512))).shape, layer.codebook
  ((3, 256), 'int8')
  >>> round(layer.weight.get_value().nbytes / weight.size, 3)  # a byte, and one scale a row
  1.008
  """

  _codebooks: Any = tuple(CODEBOOKS)

  def __init__(
    self,
    weight: QuantizedArray,
    bias: jax.Array | nnx.Variable | None = None,
    *,
    dtype: Any = None,
    precision: Any = None,
  ):
    if not isinstance(weight, QuantizedArray):
      raise TypeError(
        f"`weight` must be a QuantizedArray, got {type(weight).__name__}. "
        f"Use `{type(self).__name__}.from_weight` to quantize a dense weight."
      )
    known = [CODEBOOKS[name] for name in self._codebooks]
    if weight.codebook.name not in known:
      raise ValueError(
        f"`weight` must be quantized with the codebook {' or '.join(map(repr, known))}, "
        f"got {weight.codebook.name!r}."
      )
    if weight.ndim < 2:
      raise ValueError(f"`weight` must have at least two axes (out, in), got shape {weight.shape}.")
    if bias is not None and tuple(bias.shape) != weight.shape[:-1]:
      raise ValueError(
        f"`bias` must have shape {weight.shape[:-1]} for a weight of shape "
        f"{weight.shape}, got {tuple(bias.shape)}."
      )
    self.weight = QuantizedWeight(weight)
    if bias is not None and not isinstance(bias, nnx.Variable):
      bias = nnx.Param(jnp.asarray(bias))
    self.bias = nnx.data(bias)
    self.dtype, self.precision = dtype, precision

  @classmethod
  def from_weight(
    cls,
    weight: jax.Array,
    bias: jax.Array | nnx.Variable | None = None,
    *,
    codebook: Literal["nf4", "fp4", "int8"] = "nf4",
    block_size: int | None = 64,
    double_quantize: bool | None = None,
    dtype: Any = None,
    precision: Any = None,
  ) -> QuantizedLinear:
    """Quantizes a dense weight of shape (..., out, in).

    Args:
      weight: a floating-point array; leading axes stack layers.
      bias: None, an array or an `nnx.Param` of shape (..., out), kept as it is.
      codebook: `"nf4"`, `"fp4"` or `"int8"`.
      block_size: how many inputs share a scale; None is all inputs of an output.
      double_quantize: store the scales in 8 bits too; None does so for 4-bit codes.
      dtype: as in the class.
      precision: as in the class.

    Returns:
      The layer.

    Raises:
      ValueError: the weight is not a floating-point matrix or holds NaN or Inf, or `codebook` or
        `block_size` is none.
    """
    weight = jnp.asarray(weight)
    check_weight("weight", weight)
    q = quantize_stack(weight, codebook, block_size, double_quantize)
    return cls(q, bias, dtype=dtype, precision=precision)

  @classmethod
  def from_quantized(
    cls, q: QuantizedArray, bias: jax.Array | nnx.Variable | None = None, dtype: Any = None
  ) -> QuantizedLinear:
    """Wraps a weight that is quantized already: `QuantizedLinear(q, bias, dtype=dtype)`."""
    return cls(q, bias, dtype=dtype)

  @property
  def codebook(self) -> str:
    """`"nf4"`, `"fp4"` or `"int8"`."""
    return codebook_of(self.weight.get_value())

  @property
  def contraction(self) -> Contraction:  # pyright: ignore[reportIncompatibleVariableOverride]
    """That of any matrix. Not held, as pickles would name its class, which is private."""
    return Contraction.dense(self.in_features, self.out_features)

  @property
  def in_features(self) -> int:
    return self.weight.get_value().shape[-1]

  @property
  def out_features(self) -> int:
    return self.weight.get_value().shape[-2]

  def requantized(self, weight: jax.Array) -> QuantizedLinear:
    """A layer of the same kind with another dense weight, quantized in the same way."""
    q = requantized(weight, self.weight.get_value())
    return type(self)(q, self.bias, dtype=self.dtype, precision=self.precision)

  def float_layer(self) -> Any:
    """The layer that this was, with shapes in place of a kernel and without a bias."""
    return nnx.eval_shape(
      lambda: nnx.Linear(
        self.in_features,
        self.out_features,
        use_bias=False,
        dtype=self.dtype,
        precision=self.precision,
        rngs=nnx.Rngs(0),
      )
    )

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    x = floating(inputs, self.dtype, self.weight.get_value(), self.bias)
    if x.ndim == 0 or x.shape[-1] != self.in_features:
      raise ValueError(
        f"`inputs` must have {self.in_features} features on its last axis, got shape {x.shape}."
      )
    y = self._product(x, self.contraction, self.precision)
    return placed(self._with_bias(y, self.contraction, x.ndim), out_sharding)
