"""Adafactor: second moments as rows and columns, and a quantized momentum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_lowmem._arguments.checks import check
from optax_lowmem._arguments.hyperparameters import checked
from optax_lowmem._arguments.nnx_boxes import unbox
from optax_lowmem._optimizers.factored import by_layer, unzipped, zeros_as
from optax_lowmem._optimizers.quantized import quantized
from optax_lowmem._quantization.array import finite_or
from optax_lowmem._state.moments import is_quantized
from optax_lowmem._update.float32 import chain


@checked
def adafactor(
  learning_rate: optax.ScalarOrSchedule | None = None,
  min_dim_size_to_factor: int = 128,
  decay_rate: float = 0.8,
  decay_offset: int = 0,
  multiply_by_parameter_scale: bool = True,
  clipping_threshold: float | None = 1.0,
  momentum: float | None = None,
  dtype_momentum: Any = jnp.float32,
  weight_decay_rate: optax.ScalarOrSchedule | None = None,
  eps: float = 1e-30,
  factored: bool = True,
  weight_decay_mask: Any | Callable[[Any], Any] | None = None,
  *,
  bits: Literal[4, 8, 32] = 8,
  block_size: int | None = None,
  min_size: int = 4096,
  quantize_mask: Any | Callable[[Any], Any] | None = None,
  last_two_axes: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""Adafactor (Shazeer and Stern, 2018): a second moment that is an outer product.

  `optax.adafactor`: the same arguments, the same rule, the same structure of state. With
  :math:`\beta_t = 1 - t^{-c}`, :math:`\mathcal R` and :math:`\mathcal C` the means over one axis
  and the other, :math:`\bar r` the mean of :math:`r`, d the threshold and μ the momentum,

  .. math::
    r_t &= \beta_t r_{t-1} + (1 - \beta_t) \mathcal R(g_t^2 + \epsilon), \qquad
    c_t = \beta_t c_{t-1} + (1 - \beta_t) \mathcal C(g_t^2 + \epsilon), \\
    u_t &= g_t \sqrt{\bar r_t / (r_t c_t^\top)}, \qquad
    \hat u_t = u_t / \max(1, \mathrm{RMS}(u_t) / d), \\
    m_t &= \mu m_{t-1} + (1 - \mu)\, \eta_t \max(10^{-3}, \mathrm{RMS}(p_t))\, \hat u_t, \qquad
    \mathrm{update}_t = -(m_t + \lambda p_t).

  The statistics :math:`r_t` and :math:`c_t` are float32 whatever the dtype of the parameters.
  Arrays that are not factored have a full second moment, which is held in `bits` bits and updated a
  tile at a time, as is the momentum. Without momentum, state of an (R, C) parameter is R + C
  float32; with it, 1 + 4/64 bytes a parameter more at 8 bits, 1/2 + 4/64 at 4.

  A non-finite gradient element makes all updates of its array non-finite, as in optax, if the array
  is factored or clipped. The statistics keep their last finite values, at 32 bits as well, and so
  does a quantized momentum. One in float32 (of arrays below `min_size`) keeps what is not finite:
  `optax.apply_if_finite` around the transformation skips such steps.

  Two passes over the gradient, for its means and for the RMS that clips it, come before the update.
  With momentum, what is averaged is held in float32 meanwhile, and made in one more array.

  The modes of Hugging Face's `Adafactor` are reached as follows, to 1e-5 after 20 steps:

  - every array with two or more axes is factored, over the last two:
    ``min_dim_size_to_factor=1, last_two_axes=True``;
  - ``lr=None, relative_step=True``: ``learning_rate=relative_step_size()``, with
    ``warmup_init=True`` in both. (Here, `learning_rate` None is a rate of 1, as in optax.)
  - ``scale_parameter``: `multiply_by_parameter_scale`;
  - ``clip_threshold``: `clipping_threshold`;
  - ``decay_rate=-0.8``: ``decay_rate=0.8``;
  - ``beta1``: `momentum`;
  - ``weight_decay=w``, which there is multiplied by the learning rate:
    ``weight_decay_rate=lr * w``, for a constant `lr` without `scale_parameter`.

  Args:
    learning_rate: η, a number or a schedule; 1 if None.
    min_dim_size_to_factor: arrays are factored if both axes have at least this size.
    decay_rate: c, zero or more.
    decay_offset: the step at which fine-tuning starts; t counts from there.
    multiply_by_parameter_scale: whether steps are relative to the RMS of the parameter.
    clipping_threshold: d, the largest RMS of a normalised gradient; None does not clip.
    momentum: μ; None has none.
    dtype_momentum: dtype of the momentum at 32 bits.
    weight_decay_rate: λ, a number or a schedule; not multiplied by the learning rate.
    eps: ε, added to squared gradients.
    factored: False keeps all second moments full.
    weight_decay_mask: a tree of bools, or a function of the parameters that returns one, that says
      which parameters are decayed; all if None.
    bits: bits an element of the momentum and of the second moments that are not factored: 8 or 4;
      or 32, which gives optax's results bit for bit where parameters and gradients are float32. Of
      other dtypes, state and arithmetic are float32 all the same, but for `dtype_momentum`.
    block_size: elements that share a scale, 64 by default.
    min_size: momentum and full second moments of smaller arrays stay in float32.
    quantize_mask: a tree of bools with the structure of the parameters or a prefix of it, or a
      function of the parameters that returns one. False keeps a parameter's state in float32.
    last_two_axes: factor over the last two axes; those before are a batch, so that a stack of
      layers has the statistics of each (clipping and scale are those of the array). Otherwise over
      the two largest, as in optax.

  Returns:
    The transformation.

  Raises:
    ValueError: for bad `bits`, `block_size` or `min_size`; for a negative `decay_rate` or `eps`, a
      threshold that is not positive or a momentum outside [0, 1); for a `dtype_momentum` that
      `bits` leaves no room for.
    TypeError: if an argument that must be known when the rule is traced is an array; from `init`,
      for parameters that are not floating.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params = {"w": jnp.ones((128, 256))}
    >>> tx = lowmem.adafactor(1e-2, momentum=0.9)
    >>> state = tx.init(params)
    >>> state[0].v_row["w"].shape, state[0].v_col["w"].shape
    ((128,), (256,))
    >>> updates, state = tx.update({"w": params["w"]}, state, params)
    >>> bool((optax.apply_updates(params, updates)["w"] < 1).all())
    True

  References:
    Shazeer and Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
    <https://arxiv.org/abs/1804.04235>`_, 2018
  """
  check("decay_rate", decay_rate, lambda x: x >= 0, "zero or more (Hugging Face's -0.8 is 0.8)")
  check("eps", eps, lambda x: x >= 0, "zero or more")
  check("clipping_threshold", clipping_threshold, lambda x: x > 0, "positive, or None")
  check("momentum", momentum, lambda x: 0 <= x < 1, "in [0, 1), or None")
  storage: dict[str, Any] = {
    "block_size": block_size,
    "min_size": min_size,
    "quantize_mask": quantize_mask,
  }
  rms = optax.scale_by_factored_rms(factored, decay_rate, decay_offset, min_dim_size_to_factor, eps)
  tx: list[optax.GradientTransformation] = [
    _in_groups(by_layer(rms) if last_two_axes else rms, bits, **storage)
  ]
  if clipping_threshold is not None:
    tx.append(optax.clip_by_block_rms(clipping_threshold))
  if learning_rate is not None:
    tx.append(optax.scale_by_learning_rate(learning_rate, flip_sign=False))
  if multiply_by_parameter_scale:
    tx.append(optax.scale_by_param_block_rms())
  if momentum is not None:
    average = optax.ema(momentum, debias=False, accumulator_dtype=dtype_momentum)
    tx.append(quantized(average, bits, **storage))
  if weight_decay_rate is not None:
    tx.append(optax.add_decayed_weights(weight_decay_rate, mask=weight_decay_mask))
  tx.append(optax.scale(-1))
  return chain(*tx, phases=bits == 8 and momentum is not None)


def relative_step_size(
  warmup_init: bool = False, warmup_step: float = 1e-6, largest: float = 1e-2
) -> optax.Schedule:
  r"""The learning rate of Adafactor's relative steps, a schedule for `adafactor`.

  With :math:`t` = count + 1,

  .. math:: \eta_t = \min(\mathrm{largest}, 1 / \sqrt t), \quad \text{or} \quad
    \eta_t = \min(\mathrm{warmup\_step} \cdot t, 1 / \sqrt t) \text{ with warmup.}

  Args:
    warmup_init: whether to start from `warmup_step` and grow by it, instead of from `largest`.
    warmup_step: by how much the rate grows a step.
    largest: largest rate without warmup.

  Returns:
    The schedule, a function of the number of steps made, from 0.

  Raises:
    ValueError: for a `warmup_step` or `largest` that is not positive.

  Examples:
    >>> import optax_lowmem as lowmem
    >>> rate = lowmem.relative_step_size()
    >>> print(f"{rate(0):.4f} {rate(39999):.4f}")
    0.0100 0.0050

  References:
    Shazeer and Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
    <https://arxiv.org/abs/1804.04235>`_, 2018, section 8; Hugging Face's ``relative_step``
  """
  check("warmup_step", warmup_step, lambda x: x > 0, "positive")
  check("largest", largest, lambda x: x > 0, "positive")

  def schedule(count):
    t = jnp.asarray(count, jnp.float32) + 1
    return jnp.minimum(warmup_step * t if warmup_init else largest, 1 / jnp.sqrt(t))

  return schedule


def _in_groups(
  rms: Any, bits: Literal[4, 8, 32], **storage: Any
) -> optax.GradientTransformationExtraArgs:
  """`quantized(rms, bits)` with statistics that stay finite.

  Arrays that are factored and those that are not are updated apart, so that the latter can be
  updated a tile at a time: one reduction among them would keep all from it.
  """
  tx: Any = quantized(rms, bits, **storage)

  def init(params):
    state = tx.init(params)
    rows = jax.tree.map(functools.partial(zeros_as, last=True), state.v_row, params)
    columns = jax.tree.map(functools.partial(zeros_as, last=False), state.v_col, params)
    return state._replace(v_row=rows, v_col=columns)

  def keep(new, old):  # what is not finite is never stored in a quantized array
    return new if is_quantized(new) else finite_or(new, old)

  def update(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      return rms.update(updates, state, params)  # raises, and says why
    # Of an `nnx.State`, boxes are around arrays, and none is around what is quantized.
    boxed = jax.tree.structure((updates, state), is_leaf=is_quantized)
    updates, state, params = unbox((updates, state, params))
    grads, treedef = jax.tree.flatten(updates)
    arrays = [grads, *map(treedef.flatten_up_to, (*state[1:], params))]
    is_factored = [g.shape != v.shape for g, v in zip(grads, arrays[3], strict=True)]
    results: list[Any] = [None] * len(grads)
    count = state.count
    for group in (False, True):
      members = [i for i, f in enumerate(is_factored) if f is group]
      g, *stats, p = ([x[i] for i in members] for x in arrays)
      u, new = tx.update(g, optax.FactoredState(state.count, *stats), p)
      count = new.count
      kept = (map(keep, *pair) for pair in zip(new[1:], stats, strict=True))
      for i, *result in zip(members, u, *kept, strict=True):
        results[i] = result
    u, *stats = unzipped(treedef, results, 4)
    new = (u, optax.FactoredState(count, *stats))
    return boxed.unflatten(jax.tree.leaves(new, is_leaf=is_quantized))

  return optax.GradientTransformationExtraArgs(init, update)
