"""`loss_scaling`: gradients of a scaled loss, for float16, and no step of those that overflow."""

from __future__ import annotations

import numbers
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowmem._arguments.checks import check_transformation
from optax_lowmem._arguments.hyperparameters import check_static
from optax_lowmem._arguments.nnx_boxes import unbox
from optax_lowmem._masters.bits import bits_of, float32_of
from optax_lowmem._masters.wrapped import boxed_alike
from optax_lowmem._state.gradients import check_gradients
from optax_lowmem._state.nnx_variables import unbox_quantized
from optax_lowmem._steps.in_place import in_place
from optax_lowmem._steps.taken import STILL, update_if
from optax_lowmem._update.extra_args import compiled_outside_jit

_LEAST, _LARGEST = (float(x) for x in (jnp.finfo(jnp.float32).tiny, jnp.finfo(jnp.float32).max))


class LossScalingState(NamedTuple):
  """State of `loss_scaling`.

  Attributes:
    scale: what the loss is multiplied by, float32.
    good_steps: steps since the scale last changed, int32.
    skipped_steps: steps that were skipped, in all, int32.
    inner_state: that of the transformation within.
  """

  scale: Any
  good_steps: Any
  skipped_steps: Any
  inner_state: Any


def loss_scaling(
  inner: optax.GradientTransformation,
  initial_scale: float = 2.0**15,
  *,
  growth_interval: int | None = 2000,
  growth_factor: float = 2.0,
  backoff_factor: float = 0.5,
  min_scale: float = 1.0,
  max_scale: float = 2.0**24,
) -> optax.GradientTransformationExtraArgs:
  r"""Divides gradients by the scale of the loss, and skips a step in which one is not finite.

  Gradients below 6e-8 are zero in float16. So the loss is multiplied by a scale :math:`c`,
  with `scale_loss`, and its gradients :math:`h` are divided by it, in float32:

  .. math::
    g_t = h_t / c_t, \qquad
    c_{t+1} = \begin{cases}
      c_t \cdot \text{backoff\_factor} & \text{if } g_t \text{ is not finite} \\
      c_t \cdot \text{growth\_factor} & \text{after growth\_interval finite ones in a row} \\
      c_t & \text{otherwise,} \end{cases}

  between `min_scale` and `max_scale`. Where a gradient of any parameter is not finite, updates are
  zeros, `inner` is not run, and its state stays as it is, bit for bit.

  Put it outermost: around `quantized`, `master_weights`, and what clips gradients, which within it
  are of the loss as it is; around `multi_steps`, where a micro-batch that overflows is left out and
  the scale may change between two of one step. Within `multi_steps` it works, too: then all
  gradients of a step are of one scale, and are skipped together. In `optax.chain`, nothing that
  depends on the size of gradients may come before it. bfloat16 has the range of float32 and needs
  no scale.

  The loss is best float32, as a mean in float32 of what was computed in float16 is: the scale
  itself is the first gradient, and 2^16 is infinite in float16.

  Args:
    inner: the transformation. It is given gradients in float32.
    initial_scale: of the loss.
    growth_interval: finite steps in a row after which the scale grows; None for a scale that never
      changes. Steps that are not finite are skipped then, too.
    growth_factor: by which it grows, at least 1.
    backoff_factor: by which it is multiplied where a gradient is not finite, between 0 and 1.
    min_scale: the least scale.
    max_scale: the largest.

  Returns:
    The transformation. Its state is a `LossScalingState`.

  Raises:
    ValueError: for numbers out of range; from `update`, for gradients of other shapes than the
      parameters.
    TypeError: if `inner` is no transformation, or something else no number; from `update`, for
      gradients that are not floating.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params = jnp.ones(4)
    >>> tx = lowmem.loss_scaling(optax.sgd(1.0))
    >>> state = tx.init(params)
    >>> def loss(params):  # its gradients are 1e-8: zero in float16
    ...   return (params.astype(jnp.float16) * jnp.float16(1e-4)).astype(jnp.float32).sum() * 1e-4
    >>> grads = jax.grad(lambda p: lowmem.scale_loss(loss(p), state))(params)
    >>> updates, state = tx.update(grads, state, params)
    >>> print(f"{updates[0]:.2g}")
    -1e-08
    >>> updates, state = tx.update(grads.at[0].set(jnp.inf), state, params)
    >>> print(updates[1], state.scale)
    -0.0 16384.0

  References:
    Micikevicius et al, `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`_, 2017
  """
  check_transformation("inner", inner)
  limits = {"min_scale": min_scale, "max_scale": max_scale}
  factors = {"growth_factor": growth_factor, "backoff_factor": backoff_factor}
  for name, value in {"initial_scale": initial_scale, **limits, **factors}.items():
    check_static(name, value, ())
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
      raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not _LEAST <= value <= _LARGEST:
      raise ValueError(f"`{name}` must be positive and finite in float32, got {value}.")
  if not min_scale <= initial_scale <= max_scale:
    raise ValueError(
      f"`initial_scale` must be from `min_scale` to `max_scale`, {min_scale} to {max_scale}, got "
      f"{initial_scale}."
    )
  if growth_factor < 1:
    raise ValueError(f"`growth_factor` must be at least 1, got {growth_factor}.")
  if backoff_factor > 1:
    raise ValueError(f"`backoff_factor` must be at most 1, got {backoff_factor}.")
  interval = _interval(growth_interval)
  inner = optax.with_extra_args_support(inner)

  def init(params):
    params = unbox(params)
    good, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # both may be donated
    scale = jnp.asarray(initial_scale, jnp.float32)
    state = LossScalingState(scale, good, skipped, inner.init(params))
    return unbox_quantized(state)

  def update(updates, state, params=None, **extra_args):
    return run(updates, state, params, extra_args)

  @boxed_alike
  def checked(grads, state, params, extra_args):
    _check_floating(grads)
    check_gradients(grads, params)
    factor = 1.0 / state.scale
    good = jnp.asarray(True)
    for g in jax.tree.leaves(grads):
      good &= jnp.isfinite(_largest(g) * factor)

    def quotient(g):  # of a power of two, the product is the quotient, exactly
      return jnp.where(good, g.astype(jnp.float32) * factor, STILL)

    def unscale(g):
      if g.dtype != jnp.float32:
        return quotient(g)
      return in_place(lambda arrays, _: [quotient(arrays[0])], [g])[0]

    unscaled = jax.tree.map(unscale, grads)
    updates, inner_state = update_if(good, inner, unscaled, state.inner_state, params, extra_args)
    scale, good_steps = state.scale, state.good_steps
    if interval is not None:
      grows = good & (good_steps + 1 >= interval)
      grown = jnp.minimum(scale * growth_factor, max_scale)
      lower = jnp.maximum(scale * backoff_factor, min_scale)
      scale = jnp.where(good, jnp.where(grows, grown, scale), lower)
      good_steps = jnp.where(good & ~grows, good_steps + 1, 0)
    skipped = jnp.where(good, state.skipped_steps, optax.safe_increment(state.skipped_steps))
    return updates, LossScalingState(scale, good_steps, skipped, inner_state)

  run = compiled_outside_jit(checked)
  return optax.GradientTransformationExtraArgs(init, update)


def scale_loss(loss: jax.typing.ArrayLike, state: Any) -> jax.Array:
  """The loss, times the scale of `loss_scaling`; to be differentiated.

  Args:
    loss: a number or a floating array.
    state: the optimizer's state, as the next `update` will be given it; the `LossScalingState` may
      be within it.

  Returns:
    The product, in float32.

  Raises:
    ValueError: if there is no or more than one `LossScalingState` in `state`.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> tx = optax.chain(lowmem.loss_scaling(optax.adam(1e-3), initial_scale=1024.0))
    >>> print(lowmem.scale_loss(jnp.float32(0.5), tx.init(jnp.ones(4))))
    512.0
  """

  def is_ours(x):
    return isinstance(x, LossScalingState)

  found = [x for x in jax.tree.leaves(unbox(state), is_leaf=is_ours) if is_ours(x)]
  if len(found) != 1:
    raise ValueError(
      f"`state` must hold one `LossScalingState`, and it holds {len(found)}. Pass the state of a "
      "transformation with `loss_scaling`, of an `nnx.Optimizer` its `opt_state`; of one in parts "
      "(`optax.partition`), put `loss_scaling` around it."
    )
  return jnp.asarray(loss).astype(jnp.float32) * jax.lax.stop_gradient(found[0].scale)


def _interval(growth_interval: Any) -> int | None:
  if growth_interval is None:
    return None
  check_static("growth_interval", growth_interval, ())
  try:
    interval = operator.index(growth_interval)
  except TypeError:
    raise TypeError(
      f"`growth_interval` must be an integer, or None for a scale that never changes, got "
      f"{growth_interval!r}."
    ) from None
  if interval < 1:
    raise ValueError(
      f"`growth_interval` must be at least 1, got {interval}. None is for a scale that stays."
    )
  return interval


def _largest(g: jax.Array) -> jax.Array:
  """The largest magnitude of an array as float32; if there is one, a NaN.

  By its bits: a maximum of floats may pass over a NaN on a CPU, and of `jnp.isfinite(x).all()` XLA
  writes the bools to memory there, 1 B/param. It writes what a maximum is made of, too, 4 B/param.
  So a CPU is given one that is made of the array itself; partitioned, XLA could not reduce by it.
  docs/xla_notes.md#maximum
  """

  def magnitude(x):
    return bits_of(x.astype(jnp.float32)) & 0x7FFFFFFF

  def larger(a, b):
    return float32_of(jnp.maximum(magnitude(a), magnitude(b)))

  def plain(g):
    return float32_of(jnp.max(magnitude(g), initial=0))

  def of_itself(g):
    return jax.lax.reduce(g, jnp.float32(0), larger, tuple(range(g.ndim)))

  g = jax.lax.stop_gradient(g)
  if g.dtype != jnp.float32 or jax.device_count() > 1:
    return plain(g)
  return jax.lax.platform_dependent(g, cpu=of_itself, default=plain)


def _check_floating(grads: Any) -> None:
  for path, g in jax.tree_util.tree_flatten_with_path(grads)[0]:
    if not jnp.issubdtype(jnp.result_type(g), jnp.floating):
      raise TypeError(
        f"the gradient of {jax.tree_util.keystr(path) or '()'} is {jnp.result_type(g)}, and "
        "`loss_scaling` takes floating ones. Leave it out with `optax.masked`."
      )
