"""The product with a quantized weight, which is decoded when it is needed and never kept."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from optax_lowmem._blocks import QuantizedArray


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
  return jax.lax.platform_dependent(weight, x, cpu=_with_bits_of, default=_behind)


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
  meshes = (jax.typeof(array).sharding.mesh for array in arrays)
  return all(kind == AxisType.Auto for mesh in meshes for kind in mesh.axis_types)


def multiply(x: jax.Array, weight: QuantizedArray, precision: Any) -> jax.Array:
  """x @ W^T in x's dtype. What is kept for the backward pass is the packed weight only."""
  return _multiply(x, weight, precision, jax.typeof(x).sharding)


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
  if AxisType.Explicit in place.mesh.axis_types:
    dx = jax.sharding.reshard(dx, place)
  return dx, None  # None: no gradient for the frozen weight


_multiply.defvjp(multiply_forward, multiply_backward)
