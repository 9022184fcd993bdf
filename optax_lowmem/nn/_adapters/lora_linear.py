"""A trainable low-rank correction on top of a frozen linear layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem.nn._adapters.adapter import Adapter
from optax_lowmem.nn._layers.base_layer import (
  check_dense,
  contraction_at,
  contraction_of,
  is_linear,
  reading,
  with_matrix,
)
from optax_lowmem.nn._layers.packed_layer import placed
from optax_lowmem.nn._proofs.foreign_modules import placement


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
    variant: a kind of adapter other than LoRA and DoRA: see `Variant`.
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

  @classmethod
  def check_base(cls, name: str, base: Any) -> None:
    super().check_base(name, base)
    if not is_linear(base):
      reason = reading(base).reason
      raise TypeError(
        f"`{name}` must be an nnx.Linear, nnx.LinearGeneral, nnx.Einsum or a quantized one, "
        f"got {type(base).__name__}" + (f": {reason}." if reason else ".")
      )
    contraction_of(base)
    check_dense("" if name == "base" else name, base)

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    self.check_one_layer()
    x, sharding = inputs, placement(self.base, out_sharding)
    y = self.base(x, **sharding)
    given = x.astype(y.dtype)
    if self.dropout is not None:
      given = self.dropout(given)
    drops = self.dropout is not None and not self.dropout.deterministic
    shape = contraction_at(self.base, x)
    parts = self.scaled(self.values(), y.dtype)
    added = self.variant.product(parts, shape.flatten(given))
    added = placed(shape.unflatten(added, given), out_sharding)
    return self.variant.apply(self, x, y, added, given if drops else None, sharding)

  def added_bias(self) -> jax.Array | None:
    """What the adapter adds to the bias of the base, in float32; None if nothing."""
    return self.variant.bias(self.scaled(self.values(), jnp.float32))

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
    bias = self.added_bias()
    if bias is not None:
      check_mergeable("the adapter", self)
      old, bias = layer.bias[...], contraction_of(self.base).vector_to_bias(bias)
      layer.bias = nnx.Param(old + bias.reshape(old.shape).astype(old.dtype))
    return layer


def check_mergeable(name: str, layer: Adapter) -> None:
  """Refuses an adapter with a bias where the base has none."""
  if layer.variant.bias(layer.values()) is not None and layer.base.bias is None:
    raise ValueError(
      f"{name} has a bias (`lora_bias`) and its base has none to add it to. Keep the adapter, or "
      "give the base a bias of zeros."
    )
