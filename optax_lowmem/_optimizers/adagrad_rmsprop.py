"""Adagrad and RMSProp, with quantized moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from optax_lowmem._arguments.hyperparameters import checked
from optax_lowmem._optimizers.quantized import quantized


@checked
def adagrad(
  learning_rate: optax.ScalarOrSchedule,
  initial_accumulator_value: jax.typing.ArrayLike = 0.1,
  eps: jax.typing.ArrayLike = 1e-7,
  *,
  bits: Literal[4, 8, 32] = 8,
  block_size: int | None = None,
  min_size: int = 4096,
  quantize_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adagrad (Duchi et al, 2011), with a quantized sum of squares.

  `optax.adagrad` with its moment held in `bits` bits: the same arguments, the same rule, the same
  structure of state:

  .. math::
    v_t = v_{t-1} + g_t^2, \qquad \mathrm{update}_t = -\eta \frac{g_t}{\sqrt{v_t + \epsilon}}.

  At 8 bits state takes 1.0625 bytes a parameter, at 4 bits 0.5625, against 4 in float32.

  Args:
    learning_rate: η, a number or a schedule.
    initial_accumulator_value: :math:`v_0`, zero or more.
    eps: ε, added to the sum within the root.
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
    ValueError: for bad `bits`, `block_size` or `min_size`.
    TypeError: for an argument that is not known, for text, and for an array where the program
      depends on the value (`bits`, a mask).

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params = {"w": jnp.ones((64, 64))}
    >>> tx = lowmem.adagrad(1e-2)
    >>> state = tx.init(params)
    >>> lowmem.state_bytes(state)["device"]
    4352
    >>> updates, state = tx.update({"w": params["w"]}, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> bool((params["w"] < 1).all())
    True

  References:
    Duchi et al, `Adaptive Subgradient Methods for Online Learning and Stochastic Optimization
    <https://jmlr.org/papers/v12/duchi11a.html>`_, 2011

    Dettmers et al, `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021
  """
  return quantized(
    optax.adagrad(
      learning_rate,
      initial_accumulator_value=initial_accumulator_value,
      eps=eps,
    ),
    bits,
    block_size=block_size,
    min_size=min_size,
    quantize_mask=quantize_mask,
  )


@checked
def rmsprop(
  learning_rate: optax.ScalarOrSchedule,
  decay: jax.typing.ArrayLike = 0.9,
  eps: jax.typing.ArrayLike = 1e-8,
  initial_scale: jax.typing.ArrayLike = 0.0,
  eps_in_sqrt: bool = True,
  centered: bool = False,
  momentum: jax.typing.ArrayLike | None = None,
  nesterov: bool = False,
  bias_correction: bool = False,
  *,
  bits: Literal[4, 8, 32] = 8,
  block_size: int | None = None,
  min_size: int = 4096,
  quantize_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""RMSProp (Tieleman and Hinton, 2012), with quantized moments.

  `optax.rmsprop` with its moments held in `bits` bits: the same arguments, the same rule, the same
  structure of state:

  .. math::
    v_t = b v_{t-1} + (1 - b) g_t^2, \qquad
    \mathrm{update}_t = -\eta \frac{g_t}{\sqrt{v_t + \epsilon}}.

  With momentum the update is :math:`m_t = \mu m_{t-1} - \eta g_t / \sqrt{v_t + \epsilon}`, which
  holds learning rates, as in optax: one that falls counts from then on. At 8 bits state takes
  1.0625 bytes a parameter, at 4 bits 0.5625, against 4 in float32; with momentum, twice that. With
  ``centered=True`` both averages stay in float32, 8 bytes a parameter: rounded, a variance that is
  their difference could turn negative.

  Args:
    learning_rate: η, a number or a schedule.
    decay: b, decay of the squares.
    eps: ε, added to the average of the squares or to its root.
    initial_scale: :math:`v_0`; 0 in PyTorch, 1 in the first version of TensorFlow.
    eps_in_sqrt: whether ε is added within the root, as above; PyTorch adds it outside.
    centered: whether the gradient is divided by its deviation from its average instead.
    momentum: μ, decay of the momentum; None has none.
    nesterov: whether the momentum looks a step ahead.
    bias_correction: whether averages are corrected for their start at zero.
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
    ValueError: for bad `bits`, `block_size` or `min_size`; for a decay in 16 bits, which
      `optax.inject_hyperparams` makes for 16-bit parameters.
    TypeError: for an argument that is not known, for text, and for an array where the program
      depends on the value (`bits`, a mask).

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params = {"w": jnp.ones((64, 64))}
    >>> tx = lowmem.rmsprop(1e-3)
    >>> state = tx.init(params)
    >>> lowmem.state_bytes(state)["device"]
    4352
    >>> updates, state = tx.update({"w": params["w"]}, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> bool((params["w"] < 1).all())
    True

  References:
    Tieleman and Hinton, `Lecture 6.5: RMSProp
    <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_, 2012

    Graves, `Generating Sequences With Recurrent Neural Networks
    <https://arxiv.org/abs/1308.0850>`_, 2014

    Dettmers et al, `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021
  """
  return quantized(
    optax.rmsprop(
      learning_rate,
      decay=decay,
      eps=eps,
      initial_scale=initial_scale,
      eps_in_sqrt=eps_in_sqrt,
      centered=centered,
      momentum=momentum,
      nesterov=nesterov,
      bias_correction=bias_correction,
    ),
    bits,
    block_size=block_size,
    min_size=min_size,
    quantize_mask=quantize_mask,
  )
