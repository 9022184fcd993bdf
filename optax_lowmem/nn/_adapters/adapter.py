"""What the adapters of all kinds of layers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem._variants.lora_scale import check_numbers, masked, plain_numbers, scale_of, spread
from optax_lowmem._variants.variant import Arrays, Part, Variant, check_settings, matrix
from optax_lowmem.nn._adapters.dora import DoRA
from optax_lowmem.nn._adapters.lora_init import Init, check_init
from optax_lowmem.nn._adapters.variants import chosen
from optax_lowmem.nn._layers.base_layer import matrix_of, matrix_shape, stack_shape
from optax_lowmem.nn._proofs.foreign_modules import setting_of


class LoRAScale(nnx.Variable[jax.Array]):
  """One scale for each layer of a stack whose ranks or alphas differ; not trained."""


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
  """The parts of an adapter of `base`, of the kind `variant`, and how they are scaled.

  `rank` and `alpha` are those of every layer, or the largest of a stack whose layers differ; then
  `ranks` and `alphas` hold them all, and what parts have beyond a layer's rank is zero, and stays
  zero: the gradient of each is a product with another.

  Invariants: each part of `variant.parts` is an `nnx.LoRAParam` of its name, of shape
  (..., *axes): `lora_a.shape == (..., in_features, rank)`,
  `lora_b.shape == (..., rank, out_features)`, and, with DoRA,
  `magnitude.shape == (..., out_features)`.
  """

  is_embed = False
  # Parts that only some variants of LoRA have, and the factors that its `init` took from the base.
  magnitude: Any = None
  lora_bias: Any = None
  start_a: Any = None
  start_b: Any = None

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
    variant: Variant | None = None,
    init: Init = "default",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    check_lora(rank, alpha, dropout, rngs)
    rank, alpha = plain_numbers(rank, alpha)
    self.check_base("base", base)
    variant = self.variant = chosen(variant, use_dora, lora_bias)
    check_init(init)
    check_param_dtype(param_dtype)
    check_settings(variant, use_rslora, dropout)
    variant.check(type(base).__name__, base, rank, init)
    stack = stack_shape(base)
    self.ranks, self.alphas = _per_layer("rank", rank, stack), _per_layer("alpha", alpha, stack)
    self.rank: int = max(rank) if isinstance(rank, Sequence) else rank
    self.alpha: float = max(alpha) if isinstance(alpha, Sequence) else alpha
    self.use_rslora = use_rslora
    self.scales = nnx.data(None)
    if self.ranks or self.alphas:
      self.scales = LoRAScale(jnp.asarray(self.layer_scales(stack[0]), jnp.float32))
    self.base = base
    *lead, out, inputs = matrix_shape(base)
    sizes = {"in": inputs, "out": out, "rank": self.rank}
    shapes = {part.name: (*lead, *part.shape(sizes)) for part in self.parts}
    values = variant.start(self, shapes, init, param_dtype, rngs)
    for part in self.parts:
      value = values[part.name].astype(param_dtype)
      if "rank" in part.axes:
        value = masked(value, part.axes.index("rank") - len(part.axes), self.ranks)
      setattr(self, part.name, nnx.LoRAParam(value))
    self.dropout = nnx.data(None)
    if dropout > 0:
      self.dropout = nnx.Dropout(dropout, rngs=rngs)
      if stack:  # one key and one counter for each layer, so that nnx.scan can slice them
        self.dropout.rngs = rngs["dropout"].split(tuple(stack))

  def __setstate__(self, state: Any) -> None:
    """From a pickle, which has no `variant` if it was made before kinds were classes."""
    if "variant" not in state:
      dora, bias = (state.get(name) is not None for name in ("magnitude", "lora_bias"))
      state = {**state, "variant": chosen(None, dora, bias)}
    super().__setstate__(state)

  @classmethod
  def check_base(cls, name: str, base: Any) -> None:
    """Refuses a base that an adapter cannot be put on."""
    if isinstance(base, Adapter):
      raise ValueError(
        f"`{name}` has a LoRA adapter already. "
        "Call `merge_lora` first, or train the adapter that is there."
      )

  def __getattr__(self, name: str) -> Any:
    """Settings of the base, which the model may ask for, and the shapes of its arrays."""
    return setting_of(self, vars(self).get("base"), name)

  @property
  def parts(self) -> tuple[Part, ...]:
    return self.variant.parts(self.is_embed)

  @property
  def in_features(self) -> int:
    return matrix_shape(self.base)[-1]

  @property
  def out_features(self) -> int:
    return matrix_shape(self.base)[-2]

  @property
  def use_dora(self) -> bool:
    return isinstance(self.variant, DoRA)

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

  def check_one_layer(self) -> None:
    """Refuses a call of a stack of which some Variables are cut into layers, and others are not."""
    keys = getattr(getattr(self.dropout, "rngs", None), "key", None)
    for kind, variable in (("nn.LoRAScale", self.scales), ("nnx.RngState", keys)):
      if variable is not None and variable[...].ndim:
        raise ValueError(
          f"this {type(self).__name__} holds a stack of layers, its `{kind}` has shape "
          f"{variable[...].shape}. Call it under `nnx.scan` or `nnx.vmap` over the leading axis; "
          f"an `nnx.StateAxes` has to name `{kind}` beside `nnx.Param`."
        )

  def values(self) -> Arrays:
    """The parts' arrays, by their names."""
    return {part.name: getattr(self, part.name)[...] for part in self.parts}

  def scaled(self, values: Arrays, dtype: Any) -> Arrays:
    """Parts with the scale multiplied in, in float32: one that is no power of 2 rounds nothing."""
    values = dict(values)
    for part in self.parts:
      if part.scaled and part.name in values:
        value = values[part.name].astype(jnp.float32)
        values[part.name] = value * spread(self.scale, value.ndim)
    return {name: value.astype(dtype) for name, value in values.items()}

  def delta(self, values: Arrays | None = None) -> jax.Array:
    """What the adapter adds to the weight (..., out, in), in float32."""
    values = self.values() if values is None else values
    delta = self.variant.delta({k: v.astype(jnp.float32) for k, v in values.items()}, matrix)
    return spread(self.scale, delta.ndim) * delta

  def factor(self, norm: jax.Array) -> jax.Array:
    """What the rows of the weight, of that norm, are multiplied by."""
    factor = self.variant.factor(self.values(), norm)
    if self.ranks and 0 in self.ranks:  # layers of a stack that have no adapter
      factor = jnp.where(spread(self.scale, factor.ndim) > 0, factor, 1.0)
    return factor

  def merged_matrix(self, original: jax.Array | None = None) -> jax.Array:
    """The weight (..., out, in) that base and adapter amount to, in float32.

    With `original`, that of the base before it was quantized, or before room was made in it for
    the adapter, the adapter is added to that one instead.
    """
    delta = self.delta()
    if original is not None and (room := self.variant.room(self)):
      delta = delta - self.delta(room)
    weight = (matrix_of(self.base) if original is None else original) + delta
    if self.variant.normed:
      weight = self.factor(jnp.sqrt((weight * weight).sum(-1)))[..., None] * weight
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
