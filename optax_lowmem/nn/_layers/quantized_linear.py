"""Frozen linear layers whose weight is stored in 4 or 8 bits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from optax_lowmem._linear.packed_product import multiply
from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem._quantization.codebooks import CodebookName
from optax_lowmem._quantization.quantize import quantize


class QuantizedWeight(nnx.Variable[QuantizedArray]):
  """The Variable that holds a frozen `QuantizedArray`.

  It is not an `nnx.Param`, so that an optimizer or a gradient over `nnx.Param` leaves the
  packed bits alone.
  """


def over_stack(fn, levels: int, mapper=jax.vmap):
  """`fn`, mapped over `levels` leading axes."""
  for _ in range(levels):
    fn = functools.partial(jax.lax.map, fn) if mapper is jax.lax.map else mapper(fn)
  return fn


CODEBOOKS: dict[str, CodebookName] = {"nf4": "nf4", "fp4": "fp4", "int8": "linear"}


def check_codebook(codebook: str) -> str:
  """The name under which `quantize` knows a codebook for weights."""
  if codebook not in CODEBOOKS:
    raise ValueError(f"`codebook` must be one of {', '.join(CODEBOOKS)}, got {codebook!r}.")
  return CODEBOOKS[codebook]


def quantize_stack(
  weight: jax.Array, codebook: str, block_size: int | None, double_quantize: bool
) -> QuantizedArray:
  """Quantizes each (out, in) matrix on its own, one after another to keep temporaries small.

  A `block_size` of None is one scale a row.
  """
  check_codebook(codebook)
  if block_size is None:
    block_size = weight.shape[-1] + weight.shape[-1] % 2
  return _quantize_stack(weight, codebook, block_size, double_quantize)


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


class QuantizedLinear(nnx.Module):
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
    self.dtype = dtype
    self.precision = precision

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
    if double_quantize is None:
      double_quantize = codebook != "int8"
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
    name = self.weight.get_value().codebook.name
    return next(key for key, value in CODEBOOKS.items() if value == name)

  @property
  def in_features(self) -> int:
    return self.weight.get_value().shape[-1]

  @property
  def out_features(self) -> int:
    return self.weight.get_value().shape[-2]

  @property
  def kernel(self) -> jax.ShapeDtypeStruct:
    """The shape of an `nnx.Linear`'s kernel, which models ask for; there is no such array."""
    *lead, out, inputs = self.weight.get_value().shape
    return jax.ShapeDtypeStruct((*lead, inputs, out), self.weight.get_value().dtype)

  def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
    """The dense weight, of shape (..., out, in)."""
    return dequantize_stack(self.weight.get_value(), dtype)

  def requantized(self, weight: jax.Array) -> QuantizedLinear:
    """A layer of the same kind with another dense weight, quantized in the same way."""
    q = requantized(weight, self.weight.get_value())
    return type(self)(q, self.bias, dtype=self.dtype, precision=self.precision)

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    q = self.weight.get_value()
    if q.ndim != 2:
      raise ValueError(
        f"this {type(self).__name__} holds a stack of layers, its weight has shape {q.shape}. "
        "Call it under `nnx.scan` or `nnx.vmap` over the leading axis."
      )
    x = floating(inputs, self.dtype, q, self.bias)
    if x.ndim == 0 or x.shape[-1] != q.shape[1]:
      raise ValueError(
        f"`inputs` must have {q.shape[1]} features on its last axis, got shape {x.shape}."
      )
    y: Any = multiply(x, q, self.precision)
    y = y if self.bias is None else y + at_rank(self.bias[...].astype(y.dtype), y.ndim)
    return placed(y, out_sharding)


def floating(x: jax.Array, dtype: Any, *operands: Any) -> jax.Array:
  """`x` in `dtype`, or in what it and the operands promote to, refused if not floating point."""
  x = jnp.asarray(x, dtype)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(
      f"`inputs` must be floating point, got {x.dtype}. Convert it, or give the layer a `dtype`."
    )
  if dtype is None:
    dtype = jnp.result_type(x, *(one.dtype for one in operands if one is not None))
  return x.astype(dtype)


def at_rank(values: jax.Array, ndim: int) -> jax.Array:
  """`values` with axes of 1 before its own: JAX may be told to raise where ranks differ."""
  return jax.lax.expand_dims(values, range(ndim - values.ndim))


def placed(y: jax.Array, out_sharding: Any) -> jax.Array:
  """`y` with the sharding that a caller asks of a layer of flax; None asks for none.

  On the axes that it names it is a type if they are explicit, and else a wish to the compiler.
  """
  if out_sharding is None:
    return y
  whole = isinstance(out_sharding, NamedSharding)
  mesh: Any = out_sharding.mesh if whole else jax.sharding.get_abstract_mesh()
  names = jax.tree.leaves(tuple(out_sharding.spec if whole else out_sharding))
  kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  named = [kinds[name] for name in names if name in kinds] or mesh.axis_types
  if AxisType.Explicit in named:
    return jax.sharding.reshard(y, out_sharding)
  return jax.lax.with_sharding_constraint(y, out_sharding)


def dequantize_stack(q: QuantizedArray, dtype: Any = jnp.float32) -> jax.Array:
  return over_stack(lambda one: one.dequantize(dtype), q.ndim - 2)(q)


def requantized(weight: jax.Array, q: QuantizedArray) -> QuantizedArray:
  """A weight in `q`'s place: quantized as `q` was, and of the dtype that `q` had before."""
  return dataclasses.replace(quantize_like(weight, q), dtype=q.dtype)


def quantize_like(weight: jax.Array, q: QuantizedArray) -> QuantizedArray:
  """Quantizes a dense weight as `q` was."""
  book = next(key for key, value in CODEBOOKS.items() if value == q.codebook.name)
  return quantize_stack(weight, book, q.block[0], isinstance(q.scales, QuantizedArray))
