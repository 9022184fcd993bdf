"""A trainable low-rank correction on top of a frozen linear layer."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem.nn._nf4 import NF4Linear, check_weight


def check_lora(rank: int, alpha: float, dropout: float, rngs: nnx.Rngs) -> None:
  """Refuses settings that mean nothing, before any module is touched."""
  if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
    raise ValueError(f"`rank` must be an integer of at least 1, got {rank!r}. 8 or 16 is usual.")
  if not (math.isfinite(alpha) and alpha > 0):
    raise ValueError(
      f"`alpha` must be a positive number, got {alpha!r}. "
      "The adapter is scaled by alpha / rank; alpha = 2 * rank is usual."
    )
  if not 0.0 <= dropout < 1.0:
    raise ValueError(f"`dropout` must be in [0, 1), got {dropout!r}. 0 turns it off.")
  if not isinstance(rngs, nnx.Rngs):
    raise TypeError(f"`rngs` must be an nnx.Rngs, got {rngs!r}. Pass `nnx.Rngs(0)`.")


def check_base(name: str, base: nnx.Module) -> None:
  """Refuses a base layer that an adapter cannot be put on."""
  if isinstance(base, LoRALinear):
    raise ValueError(
      f"`{name}` has a LoRA adapter already. "
      "Call `merge_lora` first, or train the adapter that is there."
    )
  if not isinstance(base, (nnx.Linear, NF4Linear)):
    raise TypeError(f"`{name}` must be an nnx.Linear or an NF4Linear, got {type(base).__name__}.")
  if isinstance(base, nnx.Linear):
    check_weight(name, base.kernel[...])


@jax.custom_vjp
def _low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """x A B."""
  return (x @ a) @ b


def _low_rank_forward(x, a, b):
  low = x @ a
  return low @ b, (x, low, a, b)


def _low_rank_backward(residuals, g):
  # Derived by JAX, the gradient of A is written ((g B^T)^T x)^T, which XLA's CPU backend computes
  # three times slower than x^T (g B^T): a fifth of a whole QLoRA step of a 135M model.
  x, low, a, b = residuals
  d = g @ b.T
  batch = tuple(range(x.ndim - 1))
  over_batch = ((batch, batch), ((), ()))
  da = jax.lax.dot_general(x, d, over_batch)
  return d @ a.T, da, jax.lax.dot_general(low, g, over_batch)


_low_rank.defvjp(_low_rank_forward, _low_rank_backward)


class LoRALinear(nnx.Module):
  r"""A linear layer plus a trainable low-rank correction.

  .. math:: y = \mathrm{base}(x) + s \, (\mathrm{drop}(x) \, A) \, B, \qquad s = \alpha / r

  A starts uniform in :math:`\pm 1/\sqrt{\mathrm{in}}` as in PEFT, and B at zero, so that a new
  adapter changes nothing. Both are float32 `nnx.LoRAParam`, and are used in the dtype of the
  base's output. Train them, and nothing else, with `nnx.Optimizer(model, tx,
  wrt=nnx.LoRAParam)`.

  Dropout follows `model.train()` and `model.eval()`. With `dropout=0` there is no random state.
  A stack of layers has a random key for each.

  Invariants: `lora_a.shape == (..., in_features, rank)` and
  `lora_b.shape == (..., rank, out_features)`, with the leading axes of the base.

  Args:
    base: an `nnx.Linear` or an `NF4Linear`, with or without leading axes.
    rank: r, the inner size of the correction.
    alpha: the numerator of the scale.
    dropout: the share of the inputs of A that are zeroed in training.
    use_rslora: scale by alpha / sqrt(rank) instead (rank-stabilized LoRA).
    rngs: gives the key for A (stream `params`) and those of dropout (stream `dropout`).

  Raises:
    TypeError: `base` is neither an `nnx.Linear` nor an `NF4Linear`, or `rngs` no `nnx.Rngs`.
    ValueError: `base` has an adapter already, or holds integers, NaN or Inf; `rank`, `alpha` or
      `dropout` is out of range.

  >>> import jax.numpy as jnp
  >>> from flax import nnx
  >>> from optax_lowmem import nn
  >>> base = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
  >>> layer = nn.LoRALinear(base, rank=2, alpha=4, rngs=nnx.Rngs(1))
  >>> x = jnp.ones((3, 8))
  >>> bool((layer(x) == base(x)).all()), layer.scale
  (True, 2.0)

  References:
    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv:2106.09685.
    Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023,
    arXiv:2312.03732.
  """

  def __init__(
    self,
    base: nnx.Linear | NF4Linear,
    rank: int,
    alpha: float,
    *,
    dropout: float = 0.0,
    use_rslora: bool = False,
    rngs: nnx.Rngs,
  ):
    check_lora(rank, alpha, dropout, rngs)
    check_base("base", base)
    # The output axis is last in an nnx.Linear's kernel (in, out) and last but one in ours.
    if isinstance(base, NF4Linear):
      *stack, out_features, in_features = base.weight.get_value().shape
    else:
      *stack, in_features, out_features = base.kernel[...].shape
    bound = 1 / math.sqrt(in_features)
    self.base = base
    a_shape = (*stack, in_features, rank)
    self.lora_a = nnx.LoRAParam(
      jax.random.uniform(rngs.params(), a_shape, jnp.float32, -bound, bound)
    )
    self.lora_b = nnx.LoRAParam(jnp.zeros((*stack, rank, out_features), jnp.float32))
    self.dropout = nnx.data(None)
    if dropout > 0:
      self.dropout = nnx.Dropout(dropout, rngs=rngs)
      if stack:  # one key and one counter for each layer, so that nnx.scan can slice them
        self.dropout.rngs = rngs["dropout"].split(tuple(stack))
    self.rank = rank
    self.alpha = alpha
    self.use_rslora = use_rslora

  @property
  def in_features(self) -> int:
    return self.lora_a[...].shape[-2]

  @property
  def out_features(self) -> int:
    return self.lora_b[...].shape[-1]

  @property
  def scale(self) -> float:
    """alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
    return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.base(x)
    x = x.astype(y.dtype)
    if self.dropout is not None:
      x = self.dropout(x)
    a, b = self.lora_a[...], self.lora_b[...]
    correction: Any = _low_rank(x, a.astype(y.dtype), (self.scale * b).astype(y.dtype))
    return y + correction

  def merge(self) -> nnx.Linear:
    """One plain `nnx.Linear` that computes what this layer computes without dropout.

    Its kernel is W + scale * A B in float32, whatever the dtype of the base; from an
    `NF4Linear`, W is the decoded weight. The bias is the base's.
    """
    base = self.base
    if isinstance(base, NF4Linear):
      kernel, extra = jnp.swapaxes(base.dequantize(), -1, -2), {}
    else:
      kernel = base.kernel[...].astype(jnp.float32)
      names = ("dot_general", "promote_dtype", "preferred_element_type")
      extra = {name: getattr(base, name) for name in names}
    product = jnp.matmul(self.lora_a[...], self.lora_b[...], precision="highest")
    merged = kernel + self.scale * product
    linear = nnx.Linear(
      self.in_features,
      self.out_features,
      use_bias=False,
      dtype=base.dtype,
      param_dtype=jnp.float32,
      precision=base.precision,
      kernel_init=lambda *_: merged,
      rngs=nnx.Rngs(0),
      **extra,
    )
    bias: Any = base.bias
    linear.bias, linear.use_bias = bias, bias is not None
    return linear
