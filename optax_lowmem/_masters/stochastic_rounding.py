"""`stochastic_rounding`: parameters in bfloat16, rounded at random, without bias."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowmem._arguments.checks import check_transformation
from optax_lowmem._arguments.hyperparameters import check_static
from optax_lowmem._arguments.nnx_boxes import unbox
from optax_lowmem._masters.bits import bits_of, float32_of, is_finite, upper
from optax_lowmem._masters.position_noise import number_of, position_noise
from optax_lowmem._masters.wrapped import (
  boxed_alike,
  check_parameters,
  check_update,
  in_float32,
  update_narrow,
)
from optax_lowmem._programs.program import rounding_point
from optax_lowmem._update.extra_args import compiled_outside_jit


class StochasticRoundingState(NamedTuple):
  """State of `stochastic_rounding`.

  Attributes:
    step: number of updates, int32: with the seed, the key of the next.
    inner_state: that of the transformation within, made for float32 parameters.
  """

  step: Any
  inner_state: Any


def stochastic_rounding(
  inner: optax.GradientTransformation, seed: int
) -> optax.GradientTransformationExtraArgs:
  r"""Trains parameters in bfloat16, rounded at random so that their mean is right.

  Between two neighbouring bfloat16 :math:`a < b`, the new weight :math:`w = p_{t-1} + v_t`, with
  :math:`v_t` the update of `inner` in float32, becomes

  .. math::
    p_t = \begin{cases} b & \text{with probability } (w - a) / (b - a) \\ a & \text{otherwise}
    \end{cases}, \qquad \mathrm{E}\, p_t = w.

  Rounded to the nearest, steps of less than 2^-9 of a weight are lost, all of them; so they are
  taken, now and then, whole. The price is noise, which `master_weights` does not have, for 2 bytes
  a parameter.

  The random bits are a hash of `seed`, step, parameter and index. There is no state but the step. A
  run that is resumed, or whose parameters are sharded otherwise, is the same; within
  `jax.shard_map`, where a shard is all that can be seen, indices are those of the shard, so give
  each its own seed or leave the update outside. Under `jax.vmap` all examples share them.

  **It must be the outermost transformation**, as `master_weights` must, and works with the same
  others. Parameters in float32 are given to `inner` as they are, and so are their updates.

  Args:
    inner: the transformation. It is given gradients and parameters in float32, and so is its
      `init`, for which they are made once.
    seed: of the random bits, an integer from 0 to 2^32 - 1.

  Returns:
    The transformation. Its state is a `StochasticRoundingState`.

  Raises:
    ValueError: if `seed` is out of range; from `update`, without `params` or for gradients of other
      shapes.
    TypeError: if `inner` is no transformation or `seed` no integer; from `init` and `update`, for
      parameters that are neither bfloat16 nor float32, and if none is bfloat16.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params = jnp.ones(10_000, jnp.bfloat16)
    >>> tx = lowmem.stochastic_rounding(optax.sgd(1e-4), seed=0)
    >>> state = tx.init(params)
    >>> for _ in range(100):  # rounded to the nearest they would stay at 1
    ...   updates, state = tx.update(jnp.ones_like(params), state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(f"{params.astype(jnp.float32).mean():.3f}")
    0.990

  References:
    Gupta et al, `Deep Learning with Limited Numerical Precision
    <https://arxiv.org/abs/1502.02551>`_, 2015; Zamirai et al, `Revisiting BFloat16 Training
    <https://arxiv.org/abs/2010.06192>`_, 2020
  """
  check_transformation("inner", inner)
  check_static("seed", seed, ("seed",))
  try:
    key = operator.index(seed)
  except TypeError:
    raise TypeError(f"`seed` must be an integer, got {seed!r}.") from None
  if not 0 <= key < 2**32:
    raise ValueError(f"`seed` must be from 0 to 2^32 - 1, got {seed}.")
  inner = optax.with_extra_args_support(inner)

  def init(params):
    params = unbox(params)
    check_parameters("stochastic_rounding", params)
    return StochasticRoundingState(jnp.zeros((), jnp.int32), inner.init(in_float32(params)))

  def update(updates, state, params=None, **extra_args):
    # A layer of a stack has other noise than the others (`numbered_from`). An argument, for what is
    # compiled outside `jit` is kept.
    return run(updates, state, params, {"first": number_of(0), "given": extra_args})

  @boxed_alike
  def checked(grads, state, params, extra_args):
    check_update("stochastic_rounding", grads, params)
    return update_narrow(rounded, grads, state, params, extra_args, indexed=True)

  def rounded(grads, state, params, index, first, given):
    """The bfloat16 at which each parameter is to be, in float32; of others, the update."""
    weights = in_float32(params)
    changes, inner_state = inner.update(grads, state.inner_state, weights, **given)
    targets, treedef = jax.tree.flatten(changes)
    leaves = jax.tree.leaves(weights)
    for k in index:
      pattern = bits_of(leaves[k] + rounding_point(targets[k]))
      # Within one sign and exponent, bits are linear in what they stand for: so is the probability.
      drawn = (pattern + position_noise(index[k], 16, key, first + k, state.step)) & ~0xFFFF
      targets[k] = float32_of(jnp.where(is_finite(pattern), drawn, upper(pattern)))
    new = StochasticRoundingState(optax.safe_increment(state.step), inner_state)
    return treedef.unflatten(targets), new

  run = compiled_outside_jit(checked)
  return optax.GradientTransformationExtraArgs(init, update)
