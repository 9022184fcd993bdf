"""Base layers, each seen as the matrix (out, in) that it multiplies by."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem._linear.contraction import Contraction
from optax_lowmem._linear.packed_weight import check_weight
from optax_lowmem.nn._layers.packed_layer import PackedLayer
from optax_lowmem.nn._layers.quantized_module import QuantizedModule
from optax_lowmem.nn._proofs.flax_layers import flax_contraction, is_embed, is_flax_linear
from optax_lowmem.nn._proofs.foreign_modules import NOTHING, Foreign, Reading
from optax_lowmem.nn._proofs.product import NotAProduct
from optax_lowmem.nn._proofs.reading import forget, read, remember


def is_linear(module: Any) -> bool:
  """Whether a module multiplies by a matrix, dense or quantized, of any arrangement of axes."""
  return is_known(module) or reading(module).foreign is not None


def is_known(module: Any) -> bool:
  """Whether a module is a linear layer of flax's or of this package's."""
  return isinstance(module, PackedLayer) or is_flax_linear(module)


def reading(module: Any) -> Reading:
  """What is proved of a module of another class."""
  return NOTHING if is_known(module) or is_embed(module) else read(module)


def foreign_of(base: Any) -> Foreign | None:
  """The layer, or what it was before it was quantized, if it is of a class of its own."""
  return base.foreign if isinstance(base, QuantizedModule) else reading(base).foreign


def contraction_of(base: Any) -> Contraction:
  """How the axes of a layer's weight make a matrix."""
  if isinstance(base, PackedLayer):
    return base.contraction
  if is_embed(base) or is_flax_linear(base):
    return flax_contraction(base)
  contraction: Any = read(base).contraction  # of a module that `is_linear`
  return contraction


def contraction_at(base: Any, x: Any) -> Contraction:
  """The same for one input, of which a module of another class is proved anew."""
  foreign = foreign_of(base)
  if foreign is None:
    return contraction_of(base)
  try:
    return foreign.contraction(foreign.at(x.shape, x.dtype))
  except NotAProduct as error:
    raise ValueError(
      f"this {type(base).__name__} was proved to multiply its input by `{foreign.weight}`, but for "
      f"an input of shape {x.shape} and dtype {x.dtype} {error}. Leave it out of `targets`."
    ) from error


def weight_field(base: Any) -> str:
  """The name of a float layer's weight."""
  if is_embed(base):
    return "embedding"
  foreign = foreign_of(base)
  return "kernel" if foreign is None else foreign.weight


def bias_field(base: Any) -> str:
  """The name of a layer's bias, if it has one."""
  foreign = reading(base).foreign
  return "bias" if foreign is None or foreign.bias is None else foreign.bias


def dense_variable(base: Any) -> Any:
  """The Variable of a float layer's weight, or None for a quantized one."""
  return None if isinstance(base, PackedLayer) else getattr(base, weight_field(base))


def matrix_shape(base: Any) -> tuple[int, ...]:
  """(..., out, in) of `matrix_of`, without computing it."""
  return (*stack_shape(base), *contraction_of(base).matrix_shape)


def stack_shape(base: Any) -> tuple[int, ...]:
  """The leading axes of a stack of layers."""
  contraction, variable = contraction_of(base), dense_variable(base)
  if variable is None:
    shape, one = base.weight.get_value().shape, contraction.matrix_shape
  else:
    shape, one = variable[...].shape, contraction.kernel_shape
  return shape[: len(shape) - len(one)]


def matrix_of(base: Any) -> jax.Array:
  """The dense weight (..., out, in) in float32; (..., vocabulary) of an embedding, transposed."""
  variable = dense_variable(base)
  if variable is None:
    return base.dequantize()
  return contraction_of(base).to_matrix(variable[...].astype(jnp.float32))


def with_matrix(base: Any, matrix: jax.Array, dtype: Any = jnp.float32) -> Any:
  """A float layer like `base` with another weight; `base` and its bias are left as they are."""
  weight = contraction_of(base).to_kernel(matrix).astype(dtype)
  new: Any
  if isinstance(base, PackedLayer):
    new = base.float_layer()
  else:
    new = nnx.merge(*nnx.split(base))  # another module with the same Variables
    forget(new)
  if (foreign := foreign_of(base)) is not None:
    old = getattr(new, foreign.weight)  # the base's own Variable; a new one keeps its metadata
    setattr(new, foreign.weight, old.replace(weight))
    return new
  old = dense_variable(base)  # a new Variable beside it, with its annotations
  field = "embedding" if isinstance(new, nnx.Embed) else "kernel"
  setattr(new, field, nnx.Param(weight) if old is None else old.replace(weight))
  new.param_dtype = weight.dtype
  if not isinstance(new, nnx.Embed):
    new.bias = base.bias
    if hasattr(new, "use_bias"):
      new.use_bias = base.bias is not None
  return new


def set_matrix(base: Any, matrix: jax.Array) -> Any:
  """`base` with another weight, kept as it keeps it: quantized again, or in its own dtype."""
  if isinstance(base, PackedLayer):
    return base.requantized(matrix)
  new = with_matrix(base, matrix, dense_variable(base)[...].dtype)
  if foreign_of(base) is not None:
    remember(new, reading(base))
  return new


def output_bias(base: Any, y: jax.Array, x: jax.Array) -> jax.Array | None:
  """What `base` adds at the end, to broadcast against its output `y` of an input `x`."""
  bias = getattr(base, bias_field(base), None)
  if bias is None:
    return None
  return contraction_at(base, x).spread_bias(bias[...].astype(y.dtype), x.ndim)


def check_dense(name: str, base: Any) -> None:
  """Refuses a float weight that holds integers, NaN or Inf."""
  variable = dense_variable(base)
  if variable is not None:
    field = weight_field(base)
    check_weight(f"{name}.{field}" if name else field, variable[...])
