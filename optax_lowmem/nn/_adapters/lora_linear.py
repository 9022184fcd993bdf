"""A trainable low-rank correction on top of a frozen linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem.nn._adapters.adapter import Adapter, check_adaptable, check_lora
from optax_lowmem.nn._adapters.lora_init import Init
from optax_lowmem.nn._layers.base_layer import (
  check_dense,
  contraction_at,
  contraction_of,
  foreign_of,
  is_linear,
  matrix_shape,
  output_bias,
  reading,
  with_matrix,
)
from optax_lowmem.nn._layers.packed_product import automatic
from optax_lowmem.nn._layers.quantized_linear import at_rank, placed
from optax_lowmem.nn._proofs.foreign_modules import placement


def low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """x A B."""
  # Where axes are explicit or manual, JAX's own rule knows how gradients are to be placed.
  return _low_rank(x, a, b) if automatic(x, a, b) else (x @ a) @ b


@jax.custom_vjp
def _low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  return (x @ a) @ b


def low_rank_forward(x, a, b):
  low = x @ a
  return low @ b, (x, low, a, b)


def low_rank_backward(residuals, g):
  # Derived by JAX, the gradient of A is written ((g B^T)^T x)^T, which XLA's CPU backend computes
  # three times slower than x^T (g B^T): a fifth of a whole QLoRA step of a 135M model.
  x, low, a, b = residuals
  d = g @ b.T
  batch = tuple(range(x.ndim - 1))
  over_batch = ((batch, batch), ((), ()))
  da = jax.lax.dot_general(x, d, over_batch)
  return d @ a.T, da, jax.lax.dot_general(low, g, over_batch)


_low_rank.defvjp(low_rank_forward, low_rank_backward)


class LoRALinear(Adapter):
  r"""A linear layer plus a trainable low-rank correction.

  .. math:: y = \mathrm{base}(x) + s \, (\mathrm{drop}(x) \, A) \, B, \qquad s = \alpha / r

  A starts uniform in :math:`\pm 1/\sqrt{\mathrm{in}}` as in PEFT, and B at zero, so that a new
  adapter changes nothing. Both are `nnx.LoRAParam` in `param_dtype`, and are used in the dtype of
  the base's output. Train them, and nothing else, with `nnx.Optimizer(model, tx,
  wrt=nnx.LoRAParam)`.

  With `use_dora`, a trainable magnitude :math:`m` (one an output) takes the place of the norm of
  each row of the weight; no gradient goes through the norm:

  .. math:: y = \frac{m}{\|W + s (AB)^T\|} \left(W x + s\,B^T A^T x\right) + b

  Dropout follows `model.train()` and `model.eval()`. With `dropout=0` there is no random state.
  A stack of layers has a random key for each.

  The base may be an `nnx.LinearGeneral` or an `nnx.Einsum`; in and out then are the products of
  the axes that are summed over and of those that are not, and axes that the kernel shares with
  both input and output (experts, say) have factors of their own.

  Invariants: `lora_a.shape == (..., in_features, rank)` and
  `lora_b.shape == (..., rank, out_features)`, with the leading axes of the base.

  Args:
    base: an `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum`, a module of another class that is
      proved to be one product (see `QuantizedModule`), or a quantized one of them, with or without
      leading axes.
    rank: r, the inner size of the correction; or one for each layer of a stack, of which 0 is no
      adapter.
    alpha: the numerator of the scale; or one for each layer of a stack.
    dropout: the share of the inputs of A that are zeroed in training.
    use_rslora: scale by alpha / sqrt(rank) instead (rank-stabilized LoRA).
    use_dora: learn the magnitude of each output's weights apart (weight-decomposed LoRA).
    lora_bias: learn a bias after B too, scaled as the product is.
    init: `"default"`; `"gaussian"`, A normal with deviation 1 / r; `"pissa"`, the largest
      singular vectors of the weight, which are taken out of the base; `"loftq"` or a `LoftQ`.
    param_dtype: what the adapter is held in, and so its gradients. In bfloat16 both are half as
      large, but an update of less than 1/512 of a value is lost in rounding: prefer float32 where
      there is room, and a higher learning rate where there is not.
    rngs: gives the key for A (stream `params`) and those of dropout (stream `dropout`).

  Raises:
    TypeError: `base` is none of these, or `rngs` no `nnx.Rngs`.
    ValueError: `base` has an adapter already, or holds integers, NaN or Inf; `rank`, `alpha`,
      `dropout`, `init` or `param_dtype` is out of range.

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
    Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024, arXiv:2402.09353.
    Meng et al., PiSSA: Principal Singular Values and Singular Vectors Adaptation, 2024,
    arXiv:2404.02948.
  """

  def __init__(
    self,
    base: Any,
    rank: int | Sequence[int],
    alpha: float | Sequence[float],
    *,
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_bias: bool = False,
    init: Init = "default",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    check_lora(rank, alpha, dropout, rngs)
    check_base("base", base)
    if lora_bias and use_dora:
      raise ValueError("`lora_bias` does not go with `use_dora`, as in PEFT. Choose one.")
    check_own_bias(type(base).__name__, base, lora_bias)
    super().__init__(
      base,
      rank,
      alpha,
      dropout=dropout,
      use_rslora=use_rslora,
      use_dora=use_dora,
      init=init,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    self.lora_bias = nnx.data(None)
    if lora_bias:
      self.lora_bias = nnx.LoRAParam(jnp.zeros(matrix_shape(base)[:-1], param_dtype))

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    x = inputs
    sharding = placement(self.base, out_sharding)
    y = self.base(x, **sharding)
    dropped = x.astype(y.dtype)
    if self.dropout is not None:
      dropped = self.dropout(dropped)
    shape = contraction_at(self.base, x)
    correction = placed(self._correction(dropped, shape), out_sharding)
    if self.magnitude is None:
      return y + correction
    factor = self.factor(self.weight_norm(x)).astype(y.dtype)
    factor = at_rank(factor, y.ndim) if shape is None else shape.spread(factor, x.ndim)
    bias = output_bias(self.base, y, x)
    plain = y if bias is None else y - bias
    if self.dropout is None or self.dropout.deterministic:
      y = factor * (plain + correction)
      return y if bias is None else y + bias
    # As PEFT: what the magnitude changes of the base's output is dropped too.
    kept = self.base(dropped, **sharding)
    kept = kept if bias is None else kept - bias
    return y + (factor - 1) * kept + factor * correction

  def _correction(self, x: jax.Array, shape: Any) -> jax.Array:
    a, b = self.lora_a[...].astype(x.dtype), self.scaled_b().astype(x.dtype)
    flat = x if shape is None else shape.flatten(x)
    low: Any = low_rank(flat, a, b) if a.ndim == 2 else jnp.matmul(jnp.matmul(flat, a), b)
    if self.lora_bias is not None:
      bias = self.scaled_bias().astype(low.dtype)
      low = low + (at_rank(bias, low.ndim) if bias.ndim == 1 else bias[..., None, :])
    return low if shape is None else shape.unflatten(low, x)

  def scaled_bias(self) -> jax.Array:
    """s times the adapter's own bias."""
    bias: Any = self.lora_bias
    return bias[...].astype(jnp.float32) * self._spread_scale(bias[...].ndim)

  def merge(self, original: jax.Array | None = None, dtype: Any = jnp.float32) -> Any:
    """One plain layer that computes what this layer computes without dropout.

    An `nnx.Linear`, `nnx.LinearGeneral` or `nnx.Einsum`. Its kernel is W + scale * A B, computed
    in float32; from a quantized base, W is the decoded weight, or `original`. The bias is the
    base's, plus that of the adapter if it has one.

    Args:
      original: W as a matrix (..., out, in), in place of what the base holds.
      dtype: of the kernel.
    """
    layer = with_matrix(self.base, self.merged_matrix(original), dtype)
    if self.lora_bias is not None:
      if layer.bias is None:
        raise ValueError(
          "the adapter has a bias (`lora_bias`) and its base has none to add it to. Keep the "
          "adapter, or give the base a bias of zeros."
        )
      contraction, bias = contraction_of(self.base), self.scaled_bias()
      bias = bias if contraction is None else contraction.vector_to_bias(bias)
      bias = bias.reshape(layer.bias[...].shape)
      layer.bias = nnx.Param(layer.bias[...] + bias.astype(layer.bias[...].dtype))
    return layer


def check_base(name: str, base: Any) -> None:
  """Refuses a base layer that an adapter of linear layers cannot be put on."""
  check_adaptable(name, base)
  if not is_linear(base):
    raise TypeError(
      f"`{name}` must be an nnx.Linear, nnx.LinearGeneral, nnx.Einsum or a quantized one, "
      f"got {type(base).__name__}" + (f": {reason}." if (reason := reading(base).reason) else ".")
    )
  contraction_of(base)
  check_dense("" if name == "base" else name, base)


def check_own_bias(name: str, base: Any, lora_bias: bool) -> None:
  """Refuses an adapter's bias where the base has no place to merge it into."""
  foreign = foreign_of(base)
  if lora_bias and foreign is not None and foreign.bias != "bias":
    raise ValueError(
      f"`lora_bias` needs a `bias` in the base to be merged into, and {name} has none of that "
      "name. Leave it out."
    )
