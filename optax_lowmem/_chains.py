"""Transformations of which only one part is held in few bits, in float32 throughout."""

from __future__ import annotations

import optax

from optax_lowmem._engine import update_dense


def chain(*parts: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """`optax.chain`, in float32 whatever the dtype of parameters and gradients."""
  return in_float32(optax.chain(*parts))


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """`tx`, given gradients and parameters in float32; updates are in the wider of their dtypes.

  Norms and means of 16-bit numbers would lose three digits, and the moments made of them as well.
  """
  tx = optax.with_extra_args_support(tx)

  def update(updates, state, params=None, **extra_args):
    return update_dense(tx.update, updates, state, params, extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update)
