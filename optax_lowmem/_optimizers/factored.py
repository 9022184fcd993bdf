"""Second moments held as means over two axes: what Adafactor and CAME share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from optax_lowmem._quantization.array import finite_or
from optax_lowmem._sharding.layout import laid_out, sharding_of

# The axes that `by_layer` maps over: the count is one for all layers.
_LAYERS: Any = optax.FactoredState(None, 0, 0, 0)  # pyright: ignore[reportArgumentType]


def zeros_without(p: Any, axis: int) -> jax.Array:
  """Float32 zeros of the shape of `p` without `axis`, which lie as its other axes do.

  Nothing is read of `p`. Its sum over `axis` would have that shape and lie so, too.
  """

  def rest(sizes):
    return tuple(n for k, n in enumerate(sizes) if k != axis % p.ndim)

  where: Any = sharding_of(p)
  if where is not None:
    spec = rest([*where.spec, *[None] * (p.ndim - len(where.spec))])
    where = laid_out(where.mesh, spec, where.memory_kind)
  elif isinstance(p, jax.Array) and not isinstance(p, Tracer) and p.committed:
    where = p.sharding  # that of one device
  return jnp.zeros_like(p, jnp.float32, shape=rest(p.shape), device=where)


def zeros_as(mean: jax.Array, p: Any, last: bool) -> jax.Array:
  """`mean`, zeros for means over an axis of `p`, lying as the axes of `p` do that remain.

  If two axes of `p` have one length, the mean is over the last of them or over the first.
  """
  axes = [k for k in range(p.ndim) if (*p.shape[:k], *p.shape[k + 1 :]) == mean.shape]
  if p.ndim < 2 or not axes:
    return mean  # of an array that is not factored
  return zeros_without(p, axes[-1 if last else 0])


def inverse_roots(
  square: jax.Array, row: jax.Array, col: jax.Array, decay: float, part: Any
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
  r"""Averages rows and columns, and factors :math:`\sqrt{\bar r / (r c^\top)}` of the new averages.

  Args:
    square: (…, R, C), of which r averages the means over its columns, c those over its rows.
    row: (…, R), r until now.
    col: (…, C), c until now.
    decay: of the averages.
    part: what part of its size c has; 1 if that is not corrected.

  Returns:
    The factor of rows, (…, R), that of columns, (…, C), and the new r and c. Where these are not
    finite, they keep their last values.
  """
  new_row, new_col = average(decay, row, square.mean(-1)), average(decay, col, square.mean(-2))
  by_row = jax.lax.rsqrt(new_row / new_row.mean(-1, keepdims=True))
  by_col = jax.lax.rsqrt(new_col / part)
  return by_row, by_col, (finite_or(new_row, row), finite_or(new_col, col))


def average(decay: float, old: jax.Array, x: jax.Array) -> jax.Array:
  """The exponential moving average `old`, after `x`."""
  return decay * old + (1 - decay) * x


def by_layer(rms: Any) -> optax.GradientTransformation:
  """`rms`, with an `optax.FactoredState`, of each matrix in the last two axes by itself."""

  def over_layers(fn, p, *axes):
    for _ in range(p.ndim - 2):
      fn = jax.vmap(fn, *axes)
    return fn

  def init(params):
    def init_array(p):
      return over_layers(rms.init, p, 0, _LAYERS)(p)[1:]

    return optax.FactoredState(rms.init(()).count, *map_leaves(init_array, 3, params))

  def update(updates, state, params=None):
    def update_array(g, row, col, v, p):
      run = over_layers(rms.update, g, (0, _LAYERS, 0), (0, _LAYERS))
      u, new = run(g, optax.FactoredState(state.count, row, col, v), p)
      return u, *new[1:]

    u, *stats = map_leaves(update_array, 4, updates, *state[1:], params)
    count = rms.update((), optax.FactoredState(state.count, (), (), ()), ())[1].count
    return u, optax.FactoredState(count, *stats)

  return optax.GradientTransformation(init, update)


def map_leaves(fn: Callable[..., Sequence[Any]], count: int, tree: Any, *rest: Any) -> list[Any]:
  """`jax.tree.map` of a function with `count` results: a tree of each."""
  leaves, treedef = jax.tree.flatten(tree)
  results = map(fn, leaves, *map(treedef.flatten_up_to, rest))
  return unzipped(treedef, list(results), count)


def unzipped(treedef: Any, results: Sequence[Sequence[Any]], count: int) -> list[Any]:
  """Trees of what is first in each of `results`, of what is second, …"""
  return [treedef.unflatten([result[k] for result in results]) for k in range(count)]
