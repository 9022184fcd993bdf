"""A stack of a language model's layers, trained by an ordinary step and in the backward pass."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_lowmem as lowmem

LAYERS, WIDTH, HIDDEN, HEAD, ROWS = 24, 2048, 5632, 64, 64  # near TinyLlama's; a short batch
_SQUARE, _WIDE = (WIDTH, WIDTH), (WIDTH, HIDDEN)
MATRICES = {
  "q": _SQUARE, "k": _SQUARE, "v": _SQUARE, "o": _SQUARE,
  "gate": _WIDE, "up": _WIDE, "down": _WIDE[::-1],
}  # fmt: skip
LAYER_SIZE = sum(map(math.prod, MATRICES.values()))
SIZE = LAYERS * LAYER_SIZE
WORKSPACE = 32 << 20  # that XLA gives the products of any program for an H100


def activations(dtype: Any) -> int:
  """Bytes of what the layers are given, which is kept for the backward pass."""
  return LAYERS * ROWS * WIDTH * jnp.dtype(dtype).itemsize


def stack(dtype: Any) -> dict[str, Any]:
  """Shapes of the layers' parameters; norms are float32."""
  found = {n: jax.ShapeDtypeStruct((LAYERS, *shape), dtype) for n, shape in MATRICES.items()}
  norms = {f"norm{i}": jax.ShapeDtypeStruct((LAYERS, WIDTH), jnp.float32) for i in (1, 2)}
  return found | norms


def _normed(x: jax.Array, weight: jax.Array) -> jax.Array:
  y = x.astype(jnp.float32)
  return (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6) * weight).astype(x.dtype)


def layer(p: dict[str, jax.Array], x: jax.Array, batch: Any = None) -> jax.Array:
  """Attention and a gated network, of (1, rows, width)."""
  h = _normed(x, p["norm1"])
  q, k, v = ((h @ p[n]).reshape(*x.shape[:-1], -1, HEAD) for n in "qkv")
  x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ p["o"]
  h = _normed(x, p["norm2"])
  return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def head(outer: Any, x: jax.Array, batch: Any) -> jax.Array:
  """A loss without parameters: the layers are what is measured."""
  return (x.astype(jnp.float32) ** 2).mean()


def ordinary(tx: optax.GradientTransformation, dtype: Any) -> tuple[Any, Any, tuple[int, ...]]:
  """A step that makes all gradients and then updates; its arguments; which to donate."""

  def loss(layers, x):
    x, _ = jax.lax.scan(lambda x, p: (jax.checkpoint(layer)(p, x), None), x, layers)
    return head(None, x, None)

  def step(layers, state, x):
    value, grads = jax.value_and_grad(loss)(layers, x)
    updates, state = tx.update(grads, state, layers)
    return value, optax.apply_updates(layers, updates), state

  layers = stack(dtype)
  return step, (layers, jax.eval_shape(tx.init, layers), _x(dtype)), (0, 1)


def unrolled(tx: optax.GradientTransformation, dtype: Any) -> tuple[Any, Any, tuple[int, ...]]:
  """`ordinary` of layers that are not stacked."""

  def loss(layers, x):
    for p in layers:
      x = jax.checkpoint(layer)(p, x)
    return head(None, x, None)

  def step(layers, state, x):
    value, grads = jax.value_and_grad(loss)(layers, x)
    updates, state = tx.update(grads, state, layers)
    return value, optax.apply_updates(layers, updates), state

  one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), stack(dtype))
  layers = [one] * LAYERS
  return step, (layers, jax.eval_shape(tx.init, layers), _x(dtype)), (0, 1)


def in_backward(
  tx: optax.GradientTransformation, dtype: Any, **options: Any
) -> tuple[Any, Any, tuple[int, ...]]:
  """A step that updates each layer when its gradient is there."""
  training = lowmem.update_in_backward(
    lambda outer, x: x, layer, head, tx, outer_tx=optax.identity(), **options
  )
  params = {"outer": {}, "layers": stack(dtype)}
  state = jax.eval_shape(training.init, params)
  if lowmem.state_bytes(state)["pinned_host"]:
    state = lowmem.paged(state)  # shapes do not say in which memory they are
  return training.step, (params, state, _x(dtype)), (0, 1)


def as_one_program(
  tx: optax.GradientTransformation, dtype: Any
) -> tuple[Any, Any, tuple[int, ...]]:
  """What `in_backward` would be if a trip of its loop were not cut: as one writes it first."""

  def step(layers, state, x):
    x, inputs = jax.lax.scan(lambda x, p: (layer(p, x), x), x, layers)
    value, gradient = jax.value_and_grad(lambda x: head(None, x, None))(x)

    def trip(i, carry):
      k = LAYERS - 1 - i
      layers, state, gradient = carry
      p, s, x = jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, k, keepdims=False), (layers, state, inputs)
      )
      grads, gradient = jax.vjp(layer, p, x)[1](gradient)
      updates, s = tx.update(grads, s, p)
      new = optax.apply_updates(p, updates), s
      layers, state = jax.tree.map(
        lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, k, 0), (layers, state), new
      )
      return layers, state, gradient

    layers, state, _ = jax.lax.fori_loop(0, LAYERS, trip, (layers, state, gradient))
    return value, layers, state

  _, (params, state, x), donate = in_backward(tx, dtype)
  return step, (params["layers"], state["layers"], x), donate


def _x(dtype: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1, ROWS, WIDTH), dtype)
