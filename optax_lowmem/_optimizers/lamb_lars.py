"""LAMB and LARS: steps in proportion to the norm of the parameter, with quantized moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import optax

from optax_lowmem._arguments.hyperparameters import checked
from optax_lowmem._optimizers.quantized import quantized
from optax_lowmem._update.float32 import chain


@checked
def lamb(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  eps_root: float = 0.0,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  *,
  bits: Literal[4, 8, 32] = 8,
  block_size: int | None = None,
  min_size: int = 4096,
  quantize_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""LAMB (You et al, 2020): Adam whose step is as long as its parameter.

  `optax.lamb` with its moments held in `bits` bits: the same arguments, the same rule, the same
  structure of state. With :math:`u_t` Adam's update,

  .. math::
    r_t = u_t + \lambda p_t, \qquad
    \mathrm{update}_t = -\eta \frac{\lVert p_t \rVert}{\lVert r_t \rVert} r_t,

  and a ratio of 1 where either norm is zero. At 8 bits state takes 2.125 bytes a parameter, at 4
  bits 1.125, against 8 in float32.

  The ratio is that of the update as it is applied, of whole arrays (a stack of layers has one). Not
  so in bitsandbytes: there LAMB8bit gives what Adam8bit gives, bit for bit, without any ratio.

  Args:
    learning_rate: a number or a schedule.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    eps_root: added within that root.
    weight_decay: λ, a number or a schedule.
    mask: a tree of bools, or a function of the parameters that returns one, that says which
      parameters are decayed; all if None.
    bits: 8 or 4; or 32 for float32 moments, which gives optax's results bit for bit where
      parameters and gradients are float32. Of other dtypes, moments and arithmetic are float32
      all the same.
    block_size: elements that share a scale, 64 by default.
    min_size: the moments of smaller arrays stay in float32.
    quantize_mask: a tree of bools with the structure of the parameters or a prefix of it, or a
      function of the parameters that returns one. False keeps a parameter's moments in float32.

  Returns:
    The transformation.

  Raises:
    ValueError: for bad `bits`, `block_size` or `min_size`.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params = {"w": jnp.ones((64, 64))}
    >>> tx = lowmem.lamb(1e-2)
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": params["w"]}, state, params)
    >>> print(f"{jnp.linalg.norm(updates['w']) / jnp.linalg.norm(params['w']):.4f}")
    0.0100

  References:
    You et al, `Large Batch Optimization for Deep Learning: Training BERT in 76 minutes
    <https://arxiv.org/abs/1904.00962>`_, 2020
  """
  moments = quantized(
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps, eps_root=eps_root),
    bits,
    block_size=block_size,
    min_size=min_size,
    quantize_mask=quantize_mask,
  )
  # Only the moments are wrapped. They are elementwise, so they are updated a tile at a time, and
  # the norms are taken of the finished update. `quantized(optax.lamb(...))` has to decode whole
  # moments, since a norm cannot be taken of a tile.
  return chain(
    moments,
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_trust_ratio(),
    optax.scale_by_learning_rate(learning_rate),
    phases=bits == 8,
  )


@checked
def lars(
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: Any | Callable[[Any], Any] | None = True,
  trust_coefficient: float = 0.001,
  eps: float = 0.0,
  trust_ratio_mask: Any | Callable[[Any], Any] = True,
  momentum: float = 0.9,
  nesterov: bool = False,
  *,
  bits: Literal[4, 8, 32] = 8,
  block_size: int | None = None,
  min_size: int = 4096,
  quantize_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""LARS (You et al, 2017): gradient descent with momentum, each array at a rate of its own.

  `optax.lars` with its momentum held in `bits` bits: the same arguments, the same rule, the same
  structure of state:

  .. math::
    r_t &= g_t + \lambda p_t, \qquad
    q_t = \kappa \frac{\lVert p_t \rVert}{\lVert r_t \rVert + \epsilon} r_t, \\
    m_t &= \mu m_{t-1} - \eta q_t, \qquad \mathrm{update}_t = m_t,

  with a ratio of 1 where either norm is zero, and Nesterov's :math:`\mu m_t - \eta q_t` as the
  update if asked for. At 8 bits state takes 1.0625 bytes a parameter, at 4 bits 0.5625, against 4
  in float32. The momentum holds learning rates, as in optax: one that falls counts from then on.

  Args:
    learning_rate: a number or a schedule.
    weight_decay: λ, a number or a schedule.
    weight_decay_mask: a tree of bools, or a function of the parameters that returns one, that says
      which parameters are decayed.
    trust_coefficient: κ, a factor of the ratio.
    eps: added to the norm of the update.
    trust_ratio_mask: the same for the ratio; arrays that it leaves out have none.
    momentum: μ, decay of the momentum.
    nesterov: whether the update looks a step ahead.
    bits: 8 or 4; or 32 for a float32 momentum, which gives optax's results bit for bit where
      parameters and gradients are float32. Of other dtypes, the momentum and arithmetic are float32
      all the same.
    block_size: elements that share a scale, 64 by default.
    min_size: the momentum of smaller arrays stays in float32.
    quantize_mask: a tree of bools with the structure of the parameters or a prefix of it, or a
      function of the parameters that returns one. False keeps a parameter's momentum in float32.

  Returns:
    The transformation.

  Raises:
    ValueError: for bad `bits`, `block_size` or `min_size`.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params = {"w": jnp.ones((64, 64))}
    >>> tx = lowmem.lars(1.0, trust_coefficient=0.01)
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": params["w"]}, state, params)
    >>> print(f"{jnp.linalg.norm(updates['w']) / jnp.linalg.norm(params['w']):.4f}")
    0.0100

  References:
    You et al, `Large Batch Training of Convolutional Networks
    <https://arxiv.org/abs/1708.03888>`_, 2017
  """
  trace = quantized(
    optax.trace(decay=momentum, nesterov=nesterov),
    bits,
    block_size=block_size,
    min_size=min_size,
    quantize_mask=quantize_mask,
  )
  ratio = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient, eps=eps)
  # Only the momentum is wrapped, as in `lamb`: the norms before it are taken of whole arrays.
  return chain(
    optax.add_decayed_weights(weight_decay, mask=weight_decay_mask),
    optax.masked(inner=ratio, mask=trust_ratio_mask),
    optax.scale_by_learning_rate(learning_rate),
    trace,
    phases=bits == 8,
  )
