"""The product with a quantized weight, which is decoded when it is needed and never kept."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType

from optax_lowmem._linear.contraction import Contraction
from optax_lowmem._meshes.explicit_axes import is_explicit
from optax_lowmem._quantization.array import QuantizedArray


def _zero(x: jax.Array) -> jax.Array:
  """0, in a way that the compiler cannot see through."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
  return jnp.max(bits & 1, initial=0) >> 1


def _with_bits_of(weight: QuantizedArray, x: jax.Array) -> QuantizedArray:
  return dataclasses.replace(weight, codes=weight.codes ^ _zero(x).astype(weight.codes.dtype))


def _behind(weight: QuantizedArray, x: jax.Array) -> QuantizedArray:
  codes, _ = jax.lax.optimization_barrier((weight.codes, x))
  # Inside a `shard_map` what varies over devices is part of a type, and that of the codes must be
  # what it is in the other branch. The compiler sees through this zero, and drops it.
  return dataclasses.replace(weight, codes=codes | (_zero(x) & 0).astype(codes.dtype))


def _bound(codes: jax.Array, x: jax.Array) -> jax.Array:
  """The codes, which now need one element of `x`.

  Behind a barrier, so that the element is not computed on its own.
  """
  codes, x = jax.lax.optimization_barrier((codes, x))
  one = jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim)
  return codes ^ _zero(one).astype(codes.dtype)


@custom_partitioning
def _bound_on_each_device(codes: jax.Array, x: jax.Array) -> jax.Array:
  """`_bound`, by each device to an element that it has: on one device it is the same."""
  return _bound(codes, x)


def _codes_place(mesh: Any, args: Any, result: Any) -> Any:
  del mesh, result
  return args[0].sharding


def _partition(mesh: Any, args: Any, result: Any) -> Any:
  places = tuple(arg.sharding for arg in args)
  return mesh, _bound, _codes_place(mesh, args, result), places


def _axes(mesh: Any, values: Any, results: Any) -> str:
  del mesh, results
  codes, x = (
    " ".join(f"{name}_{axis}" for axis in range(value.rank))
    for name, value in zip(("codes", "x"), values, strict=True)
  )
  return f"{codes}, {x} -> {codes}"


_bound_on_each_device.def_partition(
  _partition, infer_sharding_from_operands=_codes_place, sharding_rule=_axes
)


def _bound_to(weight: QuantizedArray, x: jax.Array) -> QuantizedArray:
  """On GPUs: XLA drops barriers before it fuses, and no barrier then keeps decoding apart.

  jax 0.12 decoded each weight of a layer for the forward pass that is computed again and for the
  backward pass in one kernel, and kept both: 1.2 GiB of a step of a 65B, compiled for an H100.
  """
  kinds = _kinds_of_axes(weight.codes, x)
  if AxisType.Explicit in kinds or not x.size:
    return _behind(weight, x)
  # Taken of an array that is spread over devices, one element would have to be sent to the others.
  # Within `shard_map` it is the device's own already.
  bind = _bound if AxisType.Manual in kinds else _bound_on_each_device
  return dataclasses.replace(weight, codes=bind(weight.codes, x))


def wait_for(x: jax.Array, weight: QuantizedArray) -> QuantizedArray:
  """The weight, not to be decoded before `x` is there."""
  # A function with a rule for `vmap` takes no tangents, which second-order gradients would give it.
  return _wait_for(jax.lax.stop_gradient(x), weight)


@jax.custom_batching.custom_vmap
def _wait_for(x: jax.Array, weight: QuantizedArray) -> QuantizedArray:
  """The weight, tied to `x`.

  Decoding depends on no activation, so the compiler is free to decode every weight of a model at
  once, and to decode a weight once for forward and backward pass, and does: the gradient of 16
  unrolled blocks of 7 linears of width 512 held 17.5 blocks' float32 weights. A barrier prevents
  it, but XLA's CPU backend drops barriers. Tied to the bits of `x`: 2.2, most of it activations.
  """
  return jax.lax.platform_dependent(
    weight, x, cpu=_with_bits_of, cuda=_bound_to, rocm=_bound_to, default=_behind
  )


@_wait_for.def_vmap
def _wait_for_whole(size, batched, x, weight):
  # All weights wait for all of x. Tied to one example each, a weight that a batch of examples
  # shares would be decoded for each: 16 dense weights for 16 examples under `jax.vmap`.
  del size
  return _wait_for(x, weight), batched[1]


def automatic(*arrays: jax.Array) -> bool:
  """Whether the compiler alone says where arrays are: no axis of their meshes is of another kind.

  A rule for a derivative that is written by hand has to place what it gives on the other axes.
  """
  return _kinds_of_axes(*arrays) <= {AxisType.Auto}


def _kinds_of_axes(*arrays: jax.Array) -> set[AxisType]:
  """Of the meshes that the types of arrays name."""
  return {kind for array in arrays for kind in jax.typeof(array).sharding.mesh.axis_types}


def multiply(x: jax.Array, weight: QuantizedArray, precision: Any) -> jax.Array:
  """x @ W^T in x's dtype. What is kept for the backward pass is the packed weight only."""
  return _multiply(x, weight, precision, jax.typeof(x).sharding)


def contract(
  x: jax.Array, weight: QuantizedArray, contraction: Contraction, precision: Any
) -> jax.Array:
  """The product of a contraction, in x's dtype, with its weight as matrices."""
  flat = contraction.flatten(x)
  if weight.ndim == 2:
    y: Any = multiply(flat, weight, precision)
  else:  # one matrix for each index of an axis that input and kernel share
    y = jax.vmap(lambda x, weight: multiply(x, weight, precision))(flat, weight)
  return contraction.unflatten(y, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _multiply(x: jax.Array, weight: QuantizedArray, precision: Any, place: Any) -> jax.Array:
  del place
  dense = wait_for(x, weight).dequantize(x.dtype)
  return jax.lax.dot_general(x, dense, (((x.ndim - 1,), (1,)), ((), ())), precision=precision)


def multiply_forward(x, weight, precision, place):
  return _multiply(x, weight, precision, place), weight


def multiply_backward(precision, place, weight, g):
  # The weight is decoded a second time. Left to itself, JAX would keep every layer's dense
  # weight from the forward pass, which is all that 4-bit storage saved.
  dense = wait_for(g, weight).dequantize(g.dtype)
  dx = jax.lax.dot_general(g, dense, (((g.ndim - 1,), (0,)), ((), ())), precision=precision)
  if is_explicit(place.mesh):
    dx = jax.sharding.reshard(dx, place)
  return dx, None  # None: no gradient for the frozen weight


_multiply.defvjp(multiply_forward, multiply_backward)
