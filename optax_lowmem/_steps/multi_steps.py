"""`multi_steps`: gradients accumulated in 8 or 16 bits."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_lowmem._arguments.checks import check_block_size, check_min_size, check_transformation
from optax_lowmem._arguments.hyperparameters import check_static
from optax_lowmem._arguments.nnx_boxes import unbox
from optax_lowmem._masters.wrapped import boxed_alike
from optax_lowmem._state.gradients import check_gradients
from optax_lowmem._state.moments import is_quantized
from optax_lowmem._state.nnx_variables import unbox_quantized
from optax_lowmem._steps.sums import Form, added, check_sums, empty
from optax_lowmem._steps.taken import update_if
from optax_lowmem._update.decoded_state import is_decoded
from optax_lowmem._update.extra_args import compiled_outside_jit

_BITS = (32, 16, 8)


def multi_steps(
  inner: optax.GradientTransformation,
  every_k: int | Callable[..., Any],
  *,
  bits: Literal[8, 16, 32] = 16,
  use_grad_mean: bool = True,
  should_skip_update_fn: optax.ShouldSkipUpdateFunction | None = None,
  block_size: int | None = None,
  min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
  r"""Accumulates the gradients of several micro-batches for each step, in 8 or 16 bits.

  `optax.MultiSteps` for 1.06 or 2 bytes a parameter instead of 4. Of :math:`k` gradients, the sum
  :math:`s` is held between them, and what `inner` is given of the last is their mean:

  .. math::
    \hat s_i = \mathrm{round}(\hat s_{i-1} + g_i), \quad i = 1, \dots, k - 1, \qquad
    \bar g = (\hat s_{k-1} + g_k) / k.

  The sum is made in float32 and rounded at random, with the probability that makes its mean right:
  :math:`\mathrm{E}\, \bar g` is the mean of the gradients, whatever :math:`k`. With 16 bits, a sum
  is bfloat16, and the random bits are a hash of step, parameter and position, as those of
  `stochastic_rounding`. With 8 bits it is held in codes `"sum8"`, and the random number is a hash
  of the step, the value and the scale of its block. There is no key in the state: a run that is
  resumed or sharded otherwise is the same. How large the noise is says ``docs/mixed_precision.md``.

  Between steps updates are zeros, `inner` is not run, and its state stays as it is. An element that
  is not finite in one of the gradients is NaN in the mean, and only it; the next sum begins anew.

  Put it around `quantized` and `master_weights`, and within `loss_scaling`, `offloaded` and what
  clips the gradient of each micro-batch. Within `master_weights` and `stochastic_rounding` it
  works, too.

  Args:
    inner: the transformation. It is given means in the dtypes of the gradients.
    every_k: gradients a step; or a function that returns it, of the number of steps so far.
    bits: 16, 8, or 32: `optax.MultiSteps` itself, which runs `inner` for every gradient and chooses
      between old and new state.
    use_grad_mean: False gives `inner` the sum instead of the mean.
    should_skip_update_fn: which gradients to leave out, as `optax.skip_not_finite`: a function of
      gradients, number of steps and parameters that returns a bool and what is kept as
      `skip_state`. `loss_scaling` around it does that, too.
    block_size: elements a scale; 64 by default. For `bits=8` alone.
    min_size: sums of smaller arrays are float32.

  Returns:
    The transformation. Its state is an `optax.MultiStepsState`, of which `has_updated` tells
    whether the last update was a step.

  Raises:
    ValueError: for bad `bits`, `every_k`, `block_size` or `min_size`; from `update`, for gradients
      of other shapes than the parameters, or a state made with other `bits`.
    TypeError: if `inner` is no transformation, `every_k` neither an integer nor a function,
      `use_grad_mean` no bool, or `should_skip_update_fn` no function; from `init`, for parameters
      that are not floating.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params = jnp.zeros((64, 64))
    >>> tx = lowmem.multi_steps(optax.sgd(1.0), every_k=2, bits=8)
    >>> state = tx.init(params)
    >>> state.acc_grads
    QuantizedArray(float32[64,64], codebook='sum8', block=64)
    >>> for gradient in (1.0, 3.0):
    ...   updates, state = tx.update(jnp.full_like(params, gradient), state, params)
    ...   print(f"{updates[0, 0]:.3f}", lowmem.has_updated(state))
    -0.000 False
    -2.000 True

  References:
    Gupta et al, `Deep Learning with Limited Numerical Precision
    <https://arxiv.org/abs/1502.02551>`_, 2015, for rounding at random
  """
  check_transformation("inner", inner)
  names = ("bits", "block_size", "min_size")
  for name, value in zip(names, (bits, block_size, min_size), strict=True):
    check_static(name, value, names)
  if bits not in _BITS:
    raise ValueError(f"`bits` must be one of {_BITS}, got {bits!r}.")
  steps_of = _schedule(every_k)
  check_min_size(min_size)
  size = check_block_size(64 if block_size is None else block_size)
  if block_size is not None and bits != 8:
    raise ValueError(f"`block_size` is of `bits=8` alone, got it with `bits={bits}`. Leave it out.")
  if not isinstance(use_grad_mean, bool):
    raise TypeError(f"`use_grad_mean` must be True or False, got {use_grad_mean!r}.")
  if should_skip_update_fn is not None and not callable(should_skip_update_fn):
    raise TypeError(
      "`should_skip_update_fn` must be a function, as `optax.skip_not_finite`, got "
      f"{should_skip_update_fn!r}."
    )
  inner = optax.with_extra_args_support(inner)
  if bits == 32:
    every: Any = optax.MultiSteps(inner, steps_of, use_grad_mean, should_skip_update_fn)
    return optax.GradientTransformationExtraArgs(every.init, every.update)
  skips, form = should_skip_update_fn or _skips_nothing, Form(bits, size, min_size)

  def init(params):
    params = unbox(params)
    _check_floating(params)
    sums = empty(params, form)
    step, mini_step = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # both may be donated
    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params)
    shapes = jax.eval_shape(skips, like, step, like)[1]
    skipped = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    state = optax.MultiStepsState(mini_step, step, inner.init(params), sums, skipped)
    return unbox_quantized(state)

  def update(updates, state, params=None, **extra_args):
    return run(updates, state, params, extra_args)

  @boxed_alike
  def checked(grads, state, params, extra_args):
    check_gradients(grads, params)
    if not is_decoded():  # as `master_weights` around this has it at first
      check_sums(state.acc_grads, grads, form)
    skip, skip_state = skips(grads, state.gradient_step, params)
    skip = jnp.asarray(skip)
    if skip.dtype != jnp.bool_ or skip.ndim:
      raise ValueError(
        "`should_skip_update_fn` must return a bool scalar, then a tree; got "
        f"{skip.dtype}{list(skip.shape)}."
      )
    # `init` cannot know the dtype of gradients, of which what is kept may be made.
    skip_state = jax.tree.map(lambda new, old: new.astype(old.dtype), skip_state, state.skip_state)
    count = state.mini_step + 1
    ends = ~skip & (count >= steps_of(state.gradient_step))
    divisor = count.astype(jnp.float32) if use_grad_mean else jnp.float32(1.0)
    means, sums = added(
      state.acc_grads,
      grads,
      taken=~skip,
      ends=ends,
      divisor=divisor,
      words=(state.gradient_step, state.mini_step),
    )
    changes, inner_state = update_if(ends, inner, means, state.inner_opt_state, params, extra_args)
    mini_step = jnp.where(ends, 0, jnp.where(skip, state.mini_step, count))
    step = jnp.where(ends, optax.safe_increment(state.gradient_step), state.gradient_step)
    return changes, optax.MultiStepsState(mini_step, step, inner_state, sums, skip_state)

  run = compiled_outside_jit(checked)
  return optax.GradientTransformationExtraArgs(init, update)


def has_updated(state: Any) -> jax.Array:
  """Whether the last update of a `multi_steps` was a step, and not of zeros.

  Args:
    state: the optimizer's state; the `optax.MultiStepsState` may be within it.

  Returns:
    A bool. False before the first step; and, where gradients are skipped, True until the next one
    that is not, as optax has it.

  Raises:
    ValueError: if there is no or more than one `optax.MultiStepsState` in `state`.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> tx = optax.chain(optax.clip(1.0), lowmem.multi_steps(optax.sgd(0.1), every_k=1))
    >>> _, state = tx.update(jnp.ones(4), tx.init(jnp.ones(4)), jnp.ones(4))
    >>> print(lowmem.has_updated(state))
    True
  """

  def is_ours(x):
    return isinstance(x, optax.MultiStepsState)

  found = [x for x in jax.tree.leaves(unbox(state), is_leaf=is_ours) if is_ours(x)]
  if len(found) != 1:
    raise ValueError(
      f"`state` must hold one `optax.MultiStepsState`, and it holds {len(found)}. Pass that of a "
      "transformation with `multi_steps`; of several, each one's own."
    )
  return (found[0].mini_step == 0) & (found[0].gradient_step > 0)


def _skips_nothing(*_: Any) -> tuple[jax.Array, tuple[()]]:
  return jnp.asarray(False), ()


def _schedule(every_k: Any) -> Callable[..., Any]:
  if callable(every_k):
    return every_k
  check_static("every_k", every_k, ("every_k",))
  try:
    count = operator.index(every_k)
  except TypeError:
    raise TypeError(
      f"`every_k` must be an integer, or a function of the number of steps, got {every_k!r}."
    ) from None
  if count < 1 or isinstance(every_k, bool):
    raise ValueError(f"`every_k` must be at least 1, got {every_k!r}: it is gradients a step.")
  return lambda _: count


def _check_floating(params: Any) -> None:
  for path, p in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)[0]:
    if is_quantized(p) or not jnp.issubdtype(jnp.result_type(p), jnp.floating):
      raise TypeError(
        f"parameter {jax.tree_util.keystr(path) or '()'} has dtype {getattr(p, 'dtype', type(p))}, "
        "and gradients are accumulated of floating arrays. Leave it out with `optax.masked` or "
        "`optax.partition`."
      )
