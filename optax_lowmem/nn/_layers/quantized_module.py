"""A frozen module of another class that was proved to be one product, in 4 or 8 bits."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem.nn._layers.packed_layer import floating, placed
from optax_lowmem.nn._layers.quantized_einsum import QuantizedEinsum
from optax_lowmem.nn._proofs.foreign_modules import setting_of
from optax_lowmem.nn._proofs.product import NotAProduct
from optax_lowmem.nn._proofs.reading import read


class QuantizedModule(QuantizedEinsum):
  """What a linear layer of any class computes, with a frozen weight in 4 or 8 bits.

  The layer is an NNX module with one `nnx.Param` that is a matrix (of any number of axes), and
  perhaps another that is a bias. Its `__call__` takes an input, and perhaps an `out_sharding`. It
  is traced, and must be a product of the input and the matrix, plus the bias, and nothing else.
  Arrays that are no Variables are kept, and may have no part in it. That is proved when it is
  quantized, and again for each shape and dtype of the input that it is called with. Input, weight
  and output have the dtypes that they have in the float layer.

  Args:
    layer: the float layer.
    codebook: as in `QuantizedEinsum`.
    block_size: as in `QuantizedEinsum`.
    double_quantize: as in `QuantizedEinsum`.

  Raises:
    TypeError: the layer is no such product.
    ValueError: `codebook` or `block_size` is none; or, when it is called, the input is of a shape
      for which the layer is no such product.

  >>> import jax.numpy as jnp
  >>> from flax import nnx
  >>> from optax_lowmem import nn
  >>> class Dense(nnx.Module):
  ...   def __init__(self):
  ...     self.w = nnx.Param(jnp.ones((64, 32)))
  ...   def __call__(self, x):
  ...     return x @ self.w
  >>> nn.QuantizedModule(Dense())(jnp.ones((2, 7, 64))).shape
  (2, 7, 32)
  """

  def __init__(
    self,
    layer: nnx.Module,
    *,
    codebook: Literal["nf4", "fp4", "int8"] = "nf4",
    block_size: int | None = 64,
    double_quantize: bool | None = None,
  ):
    found = read(layer)
    if found.foreign is None or found.contraction is None:
      raise TypeError(
        "`layer` must be a module that multiplies its input by an nnx.Param of its own, "
        f"got {type(layer).__name__}: {found.reason or 'it has none'}."
      )
    self.foreign = foreign = found.foreign
    bias = None if foreign.bias is None else getattr(layer, foreign.bias)
    kernel = getattr(layer, foreign.weight)[...]
    self.constants = nnx.data({name: getattr(layer, name) for name in foreign.constants})
    self._hold(found.contraction, kernel, bias, codebook, block_size, double_quantize)

  def float_layer(self) -> Any:
    """The layer that this was, with a shape in place of its weight."""
    foreign = self.foreign
    values: dict[str, Any] = {
      **self.constants,
      foreign.weight: jax.ShapeDtypeStruct(foreign.kernel_shape, jnp.float32),
    }
    if foreign.bias is not None:
      values[foreign.bias] = None
    layer = foreign.build(**values)
    if foreign.bias is not None:
      setattr(layer, foreign.bias, self.bias)
    return layer

  def __getattr__(self, name: str) -> Any:
    """Settings of the layer that this was, and the shapes of its arrays."""
    ready = "bias" in vars(self) and not name.startswith("_")
    return setting_of(self, self.float_layer() if ready else None, name)

  # The base takes `out_sharding` by name, this by either, which pyright does not see to be wider.
  def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
    self, x: jax.Array, out_sharding: Any = None
  ) -> jax.Array:
    x = floating(x, None)
    try:
      product = self.foreign.at(x.shape, x.dtype)
    except NotAProduct as error:
      raise ValueError(
        f"this QuantizedModule was proved to be a product, but for an input of shape {x.shape} and "
        f"dtype {x.dtype} {error}. Name it in `quantize_model`'s `exclude`."
      ) from error
    contraction = self.foreign.contraction(product)
    y = self._product(x.astype(product.dtype), contraction, product.precision)
    # A bias is not rounded to the product's dtype where the output is wider.
    y = y.astype(jnp.promote_types(product.dtype, product.out_dtype))
    y = self._with_bias(y, contraction, x.ndim)
    return placed(y.astype(product.out_dtype), out_sharding)
