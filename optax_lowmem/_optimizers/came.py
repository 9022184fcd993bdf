"""CAME with weight decay and learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import optax

from optax_lowmem._arguments.hyperparameters import checked
from optax_lowmem._optimizers.scale_by_came import scale_by_came
from optax_lowmem._update.float32 import chain


@checked
def came(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  b3: float = 0.9999,
  eps1: float = 1e-30,
  eps2: float = 1e-16,
  clipping_threshold: float = 1.0,
  weight_decay: float = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  *,
  debias: bool = False,
  bits: Literal[4, 8, 32] = 8,
  block_size: int | None = None,
  min_size: int = 4096,
  quantize_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""CAME with decoupled weight decay: `scale_by_came`, then
  :math:`-\eta (\mathrm{update}_t + \lambda p_t)`.

  State of a d × d parameter takes 1.0625 + 16/d bytes a parameter at 8 bits, against 8 of AdamW.
  Learning rates are below AdamW's: in `docs/factored.md` the best over 400 steps were 5e-4, with
  `debias` 4e-3, and AdamW's 8e-3.

  Args:
    learning_rate: a number or a schedule.
    b1: decay of the momentum.
    b2: decay of the second moment.
    b3: decay of the confidence.
    eps1: added to squared gradients.
    eps2: added to squared distances.
    clipping_threshold: the largest RMS of a normalised gradient.
    weight_decay: decoupled weight decay, multiplied by the learning rate.
    mask: a tree of bools, or a function of the parameters that returns one, that says which
      parameters are decayed; all if None.
    debias: whether averages are corrected for their start at zero. False is the paper's.
    bits: bits an element of the momentum: 8, 4 or 32.
    block_size: elements that share a scale, 64 by default.
    min_size: the momentum of smaller arrays stays in float32.
    quantize_mask: a tree of bools with the structure of the parameters or a prefix of it, or a
      function of the parameters that returns one. False keeps a parameter's momentum in float32.

  Returns:
    The transformation.

  Raises:
    ValueError: as `scale_by_came`.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params = {"w": jnp.ones((64, 64))}
    >>> tx = lowmem.came(1e-3, weight_decay=0.01)
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": params["w"]}, state, params)
    >>> bool((optax.apply_updates(params, updates)["w"] < 1).all())
    True

  References:
    Luo et al, `CAME: Confidence-guided Adaptive Memory Efficient Optimization
    <https://arxiv.org/abs/2307.02047>`_, 2023
  """
  scale = scale_by_came(
    b1,
    b2,
    b3,
    eps1,
    eps2,
    clipping_threshold,
    debias=debias,
    bits=bits,
    block_size=block_size,
    min_size=min_size,
    quantize_mask=quantize_mask,
  )
  return chain(
    scale,
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
    phases=bits == 8,
  )
