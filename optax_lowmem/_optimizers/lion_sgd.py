"""Lion and gradient descent, with a quantized first moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from optax_lowmem._arguments.hyperparameters import checked
from optax_lowmem._optimizers.quantized import quantized


@checked
def lion(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.99,
  mu_dtype: Any | None = None,
  weight_decay: optax.ScalarOrSchedule = 1e-3,
  mask: Any | Callable[[Any], Any] | None = None,
  *,
  bits: Literal[4, 8, 32] = 8,
  block_size: int | None = None,
  min_size: int = 4096,
  quantize_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Lion (Chen et al, 2023), the sign of a first moment, which is quantized.

  `optax.lion` with its moment held in `bits` bits: the same arguments, the same rule, the same
  structure of state:

  .. math::
    \mathrm{update}_t &= -\eta \left( \mathrm{sign}(b_1 m_{t-1} + (1 - b_1) g_t)
    + \lambda p_t \right), \\
    m_t &= b_2 m_{t-1} + (1 - b_2) g_t.

  At 8 bits state takes 1.0625 bytes a parameter, at 4 bits 0.5625, against 4 in float32. Every
  element moves by η, so a learning rate is three to ten times smaller than AdamW's, and a weight
  decay as much larger.

  Args:
    learning_rate: η, a number or a schedule.
    b1: weight of the moment beside the gradient in an update.
    b2: decay of the moment.
    mu_dtype: dtype of the moment, which needs ``bits=32``; float32 if None.
    weight_decay: λ, a number or a schedule; multiplied by the learning rate, as in PyTorch.
    mask: a tree of bools with the structure of the parameters or a prefix of it, or a function of
      the parameters that returns one, that says which parameters are decayed; all if None.
    bits: 8 or 4; or 32 for float32 moments, which gives optax's results bit for bit where
      parameters and gradients are float32. Of other dtypes, moments and arithmetic are float32
      all the same.
    block_size: elements that share a scale, a positive even number; 64 if None.
    min_size: the moments of arrays of fewer elements stay in float32.
    quantize_mask: a tree of bools with the structure of the parameters or a prefix of it, or a
      function of the parameters that returns one. False keeps a parameter's moments in float32,
      for embeddings, say.

  Returns:
    The transformation.

  Raises:
    ValueError: for bad `bits`, `block_size` or `min_size`; for a `mu_dtype` other than float32,
      unless `bits` is 32; for a decay in 16 bits, which `optax.inject_hyperparams` makes for 16-bit
      parameters.
    TypeError: for an argument that is not known, for text, and for an array where the program
      depends on the value (`bits`, a mask).

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params = {"w": jnp.ones((64, 64))}
    >>> tx = lowmem.lion(1e-4)
    >>> state = tx.init(params)
    >>> lowmem.state_bytes(state)["device"]
    4356
    >>> updates, state = tx.update({"w": params["w"]}, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> bool((params["w"] < 1).all())
    True

  References:
    Chen et al, `Symbolic Discovery of Optimization Algorithms
    <https://arxiv.org/abs/2302.06675>`_, 2023

    Dettmers et al, `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021
  """
  return quantized(
    optax.lion(
      learning_rate,
      b1=b1,
      b2=b2,
      mu_dtype=mu_dtype,
      weight_decay=weight_decay,
      mask=mask,
    ),
    bits,
    block_size=block_size,
    min_size=min_size,
    quantize_mask=quantize_mask,
  )


@checked
def sgd(
  learning_rate: optax.ScalarOrSchedule,
  momentum: jax.typing.ArrayLike | None = None,
  nesterov: bool = False,
  accumulator_dtype: Any | None = None,
  *,
  bits: Literal[4, 8, 32] = 8,
  block_size: int | None = None,
  min_size: int = 4096,
  quantize_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Gradient descent (Sutskever et al, 2013), with a quantized momentum.

  `optax.sgd` with its momentum held in `bits` bits: the same arguments, the same rule, the same
  structure of state:

  .. math::
    m_t = g_t + \mu m_{t-1}, \qquad \mathrm{update}_t = -\eta m_t,

  and :math:`-\eta (g_t + \mu m_t)` with Nesterov's momentum. At 8 bits state takes 1.0625 bytes a
  parameter, at 4 bits 0.5625, against 4 in float32. Without momentum, the default, there is no
  state, and `bits` changes nothing.

  Args:
    learning_rate: η, a number or a schedule.
    momentum: μ, decay of the momentum; None has none.
    nesterov: whether the update looks a step ahead.
    accumulator_dtype: dtype of the momentum, which needs ``bits=32``; float32 if None.
    bits: 8 or 4; or 32 for float32 moments, which gives optax's results bit for bit where
      parameters and gradients are float32. Of other dtypes, moments and arithmetic are float32
      all the same.
    block_size: elements that share a scale, a positive even number; 64 if None.
    min_size: the moments of arrays of fewer elements stay in float32.
    quantize_mask: a tree of bools with the structure of the parameters or a prefix of it, or a
      function of the parameters that returns one. False keeps a parameter's moments in float32,
      for embeddings, say.

  Returns:
    The transformation.

  Raises:
    ValueError: for bad `bits`, `block_size` or `min_size`; for an `accumulator_dtype` other than
      float32, unless `bits` is 32; for a decay in 16 bits, which `optax.inject_hyperparams` makes
      for 16-bit parameters.
    TypeError: for an argument that is not known, for text, and for an array where the program
      depends on the value (`bits`, a mask).

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params = {"w": jnp.ones((64, 64))}
    >>> tx = lowmem.sgd(1e-2, momentum=0.9)
    >>> state = tx.init(params)
    >>> lowmem.state_bytes(state)["device"]
    4352
    >>> updates, state = tx.update({"w": params["w"]}, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> bool((params["w"] < 1).all())
    True

  References:
    Sutskever et al, `On the importance of initialization and momentum in deep learning
    <http://proceedings.mlr.press/v28/sutskever13.pdf>`_, 2013

    Dettmers et al, `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021
  """
  return quantized(
    optax.sgd(
      learning_rate,
      momentum=momentum,
      nesterov=nesterov,
      accumulator_dtype=accumulator_dtype,
    ),
    bits,
    block_size=block_size,
    min_size=min_size,
    quantize_mask=quantize_mask,
  )
