"""What the frozen layers whose weight is stored in 4 or 8 bits have in common."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from optax_lowmem._linear.contraction import Contraction
from optax_lowmem._linear.packed_product import contract
from optax_lowmem._linear.packed_weight import dequantize_stack
from optax_lowmem._quantization.array import QuantizedArray


class QuantizedWeight(nnx.Variable[QuantizedArray]):
  """The Variable that holds a frozen `QuantizedArray`.

  It is not an `nnx.Param`, so that an optimizer or a gradient over `nnx.Param` leaves the
  packed bits alone.
  """

  def __getitem__(self, key: Any) -> QuantizedArray:
    """The `QuantizedArray`, of ``[...]``, as of any Variable. Parts have no value of their own."""
    if key is not Ellipsis:
      raise TypeError(
        f"a QuantizedWeight cannot be indexed by {key!r}, its blocks would be cut. Take the values "
        "first, with `dequantize()`."
      )
    return self.get_value()


class PackedLayer(nnx.Module):
  """A weight held as matrices (out, in), decoded for each product and never kept.

  Invariants: `weight.shape == (..., *contraction.matrix_shape)`, with leading axes that stack
  layers; `bias` is None or laid out as the output is.
  """

  weight: QuantizedWeight
  bias: Any
  contraction: Contraction
  dtype: Any
  precision: Any

  @property
  def kernel(self) -> jax.ShapeDtypeStruct:
    """The shape of the float layer's kernel, which models ask for; there is no such array."""
    q, c = self.weight.get_value(), self.contraction
    lead = q.shape[: q.ndim - len(c.matrix_shape)]
    return jax.ShapeDtypeStruct((*lead, *c.kernel_shape), q.dtype)

  def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
    """The dense weight as matrices (..., out, in)."""
    return dequantize_stack(self.weight.get_value(), dtype)

  def float_layer(self) -> Any:
    """The layer that this was, with shapes in place of a kernel and without a bias."""
    raise NotImplementedError

  def requantized(self, weight: jax.Array) -> Any:
    """A layer of the same kind with other matrices, quantized in the same way."""
    raise NotImplementedError

  def _product(self, x: jax.Array, contraction: Contraction, precision: Any) -> jax.Array:
    """What an input gives in its own dtype, without the bias."""
    q = self.weight.get_value()
    if q.ndim != len(contraction.matrix_shape):
      raise ValueError(
        f"this {type(self).__name__} holds a stack of layers, its weight has shape {q.shape}. "
        "Call it under `nnx.scan` or `nnx.vmap` over the leading axis; an `nnx.StateAxes` has to "
        "name `nn.QuantizedWeight` beside `nnx.Param`."
      )
    return contract(x, q, contraction, precision)

  def _with_bias(self, y: jax.Array, contraction: Contraction, ndim: int) -> jax.Array:
    if self.bias is None:
      return y
    return y + contraction.spread_bias(self.bias[...].astype(y.dtype), ndim)


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
