"""Adam and AdamW, with quantized moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from optax_lowmem._arguments.hyperparameters import checked
from optax_lowmem._optimizers.quantized import quantized


@checked
def adam(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  eps_root: jax.typing.ArrayLike = 0.0,
  mu_dtype: Any | None = None,
  *,
  nesterov: bool = False,
  bits: Literal[4, 8, 32] = 8,
  block_size: int | None = None,
  min_size: int = 4096,
  quantize_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adam (Kingma and Ba, 2014), with quantized moments.

  `optax.adam` with its moments held in `bits` bits: the same arguments, the same rule, the same
  structure of state:

  .. math::
    m_t &= b_1 m_{t-1} + (1 - b_1) g_t, \qquad
    v_t = b_2 v_{t-1} + (1 - b_2) g_t^2, \\
    \mathrm{update}_t &= -\eta \, \hat m_t \big/
    \left( \sqrt{\hat v_t + \epsilon'} + \epsilon \right), \qquad
    \hat m_t = \frac{m_t}{1 - b_1^t}, \qquad \hat v_t = \frac{v_t}{1 - b_2^t}.

  With Nesterov's momentum :math:`\hat m_t = b_1 m_t / (1 - b_1^{t+1}) + (1 - b_1) g_t / (1 -
  b_1^t)`. At 8 bits state takes 2.125 bytes a parameter, at 4 bits 1.125, against 8 in float32.

  Args:
    learning_rate: η, a number or a schedule.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: ε, added to the root of the second moment.
    eps_root: ε', added within that root, for derivatives through the update.
    mu_dtype: dtype of the first moment, which needs ``bits=32``; float32 if None.
    nesterov: whether the first moment looks a step ahead.
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
    >>> tx = lowmem.adam(1e-3)
    >>> state = tx.init(params)
    >>> lowmem.state_bytes(state)["device"]
    8708
    >>> updates, state = tx.update({"w": params["w"]}, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> bool((params["w"] < 1).all())
    True

  References:
    Kingma and Ba, `Adam: A Method for Stochastic Optimization
    <https://arxiv.org/abs/1412.6980>`_, 2014

    Dozat, `Incorporating Nesterov Momentum into Adam
    <https://openreview.net/pdf?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016

    Dettmers et al, `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021
  """
  return quantized(
    optax.adam(
      learning_rate,
      b1=b1,
      b2=b2,
      eps=eps,
      eps_root=eps_root,
      mu_dtype=mu_dtype,
      nesterov=nesterov,
    ),
    bits,
    block_size=block_size,
    min_size=min_size,
    quantize_mask=quantize_mask,
  )


@checked
def adamw(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  eps_root: jax.typing.ArrayLike = 0.0,
  mu_dtype: Any | None = None,
  weight_decay: optax.ScalarOrSchedule = 1e-4,
  mask: Any | Callable[[Any], Any] | None = None,
  *,
  nesterov: bool = False,
  bits: Literal[4, 8, 32] = 8,
  block_size: int | None = None,
  min_size: int = 4096,
  quantize_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adam with decoupled weight decay (Loshchilov and Hutter, 2019), with quantized moments.

  `optax.adamw` with its moments held in `bits` bits: the same arguments, the same rule, the same
  structure of state. With the moments of `adam`,

  .. math::
    m_t &= b_1 m_{t-1} + (1 - b_1) g_t, \qquad
    v_t = b_2 v_{t-1} + (1 - b_2) g_t^2, \\
    \mathrm{update}_t &= -\eta \left( \hat m_t \big/
    \left( \sqrt{\hat v_t + \epsilon'} + \epsilon \right) + \lambda p_t \right), \qquad
    \hat m_t = \frac{m_t}{1 - b_1^t}, \qquad \hat v_t = \frac{v_t}{1 - b_2^t}.

  With Nesterov's momentum :math:`\hat m_t = b_1 m_t / (1 - b_1^{t+1}) + (1 - b_1) g_t / (1 -
  b_1^t)`. At 8 bits state takes 2.125 bytes a parameter, at 4 bits 1.125, against 8 in float32.

  Args:
    learning_rate: η, a number or a schedule.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: ε, added to the root of the second moment.
    eps_root: ε', added within that root, for derivatives through the update.
    mu_dtype: dtype of the first moment, which needs ``bits=32``; float32 if None.
    weight_decay: λ, a number or a schedule; multiplied by the learning rate, as in PyTorch.
    mask: a tree of bools with the structure of the parameters or a prefix of it, or a function of
      the parameters that returns one, that says which parameters are decayed; all if None.
    nesterov: whether the first moment looks a step ahead.
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
    >>> tx = lowmem.adamw(1e-3, weight_decay=0.01)
    >>> state = tx.init(params)
    >>> lowmem.state_bytes(state)["device"]
    8708
    >>> updates, state = tx.update({"w": params["w"]}, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> bool((params["w"] < 1).all())
    True

  References:
    Loshchilov and Hutter, `Decoupled Weight Decay Regularization
    <https://arxiv.org/abs/1711.05101>`_, 2019

    Dozat, `Incorporating Nesterov Momentum into Adam
    <https://openreview.net/pdf?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016

    Dettmers et al, `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021
  """
  return quantized(
    optax.adamw(
      learning_rate,
      b1=b1,
      b2=b2,
      eps=eps,
      eps_root=eps_root,
      mu_dtype=mu_dtype,
      weight_decay=weight_decay,
      mask=mask,
      nesterov=nesterov,
    ),
    bits,
    block_size=block_size,
    min_size=min_size,
    quantize_mask=quantize_mask,
  )
