"""Programs to compile: a training step, whose gradients come from a backward pass."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def parameters(matrices: int, width: int, dtype: Any = jnp.float32) -> dict[str, Any]:
  """Shapes of square matrices, by name."""
  return {f"w{i:03}": jax.ShapeDtypeStruct((width, width), dtype) for i in range(matrices)}


def loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
  """A deep network of nothing but its matrices."""
  for name in sorted(params):
    x = jnp.tanh(x @ params[name])
  return (x.astype(jnp.float32) ** 2).mean()


def training_step(
  tx: optax.GradientTransformation,
  params: dict[str, Any],
  rows: int = 256,
  state: Any = None,
) -> tuple[Any, tuple[Any, ...], tuple[int, ...]]:
  """A step of training, its arguments, and which of them are donated.

  Gradients are made by the step, as in training: given as arguments they would be copied, and XLA
  could not update a parameter as soon as its gradient is there.

  Args:
    tx: the optimizer.
    params: shapes, from `parameters`.
    rows: of the batch.
    state: of the optimizer; by default the shapes that `tx.init` makes.
  """
  (first, *_) = params.values()
  x = jax.ShapeDtypeStruct((rows, first.shape[0]), first.dtype)

  def step(params, state, x):
    updates, state = tx.update(jax.grad(loss)(params, x), state, params)
    return optax.apply_updates(params, updates), state

  state = jax.eval_shape(tx.init, params) if state is None else state
  return step, (params, state, x), (0, 1)


def backward(params: dict[str, Any], rows: int = 256) -> tuple[Any, tuple[Any, ...]]:
  """The backward pass alone, and its arguments."""
  (first, *_) = params.values()
  return jax.grad(loss), (params, jax.ShapeDtypeStruct((rows, first.shape[0]), first.dtype))


def apply_step(
  tx: optax.GradientTransformation, params: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], tuple[int, ...]]:
  """Update and apply, of gradients that are given; all donated."""

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step, (params, jax.eval_shape(tx.init, params), params), (0, 1, 2)


# How a stack of matrices is cut over eight devices: sizes and names of the mesh, and the cut.
CUTS: dict[str, tuple[tuple[int, ...], tuple[str, ...], PartitionSpec]] = {
  "rows": ((8,), ("x",), PartitionSpec(None, "x", None)),
  "columns": ((8,), ("x",), PartitionSpec(None, None, "x")),
  "both": ((2, 4), ("a", "b"), PartitionSpec(None, "a", "b")),
  "layers": ((8,), ("x",), PartitionSpec("x", None, None)),
}
STACK = (8, 1024, 2048)


def cut_step(
  tx: optax.GradientTransformation, mesh: Mesh, spec: PartitionSpec, dtype: Any = jnp.float32
) -> tuple[Any, tuple[Any, ...], tuple[int, ...]]:
  """`apply_step` of an array of the shape `STACK`, laid out on a mesh that is set.

  The state lies as its parameter; what has another rank is on every device.
  """
  where = NamedSharding(mesh, spec)
  params = {"w": jax.ShapeDtypeStruct(STACK, dtype, sharding=where)}
  step, (_, state, grads), donate = apply_step(tx, params)

  def laid_out(x):
    if x.sharding is not None and x.sharding.mesh.axis_types == mesh.axis_types:
      return x  # on explicit axes, `init` said so
    own = spec if x.ndim == len(STACK) else PartitionSpec()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, own))

  return step, (params, jax.tree.map(laid_out, state), grads), donate
