"""What the adapters of all kinds of layers share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem.nn._adapters.lora_init import Init, check_init, initial_factors
from optax_lowmem.nn._adapters.lora_scale import check_numbers, scale_of
from optax_lowmem.nn._layers.base_layer import (
  contraction_of,
  dense_variable,
  matrix_of,
  matrix_shape,
  stack_shape,
)
from optax_lowmem.nn._layers.packed_product import wait_for
from optax_lowmem.nn._layers.quantized_linear import dequantize_stack
from optax_lowmem.nn._proofs.foreign_modules import setting_of


class LoRAScale(nnx.Variable[jax.Array]):
  """One scale for each layer of a stack whose ranks or alphas differ; not trained."""


class LoRAStart(nnx.Variable[jax.Array]):
  """A factor as it was before training, where the base was changed to make room for it."""


def check_lora(rank: Any, alpha: Any, dropout: float, rngs: nnx.Rngs) -> None:
  """Refuses settings that mean nothing, before any module is touched."""
  check_numbers(rank, alpha, dropout, per_layer=True)
  if not isinstance(rngs, nnx.Rngs):
    raise TypeError(f"`rngs` must be an nnx.Rngs, got {rngs!r}. Pass `nnx.Rngs(0)`.")
  for stream in ("params", "dropout") if dropout else ("params",):
    if stream not in rngs and "default" not in rngs:
      raise ValueError(f"`rngs` has no stream {stream!r}. Pass `nnx.Rngs(0)`, which has every one.")


def check_param_dtype(param_dtype: Any) -> None:
  """Refuses what adapters are not held in."""
  try:
    name = jnp.dtype(param_dtype).name
  except TypeError:
    name = repr(param_dtype)
  if name not in ("float32", "bfloat16", "float16"):
    raise ValueError(
      f"`param_dtype` must be float32, bfloat16 or float16, got {name}. Adapters are trained in "
      "one of them."
    )


class Adapter(nnx.Module):
  """The factors of a low-rank correction of `base`, and how they are scaled.

  `rank` and `alpha` are those of every layer, or the largest of a stack whose layers differ; then
  `ranks` and `alphas` hold them all, columns of A and rows of B beyond a layer's rank are zero,
  and stay zero: the gradient of each is a product with the other.

  Invariants: `lora_a.shape == (..., in_features, rank)`,
  `lora_b.shape == (..., rank, out_features)`, and, with DoRA,
  `magnitude.shape == (..., out_features)`.
  """

  def __init__(
    self,
    base: Any,
    rank: int | Sequence[int],
    alpha: float | Sequence[float],
    *,
    dropout: float,
    use_rslora: bool,
    use_dora: bool,
    init: Init,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    check_lora(rank, alpha, dropout, rngs)
    check_init(init)
    check_param_dtype(param_dtype)
    stack = stack_shape(base)
    self.ranks, self.alphas = _per_layer("rank", rank, stack), _per_layer("alpha", alpha, stack)
    self.rank: int = max(rank) if isinstance(rank, Sequence) else rank
    self.alpha: float = max(alpha) if isinstance(alpha, Sequence) else alpha
    self.use_rslora = use_rslora
    self.scales = nnx.data(None)
    if self.ranks or self.alphas:
      self.scales = LoRAScale(jnp.asarray(self.layer_scales(stack[0]), jnp.float32))
    scale = self.scale
    base, a, b, started = initial_factors(
      base, self.rank, self.ranks, scale, init, param_dtype, rngs
    )
    self.base = base
    self.lora_a, self.lora_b = nnx.LoRAParam(a), nnx.LoRAParam(b)
    self.start_a = nnx.data(LoRAStart(jnp.copy(a)) if started else None)
    self.start_b = nnx.data(LoRAStart(jnp.copy(b)) if started else None)
    self.magnitude = nnx.data(None)
    if use_dora:
      self.magnitude = nnx.LoRAParam(self.weight_norm().astype(param_dtype))
    self.dropout = nnx.data(None)
    if dropout > 0:
      self.dropout = nnx.Dropout(dropout, rngs=rngs)
      if stack:  # one key and one counter for each layer, so that nnx.scan can slice them
        self.dropout.rngs = rngs["dropout"].split(tuple(stack))

  def __getattr__(self, name: str) -> Any:
    """Settings of the base, which the model may ask for, and the shapes of its arrays."""
    return setting_of(self, vars(self).get("base"), name)

  @property
  def in_features(self) -> int:
    return self.lora_a[...].shape[-2]

  @property
  def out_features(self) -> int:
    return self.lora_b[...].shape[-1]

  @property
  def use_dora(self) -> bool:
    return self.magnitude is not None

  def layer_scales(self, count: int) -> list[float]:
    """The scale of each layer of a stack."""
    ranks, alphas = self.ranks or (self.rank,) * count, self.alphas or (self.alpha,) * count
    return [scale_of(r, a, self.use_rslora) for r, a in zip(ranks, alphas, strict=True)]

  @property
  def scale(self) -> Any:
    """alpha / rank, or alpha / sqrt(rank) with `use_rslora`; an array of them if layers differ."""
    if self.scales is not None:
      return self.scales[...]
    return scale_of(self.rank, self.alpha, self.use_rslora)

  def scaled_b(self) -> jax.Array:
    """s B in float32, so that a scale that is no power of 2 rounds nothing."""
    b = self.lora_b[...].astype(jnp.float32)
    return b * self._spread_scale(b.ndim)

  def delta(self, a: Any = None, b: Any = None) -> jax.Array:
    """The scaled product of A and B as a matrix (..., out, in), in float32."""
    a, b = self.lora_a[...] if a is None else a, self.lora_b[...] if b is None else b
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    product = jnp.einsum("...ir,...ro->...oi", a, b, precision="highest")
    return self._spread_scale(product.ndim) * product

  def weight_norm(self, x: jax.Array | None = None) -> jax.Array:
    r"""The norm of each row of W + s (A B)^T, of which no gradient is taken.

    Expanded, so that no product A B of a layer's size is made: :math:`\|w\|^2 + 2 s\,b \cdot
    A^T w + s^2 b \cdot (A^T A) b`.

    Args:
      x: the layer's input, before which no packed weight is decoded: otherwise all layers' are, at
        once, and kept (12 dense weights for 12 unrolled layers; tied to the input, 1.5).
    """
    packed = dense_variable(self.base) is None
    if not packed:
      w = _as_stored(self.base)
    elif x is None:
      w = self.base.dequantize()
    else:
      w = dequantize_stack(wait_for(x, self.base.weight.get_value()))
    a = self.lora_a[...].astype(jnp.float32)
    w, a, b = jax.lax.stop_gradient((w, a, self.scaled_b()))
    dot = functools.partial(jnp.matmul, precision="highest")
    a_t = a.swapaxes(-1, -2)
    if packed:
      squares, product = (w * w).sum(-1), dot(w, a).swapaxes(-1, -2)
    else:
      squares, product = (w * w).sum(-2), dot(a_t, w)
    squared = squares + ((2 * product + dot(dot(a_t, a), b)) * b).sum(-2)
    return jnp.sqrt(jnp.maximum(squared, 0.0))

  def factor(self, norm: jax.Array | None = None) -> jax.Array:
    """DoRA's magnitude over the norm: what the rows of the weight are multiplied by."""
    magnitude: Any = self.magnitude
    norm = self.weight_norm() if norm is None else norm
    factor = jnp.where(norm > 0, magnitude[...] / jnp.where(norm > 0, norm, 1.0), 0.0)
    if self.ranks and 0 in self.ranks:  # layers of a stack that have no adapter
      factor = jnp.where(self._spread_scale(factor.ndim) > 0, factor, 1.0)
    return factor

  def _spread_scale(self, ndim: int) -> Any:
    """The scale, to broadcast against an array of that rank whose first axes are the stack's."""
    scale = self.scale
    return scale if self.scales is None else scale.reshape(scale.shape + (1,) * (ndim - scale.ndim))

  def merged_matrix(self, original: jax.Array | None = None) -> jax.Array:
    """The weight (..., out, in) that base and adapter amount to, in float32.

    With `original`, that of the base before it was quantized, or before room was made in it for
    the adapter, the adapter is added to that one instead.
    """
    delta = self.delta()
    if original is None:
      weight = matrix_of(self.base)
    else:
      weight = original
      if self.start_a is not None and self.start_b is not None:
        delta = delta - self.delta(self.start_a[...], self.start_b[...])
    weight = weight + delta
    if self.use_dora:
      norm = jnp.sqrt((weight * weight).sum(-1))
      weight = self.factor(norm)[..., None] * weight
    return weight


def _per_layer(name: str, value: Any, stack: tuple[int, ...]) -> tuple[Any, ...] | None:
  """One value a layer, or None where they are all the same."""
  if not isinstance(value, Sequence):
    return None
  if len(stack) != 1 or len(value) != stack[0]:
    raise ValueError(
      f"`{name}` has {len(value)} values, and the base {stack or 'no'} leading axes. Give one "
      "value, or one for each layer of a stack with one leading axis."
    )
  return tuple(value)


def _as_stored(base: Any) -> jax.Array:
  """The dense weight (..., in, out) in float32, of most layers without moving an element.

  A transposed copy of each weight of a model would be made at once, and all of them kept.
  """
  contraction = contraction_of(base)
  if contraction is not None and contraction.rhs != "".join(contraction.groups()):
    return matrix_of(base).swapaxes(-1, -2)
  *lead, out, inputs = matrix_shape(base)
  return dense_variable(base)[...].astype(jnp.float32).reshape(*lead, inputs, out)


def check_adaptable(name: str, base: Any) -> None:
  if isinstance(base, Adapter):
    raise ValueError(
      f"`{name}` has a LoRA adapter already. "
      "Call `merge_lora` first, or train the adapter that is there."
    )
