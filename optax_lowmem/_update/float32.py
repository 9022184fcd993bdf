"""Transformations of which only one part is quantized, computed in float32 throughout."""

from __future__ import annotations

import optax

from optax_lowmem._update.engine import in_phases_on_gpus
from optax_lowmem._update.whole_arrays import as_arrays, update_dense


def chain(
  *parts: optax.GradientTransformation, phases: bool = True
) -> optax.GradientTransformationExtraArgs:
  """`optax.chain`, in float32 whatever the dtype of parameters and gradients; see `in_float32`."""
  return in_float32(optax.chain(*parts), phases=phases)


def in_float32(
  tx: optax.GradientTransformation, phases: bool = True
) -> optax.GradientTransformationExtraArgs:
  """`tx`, given gradients and parameters in float32; updates are in the wider of their dtypes.

  Norms and means of 16-bit numbers would lose three digits, and the moments made of them as well.

  Args:
    tx: the transformation.
    phases: whether GPUs compute it in phases, in which nothing of a parameter's size is kept. Sums
      are then taken in another order. Not of moments in 4 bits: their codes and an update are no
      one launch, and between the two XLA keeps all gradients of a training step (4.1 B/param).
  """
  tx = optax.with_extra_args_support(tx)

  def init(params):
    return tx.init(as_arrays(params))

  def run(updates, state, params, extra_args):
    return update_dense(tx.update, updates, state, params, extra_args)

  def update(updates, state, params=None, **extra_args):
    execute = in_phases_on_gpus if phases else lambda run, *args: run(*args)
    return execute(run, updates, state, params, extra_args)

  return optax.GradientTransformationExtraArgs(init, update)
