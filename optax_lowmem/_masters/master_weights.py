"""`master_weights`: parameters in bfloat16, with the bits that they lack in the state."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowmem._arguments.checks import check_transformation
from optax_lowmem._arguments.hyperparameters import check_static
from optax_lowmem._arguments.nnx_boxes import unbox
from optax_lowmem._masters.bits import (
  bits_of,
  float32_of,
  is_finite,
  landing,
  remainder_of,
  upper,
)
from optax_lowmem._masters.position_noise import number_of, position_noise
from optax_lowmem._masters.remainders import DTYPES, aligned, joined, remainders, zeros
from optax_lowmem._masters.wrapped import (
  boxed_alike,
  check_parameters,
  check_update,
  in_float32,
  update_narrow,
)
from optax_lowmem._programs.program import rounding_point
from optax_lowmem._update.extra_args import compiled_outside_jit


class MasterWeightsState(NamedTuple):
  """State of `master_weights`.

  Attributes:
    step: number of updates, int32; what 8 bits are rounded by depends on it.
    remainder: a tree like the parameters: int16 or int8 for those in bfloat16,
      `optax.MaskedNode()` for those in float32.
    inner_state: that of the transformation within, made for float32 parameters.
  """

  step: Any
  remainder: Any
  inner_state: Any


def master_weights(
  inner: optax.GradientTransformation, bits: Literal[16, 8] = 16
) -> optax.GradientTransformationExtraArgs:
  r"""Trains parameters in bfloat16 by their float32 master weights, of which it keeps what is lost.

  A bfloat16 is the upper half of a float32. The lower half lies in the state, so that parameters
  and state together are the float32 master weights, for 2 bytes a parameter (or 1) instead of 4. An
  update joins the two, runs `inner` in float32, and splits the result:

  .. math::
    w_{t-1} &= \mathrm{join}(p_{t-1}, r_{t-1}), \qquad
    s_t, v_t = \mathrm{inner}(g_t, s_{t-1}, w_{t-1}), \\
    p_t, r_t &= \mathrm{split}(w_{t-1} + v_t), \qquad u_t = p_t - p_{t-1}.

  The update :math:`u_t` is float32, and `optax.apply_updates`, which adds in float32 and then
  rounds, makes :math:`p_t` of it exactly. With 16 bits `join` undoes `split` for every number, so
  that the run is float32 training with a bfloat16 copy of the weights, bit for bit. The copy is
  rounded to the nearest, halves away from zero: rounded to even, as JAX does, two masters would
  have one representation.

  That is: of the same program, but for the last bit where XLA multiplies and adds in one step in
  one and not in the other.

  With 8 bits the master has 16 significant bits, not 24. It is rounded at random, by a hash of step
  and index, with the probability that makes its mean right: rounded to the nearest, a step of less
  than 2^-17 of a weight would be lost. So it walks at random around that of float32.

  **It must be the outermost transformation**: what changes its updates (a learning rate, a mask, a
  clip) belongs into `inner`, or the parameters land elsewhere than the state says. `quantized` and
  `optax.apply_if_finite` go into it, `offloaded` around it or into it, and so does
  `optax.MultiSteps`: within, it sums gradients in float32, around it in bfloat16. What changes
  gradients may come first, as ``optax.chain(optax.clip(1.0), lowmem.master_weights(tx))``. Nothing
  else may change the parameters: to set them, use `with_master_params`.

  Parameters in float32 (norms, often) are given to `inner` as they are, and so are their updates.

  If `inner` is elementwise, which is proved from its jaxpr, masters are joined and split in the
  pass that updates the moments, by a kernel or in tiles, and none of their arrays is ever float32.
  Of one that clips by a global norm, moments and masters are updated apart: put the clip first.

  One master may be moved: where a weight becomes more than 2^15 times smaller in one step, there
  may be no float32 update that leads to it. The master is then what is nearest to where
  `apply_updates` lands, at most 2^-24 of the weight's old value away. A NaN stays a NaN.

  Args:
    inner: the transformation. It is given gradients and parameters in float32, and so is its
      `init`, for which they are made once.
    bits: of the remainder: 16, or 8.

  Returns:
    The transformation. Its state is a `MasterWeightsState`; `master_params` gives the weights.

  Raises:
    ValueError: if `bits` is neither 16 nor 8; from `update`, without `params`, for gradients of
      other shapes, or for a state that was made with other bits or dtypes.
    TypeError: if `inner` is no transformation; from `init` and `update`, for parameters that are
      neither bfloat16 nor float32, and if none is bfloat16.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params = jnp.ones(4, jnp.bfloat16)
    >>> tx = lowmem.master_weights(optax.sgd(1e-4))
    >>> state = tx.init(params)
    >>> for _ in range(100):  # bfloat16 alone would stay at 1
    ...   updates, state = tx.update(jnp.ones(4, jnp.bfloat16), state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params[0], lowmem.master_params(params, state)[0])
    0.988281 0.98999834

  References:
    Micikevicius et al, `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`_, 2017;
    Zamirai et al, `Revisiting BFloat16 Training <https://arxiv.org/abs/2010.06192>`_, 2020, which
    splits a weight in the same way for its Kahan sums
  """
  check_transformation("inner", inner)
  check_static("bits", bits, ("bits",))
  if bits not in DTYPES:
    raise ValueError(f"`bits` must be 16 or 8, got {bits!r}.")
  inner = optax.with_extra_args_support(inner)

  def init(params):
    params = unbox(params)
    check_parameters("master_weights", params)
    remainder = zeros(params, DTYPES[bits])
    return MasterWeightsState(jnp.zeros((), jnp.int32), remainder, inner.init(in_float32(params)))

  def update(updates, state, params=None, **extra_args):
    # A layer of a stack has other noise than the others (`numbered_from`). An argument, for what is
    # compiled outside `jit` is kept.
    return run(updates, state, params, {"first": number_of(0), "given": extra_args})

  @boxed_alike
  def checked(grads, state, params, extra_args):
    check_update("master_weights", grads, params)
    remainders(state, params, DTYPES[bits])
    return update_narrow(split, grads, state, params, extra_args, indexed=bits == 8)

  def split(grads, state, params, index, first, given):
    """The bfloat16 at which each parameter is to be, in float32; of others, the update."""
    lows = aligned(state, params)
    masters = joined(params, lows)
    changes, inner_state = inner.update(grads, state.inner_state, masters, **given)
    targets, treedef = jax.tree.flatten(changes)
    new: list[Any] = [optax.MaskedNode()] * len(lows)
    flat = zip(jax.tree.leaves(params), lows, jax.tree.leaves(masters), strict=True)
    for k, (p, low, master) in enumerate(flat):
      if low is not None:
        pattern = bits_of(master + rounding_point(targets[k]))
        if bits == 8:
          rounded = (pattern + position_noise(index[k], 8, first + k, state.step)) & ~0xFF
          pattern = jnp.where(is_finite(pattern), rounded, pattern)
        targets[k] = float32_of(upper(pattern))
        low = remainder_of(pattern, landing(p, targets[k]))
        new[k] = (low if bits == 16 else low >> 8).astype(DTYPES[bits])
    step = optax.safe_increment(state.step)
    state = MasterWeightsState(step, treedef.unflatten(new), inner_state)
    return treedef.unflatten(targets), state

  run = compiled_outside_jit(checked)
  return optax.GradientTransformationExtraArgs(init, update)
