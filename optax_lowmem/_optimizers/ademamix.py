"""AdEMAMix, with quantized moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
import optax.contrib

from optax_lowmem._arguments.hyperparameters import checked
from optax_lowmem._optimizers.quantized import quantized


@checked
def ademamix(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  b3: optax.ScalarOrSchedule = 0.9999,
  alpha: optax.ScalarOrSchedule = 5.0,
  eps: jax.typing.ArrayLike = 1e-8,
  eps_root: jax.typing.ArrayLike = 0.0,
  mu_dtype: Any | None = None,
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  *,
  bits: Literal[4, 8, 32] = 8,
  block_size: int | None = None,
  min_size: int = 4096,
  quantize_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""AdEMAMix (Pagliardini et al, 2024), with quantized moments.

  `optax.contrib.ademamix` with its moments held in `bits` bits: the same arguments, the same rule,
  the same structure of state. Adam with a fast and a slow first moment, :math:`m` and :math:`n`,
  of which the slow one is not corrected for its start at zero:

  .. math::
    m_t &= b_1 m_{t-1} + (1 - b_1) g_t, \qquad
    n_t = b_3 n_{t-1} + (1 - b_3) g_t, \qquad
    v_t = b_2 v_{t-1} + (1 - b_2) g_t^2, \\
    \mathrm{update}_t &= -\eta \left( (\hat m_t + \alpha n_t) \big/
    \left( \sqrt{\hat v_t + \epsilon'} + \epsilon \right) + \lambda p_t \right), \qquad
    \hat m_t = \frac{m_t}{1 - b_1^t}, \qquad \hat v_t = \frac{v_t}{1 - b_2^t}.

  At 8 bits state takes 3.1875 bytes a parameter, at 4 bits 1.6875, against 12 in float32. At 4
  bits the slow moment is much noisier than those of Adam.

  Args:
    learning_rate: η, a number or a schedule.
    b1: decay of the fast first moment.
    b2: decay of the second moment.
    b3: decay of the slow first moment, a number or a schedule.
    alpha: α, the weight of the slow moment, a number or a schedule.
    eps: ε, added to the root of the second moment.
    eps_root: ε', added within that root, for derivatives through the update.
    mu_dtype: dtype of all three moments, which needs ``bits=32``; float32 if None.
    weight_decay: λ, multiplied by the learning rate, as in PyTorch.
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
    >>> tx = lowmem.ademamix(1e-3)
    >>> state = tx.init(params)
    >>> lowmem.state_bytes(state)["device"]
    13064
    >>> updates, state = tx.update({"w": params["w"]}, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> bool((params["w"] < 1).all())
    True

  References:
    Pagliardini et al, `The AdEMAMix Optimizer: Better, Faster, Older
    <https://arxiv.org/abs/2409.03137>`_, 2024

    Dettmers et al, `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021
  """
  return quantized(
    optax.contrib.ademamix(
      learning_rate,
      b1=b1,
      b2=b2,
      b3=b3,
      alpha=alpha,
      eps=eps,
      eps_root=eps_root,
      mu_dtype=mu_dtype,
      weight_decay=weight_decay,
      mask=mask,
    ),
    bits,
    block_size=block_size,
    min_size=min_size,
    quantize_mask=quantize_mask,
  )
