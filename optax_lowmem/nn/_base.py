"""Base layers, each seen as the matrix (out, in) that it multiplies by."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem.nn._contraction import Contraction
from optax_lowmem.nn._quantized import QuantizedLinear, check_weight
from optax_lowmem.nn._quantized_einsum import QuantizedEinsum

GENERAL = (nnx.LinearGeneral, nnx.Einsum)


def is_kind(module: Any, kind: type) -> bool:
  """Whether a module is of that kind: subclasses that compute something else are not."""
  return isinstance(module, kind) and type(module).__call__ is kind.__call__


def is_linear(module: Any) -> bool:
  """Whether a module multiplies by a matrix, dense or quantized, of any arrangement of axes."""
  return isinstance(module, (QuantizedLinear, QuantizedEinsum)) or any(
    is_kind(module, kind) for kind in (nnx.Linear, *GENERAL)
  )


def is_embed(module: Any) -> bool:
  return is_kind(module, nnx.Embed)


def contraction_of(base: Any) -> Contraction | None:
  """How the axes of a general layer make a matrix; None for layers that have one."""
  if isinstance(base, QuantizedEinsum):
    return base.contraction
  return Contraction.of(base) if isinstance(base, GENERAL) else None


def dense_variable(base: Any) -> Any:
  """The Variable of a float layer's weight, or None for a quantized one."""
  if isinstance(base, (QuantizedLinear, QuantizedEinsum)):
    return None
  return base.embedding if isinstance(base, nnx.Embed) else base.kernel


def matrix_shape(base: Any) -> tuple[int, ...]:
  """(..., out, in) of `matrix_of`, without computing it."""
  if isinstance(base, (QuantizedLinear, QuantizedEinsum)):
    return base.weight.get_value().shape
  shape = dense_variable(base)[...].shape
  if isinstance(base, GENERAL):
    contraction = Contraction.of(base)
    return (*shape[: len(shape) - len(contraction.kernel_shape)], *contraction.matrix_shape)
  return (*shape[:-2], shape[-1], shape[-2])


def stack_shape(base: Any) -> tuple[int, ...]:
  """The leading axes of a stack of layers."""
  contraction = contraction_of(base)
  shape = matrix_shape(base)
  return shape[: len(shape) - (2 if contraction is None else len(contraction.matrix_shape))]


def matrix_of(base: Any) -> jax.Array:
  """The dense weight (..., out, in) in float32; (..., vocabulary) of an embedding, transposed."""
  variable = dense_variable(base)
  if variable is None:
    return base.dequantize()
  weight = variable[...].astype(jnp.float32)
  contraction = contraction_of(base)
  return weight.swapaxes(-1, -2) if contraction is None else contraction.to_matrix(weight)


def to_weight(base: Any, matrix: jax.Array) -> jax.Array:
  """The inverse of `matrix_of`: a matrix in the arrangement of a float layer's Variable."""
  contraction = contraction_of(base)
  return matrix.swapaxes(-1, -2) if contraction is None else contraction.to_kernel(matrix)


def with_matrix(base: Any, matrix: jax.Array, dtype: Any = jnp.float32) -> Any:
  """A float layer like `base` with another weight; `base` and its bias are left as they are."""
  weight = to_weight(base, matrix).astype(dtype)
  new: Any
  if isinstance(base, QuantizedEinsum):
    new = base.float_layer()
  elif isinstance(base, QuantizedLinear):
    new = nnx.eval_shape(
      lambda: nnx.Linear(
        base.in_features,
        base.out_features,
        use_bias=False,
        dtype=base.dtype,
        precision=base.precision,
        rngs=nnx.Rngs(0),
      )
    )
  else:
    new = nnx.merge(*nnx.split(base))  # new Variables of the same arrays
  name = "embedding" if isinstance(new, nnx.Embed) else "kernel"
  setattr(new, name, nnx.Param(weight))
  new.param_dtype = weight.dtype
  if not isinstance(new, nnx.Embed):
    new.bias = base.bias
    if hasattr(new, "use_bias"):
      new.use_bias = base.bias is not None
  return new


def set_matrix(base: Any, matrix: jax.Array) -> Any:
  """`base` with another weight, kept as it keeps it: quantized again, or in its own dtype."""
  if isinstance(base, (QuantizedLinear, QuantizedEinsum)):
    return base.requantized(matrix)
  return with_matrix(base, matrix, dense_variable(base)[...].dtype)


def output_bias(base: Any, y: jax.Array, ndim: int) -> jax.Array | None:
  """What `base` adds at the end, to broadcast against its output `y` of an input of rank `ndim`."""
  bias = getattr(base, "bias", None)
  if bias is None:
    return None
  contraction, value = contraction_of(base), bias[...].astype(y.dtype)
  return value if contraction is None else contraction.spread_bias(value, ndim)


def check_dense(name: str, base: Any) -> None:
  """Refuses a float weight that holds integers, NaN or Inf."""
  variable = dense_variable(base)
  if variable is not None:
    field = "embedding" if isinstance(base, nnx.Embed) else "kernel"
    check_weight(f"{name}.{field}" if name else field, variable[...])
