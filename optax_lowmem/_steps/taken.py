"""An update that is taken or not, as a condition says."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_lowmem._update.announced import is_heard

# What is not to move gets this for an update: it leaves a negative zero as it is, and so the sign
# of a master weight of which that is the upper half.
STILL = -0.0


def update_if(
  holds: jax.Array,
  inner: optax.GradientTransformationExtraArgs,
  grads: Any,
  state: Any,
  params: Any,
  extra_args: dict[str, Any],
) -> tuple[Any, Any]:
  """`inner.update` where `holds`, and its state as it was elsewhere.

  Args:
    holds: a bool.
    inner: the transformation.
    grads: gradients that are `STILL` where `holds` is not: the updates then.
    state: that of `inner`.
    params: the parameters, or None.
    extra_args: passed on.

  Returns:
    Updates and state.
  """
  # Traced once: for the dtypes of the updates, and then as it is.
  run = jax.jit(lambda g, s, p: inner.update(g, s, p, **extra_args))
  state = jax.tree.map(jnp.asarray, state)
  shapes, new_state = jax.eval_shape(run, grads, state, params)
  if jax.tree.structure(new_state) != jax.tree.structure(state):
    raise ValueError(
      "`inner` returns a state of another structure than it was given, so that the two cannot be "
      "chosen between."
    )

  def start(g, shape):
    if g.shape == shape.shape and g.dtype == shape.dtype:
      return g
    return jnp.full_like(g, STILL, dtype=shape.dtype, shape=shape.shape)

  begin = jax.tree.map(start, grads, shapes)

  def taken(updates, state):
    given = jax.tree.map(lambda u, g, b: u if b is g else g, updates, grads, begin)
    new, moved = run(given, state, params)
    return new, jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), moved, state)

  if is_heard():
    # `offloaded` opens conditions: what chooses is then run where the state is.
    return jax.lax.cond(holds, taken, lambda u, s: (u, s), begin, state)
  # A loop of one trip or none. Of a condition XLA copies what its branches return: on an H100, 8
  # B/param of temporaries around 8-bit AdamW and 12 around `optax.adamw`, where a loop, which
  # changes its arrays in place, has none.
  trips = holds.astype(jnp.int32)
  return jax.lax.fori_loop(0, trips, lambda _, carry: taken(*carry), (begin, state))
