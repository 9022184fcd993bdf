"""CAME: Adafactor's factored second moment, and a factored measure of confidence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowmem._arguments.checks import check
from optax_lowmem._arguments.hyperparameters import checked
from optax_lowmem._optimizers.factored import average, inverse_roots, map_leaves, zeros_without
from optax_lowmem._optimizers.quantized import quantized
from optax_lowmem._quantization.array import finite_or
from optax_lowmem._sharding.shards import on_mesh_of
from optax_lowmem._update.float32 import in_float32


class ScaleByCameState(NamedTuple):
  """State of `scale_by_came`. Trees are those of the parameters; R and C are the last two axes.

  Attributes:
    momentum: `optax.EmaState` of the normalised gradients; its `ema` is quantized.
    v_row: (…, R), average of the squared gradients' means over C; one zero below two axes.
    v_col: (…, C), the same over R.
    v: the average itself, of parameters with fewer than two axes; one zero of others.
    res_row: (…, R), average of the means over C of squared distances from the momentum.
    res_col: (…, C), the same over R.
  """

  momentum: Any
  v_row: Any
  v_col: Any
  v: Any
  res_row: Any
  res_col: Any


@checked
def scale_by_came(
  b1: float = 0.9,
  b2: float = 0.999,
  b3: float = 0.9999,
  eps1: float = 1e-30,
  eps2: float = 1e-16,
  clipping_threshold: float = 1.0,
  *,
  debias: bool = False,
  bits: Literal[4, 8, 32] = 8,
  block_size: int | None = None,
  min_size: int = 4096,
  quantize_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Rescales gradients by CAME, the confidence-guided memory-efficient optimizer.

  With :math:`\mathcal R` and :math:`\mathcal C` the means over the last axis and the one before,
  :math:`\bar r` the mean of :math:`r`, and EMA an average that starts at zero:

  .. math::
    r_t &= \mathrm{EMA}_{b_2} \mathcal R(g_t^2 + \epsilon_1), \qquad
    c_t = \mathrm{EMA}_{b_2} \mathcal C(g_t^2 + \epsilon_1), \\
    u_t &= g_t \sqrt{\bar r_t / (r_t c_t^\top)}, \qquad
    \hat u_t = u_t / \max(1, \mathrm{RMS}(u_t) / d), \\
    m_t &= b_1 m_{t-1} + (1 - b_1) \hat u_t, \\
    R_t &= \mathrm{EMA}_{b_3} \mathcal R((\hat u_t - m_t)^2 + \epsilon_2), \qquad
    C_t = \mathrm{EMA}_{b_3} \mathcal C((\hat u_t - m_t)^2 + \epsilon_2), \\
    \mathrm{update}_t &= m_t \sqrt{\bar R_t / (R_t C_t^\top)}.

  As in the paper, that start is not corrected: after t steps, :math:`R_t C_t^\top / \bar R_t` has
  :math:`1 - b_3^t` of its size, so updates are 100 times as large at first, 3.6 after 800 steps and
  1.26 after 10,000. With `debias` they are not: as in Adam, an average is divided by
  :math:`1 - b^t` where it is used, in :math:`u_t` and in :math:`\mathrm{update}_t`. The distance
  :math:`\hat u_t - m_t` is that of the paper: from a corrected momentum, the first is zero.

  Leading axes are a batch: a stack of layers is treated layer by layer, but for the RMS, which is
  that of the array. Arrays with fewer than two axes keep a full :math:`v` in float32, and
  their update is :math:`m_t`. All are made of :math:`m_t` before it is rounded.

  State of an (R, C) parameter is its momentum, 1 + 4/64 bytes a parameter at 8 bits, and 2 (R + C)
  float32. On a CPU, an update needs one array of the parameter's size, :math:`\hat u_t` in float32,
  in the place of the gradient or the update, after two passes over the gradient (the means, the
  RMS). On a GPU, momentum in 8 bits, it needs none: what two phases need is computed twice.

  A non-finite gradient element makes all updates of its array non-finite, since its row, its column
  and the RMS are: as in float32. The statistics and a quantized momentum keep their last values. A
  momentum in float32 (of arrays below `min_size`) keeps what is not finite:
  `optax.apply_if_finite` around the transformation skips such steps.

  Args:
    b1: decay of the momentum.
    b2: decay of the second moment.
    b3: decay of the confidence.
    eps1: added to squared gradients.
    eps2: added to squared distances.
    clipping_threshold: d, the largest RMS of a normalised gradient.
    debias: whether averages are corrected for their start at zero. False is the paper's.
    bits: bits an element of the momentum: 8, 4 or 32.
    block_size: elements that share a scale, 64 by default.
    min_size: the momentum of smaller arrays stays in float32.
    quantize_mask: a tree of bools with the structure of the parameters or a prefix of it, or a
      function of the parameters that returns one. False keeps a parameter's momentum in float32.

  Returns:
    The transformation. Its state is a `ScaleByCameState`.

  Raises:
    ValueError: for a decay outside [0, 1), a negative epsilon or a threshold that is not positive;
      for bad `bits`, `block_size` or `min_size`.
    TypeError: from `init`, for parameters that are not floating.

  Examples:
    >>> import jax.numpy as jnp, optax_lowmem as lowmem
    >>> tx = lowmem.scale_by_came()
    >>> state = tx.init(jnp.zeros((128, 256)))
    >>> state.v_row.shape, state.res_col.shape, state.momentum.ema.nbytes
    ((128,), (256,), 34816)

  References:
    Luo et al, `CAME: Confidence-guided Adaptive Memory Efficient Optimization
    <https://arxiv.org/abs/2307.02047>`_, 2023; equations of the authors' `came-pytorch` 0.1.3
  """
  for name, value in (("b1", b1), ("b2", b2), ("b3", b3)):
    check(name, value, lambda x: 0 <= x < 1, "in [0, 1)")
  for name, value in (("eps1", eps1), ("eps2", eps2)):
    check(name, value, lambda x: x >= 0, "zero or more")
  check("clipping_threshold", clipping_threshold, lambda x: x > 0, "positive")
  momentum = quantized(
    optax.ema(b1, debias=False),
    bits,
    block_size=block_size,
    min_size=min_size,
    quantize_mask=quantize_mask,
  )

  def init(params):
    ema = momentum.init(params)  # first, because it refuses integers
    # One number, as in optax's Adafactor: Orbax saves no array of none.
    nothing = on_mesh_of(jax.tree.leaves(params), jnp.zeros(1, jnp.float32))

    def means(p):
      return [zeros_without(p, k) if p.ndim > 1 else jnp.zeros_like(nothing) for k in (-1, -2)]

    row, col = map_leaves(means, 2, params)
    v = jax.tree.map(lambda p: jnp.zeros_like(nothing if p.ndim > 1 else p, jnp.float32), params)
    res_row, res_col = map_leaves(means, 2, params)  # donated, each needs its own buffer
    return ScaleByCameState(ema, row, col, v, res_row, res_col)

  def start(decay, count):
    """1 - decay^count, the part of its size that an average has, if it is to be corrected."""
    # By logarithms: 0.9999 rounded to float32 would make the first 0.02 % too large.
    return -jnp.expm1(count * jnp.log1p(decay - 1)) if debias else 1.0

  def normalise(count, g, row, col, v):
    """The clipped gradient, and the new statistics."""
    part, square = start(b2, count), jnp.square(g) + eps1
    if g.ndim < 2:
      new_v = average(b2, v, square)
      u = g * jax.lax.rsqrt(new_v / part)
      return u / excess(jnp.square(u).sum(), u.size), row, col, finite_or(new_v, v)
    by_row, by_col, new = inverse_roots(square, row, col, b2, part)
    # The sum of u^2, row by row: known with the means over rows, in the same pass over g.
    squares = jnp.square(g * by_col[..., None, :]).sum(-1) * jnp.square(by_row)
    u = g * (by_row / excess(squares.sum(), g.size))[..., :, None] * by_col[..., None, :]
    return u, *new, v

  def excess(squares, size):
    """How many times the threshold the RMS is, at least once."""
    rms = jnp.sqrt(squares / float(size)) if size else jnp.zeros((), jnp.float32)
    return jnp.maximum(1.0, rms / clipping_threshold)

  def weigh(of_momentum, of_confidence, u, m, row, col):
    """The momentum by the confidence in it, and the new statistics; parts of both are there."""
    if u.ndim < 2:
      return m / of_momentum, row, col
    by_row, by_col, new = inverse_roots(jnp.square(u - m) + eps2, row, col, b3, of_confidence)
    return m * by_row[..., :, None] * (by_col / of_momentum)[..., None, :], *new

  def update(updates, state, params=None, **extra_args):
    del extra_args
    count = optax.safe_increment(state.momentum.count)
    run = functools.partial(normalise, count)
    u, row, col, v = map_leaves(run, 4, updates, *state[1:4])
    m, ema = momentum.update(u, state.momentum, params)
    run = functools.partial(weigh, start(b1, count), start(b3, count))
    weighed, res_row, res_col = map_leaves(run, 3, u, m, *state[4:])
    return weighed, ScaleByCameState(ema, row, col, v, res_row, res_col)

  # With a momentum in float32, XLA needs no more passes by itself; where two codes are a byte, a
  # training step would keep all gradients.
  tx = optax.GradientTransformationExtraArgs(init, update)
  return in_float32(tx, phases=bits == 8)
