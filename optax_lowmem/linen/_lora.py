"""Adapters for a Linen model that was not edited."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from optax_lowmem._linear.packed_weight import dequantize_stack
from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem._variants.lora_scale import check_numbers
from optax_lowmem._variants.low_rank import LowRank
from optax_lowmem._variants.variant import Variant, check_settings, matrix
from optax_lowmem.linen._intercept import FACTORS, Factors, apply
from optax_lowmem.linen._layers import Layers, copied, weight_at
from optax_lowmem.linen._quantize import holder
from optax_lowmem.linen._targets import Target, find_targets


@dataclasses.dataclass(frozen=True, eq=False)
class LoRA:
  r"""A Linen model with low-rank adapters, which is itself not edited.

  .. math:: y = \mathrm{layer}(x) + s \, (\mathrm{drop}(x) \, A) \, B, \qquad s = \alpha / r

  `init` makes the adapters, a tree of float32 arrays and nothing else; `apply` is that of the model
  with ``variables["lora"]`` beside ``variables["params"]``. Train the adapters:

  >>> import jax, jax.numpy as jnp, optax
  >>> from flax import linen as flax_linen
  >>> from flax.training.train_state import TrainState
  >>> from optax_lowmem import linen
  >>> x = jnp.ones((3, 64))
  >>> model = flax_linen.Sequential([flax_linen.Dense(64), flax_linen.Dense(4)])
  >>> params = model.init(jax.random.key(0), x)["params"]
  >>> layers = linen.find_layers(model, {"params": params}, x)
  >>> params = linen.quantize_params(params, layers, targets="layers_0")  # if in 4 bits
  >>> lora = linen.LoRA(model, layers, rank=8, alpha=16, targets="layers_0")
  >>> adapters = lora.init(jax.random.key(1))
  >>> jax.tree.map(jnp.shape, adapters)
  {'layers_0': {'lora_a': (64, 8), 'lora_b': (8, 64)}}
  >>> state = TrainState.create(apply_fn=lora.apply, params=adapters, tx=optax.adamw(1e-3))
  >>> def loss(adapters):
  ...   return state.apply_fn({"params": params, "lora": adapters}, x).sum()
  >>> state = state.apply_gradients(grads=jax.grad(loss)(state.params))

  Layers compute their products unchanged, and x A B is added; no A B is made. For the time of a
  call the factors lie beside the kernels in `"params"`, so that `nn.scan` and `nn.vmap` slice them
  as they slice the kernels (over leading axes) and the model needs no new collection. Linear layers
  of more axes have factors of the product of those that are summed over and of the others; axes
  that a kernel shares with input and output, and stacks, have factors of their own for each index.
  In embeddings A starts at zero, as in PEFT; `attend` stays that of the base, and nothing is
  dropped.

  Args:
    model: any Linen module.
    layers: of `find_layers`.
    rank: r, the inner size of the correction.
    alpha: the numerator of the scale.
    targets: `"all-linear"`, which is every linear layer but the output head, or a regular
      expression or a list of them, each matching a layer's whole path, joined with `.` or `/`, or
      its last part (`query|value`).
    dropout: the share of the inputs of A that are zeroed, by the stream `dropout` of `rngs`.
    deterministic: nothing is dropped. For evaluation: ``dataclasses.replace(lora,
      deterministic=True)``.
    use_rslora: scale by alpha / sqrt(rank) instead (rank-stabilized LoRA).
    variant: a kind of adapter other than LoRA: see `optax_lowmem.nn.Variant`.
    rank_pattern: ranks of some layers, by regular expressions that match the end of a dotted path;
      the first that does counts.
    alpha_pattern: the same for alpha.

  Raises:
    ValueError: nothing matches (the message lists the layers that could), or an argument is out of
      range.
    TypeError: `model` is not a Linen module.

  References:
    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv:2106.09685.
    Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023,
    arXiv:2312.03732.
  """

  model: nn.Module
  layers: Layers
  rank: int
  alpha: float
  targets: str | Sequence[str] = "all-linear"
  _: dataclasses.KW_ONLY
  dropout: float = 0.0
  deterministic: bool = False
  use_rslora: bool = False
  variant: Variant = dataclasses.field(default_factory=LowRank)
  rank_pattern: Mapping[str, int] | None = None
  alpha_pattern: Mapping[str, float] | None = None
  chosen: tuple[Target, ...] = dataclasses.field(init=False, repr=False)

  def __post_init__(self):
    if not isinstance(self.model, nn.Module):
      raise TypeError(
        f"`model` must be a flax.linen.Module, got {type(self.model).__name__}. "
        "A model has one set of adapters."
      )
    if not isinstance(self.layers, Layers):
      raise TypeError(
        f"`layers` must be what `find_layers` returns, got {type(self.layers).__name__}."
      )
    check_numbers(self.rank, self.alpha, self.dropout)
    check_settings(self.variant, self.use_rslora, self.dropout)
    own_bias = self.variant.bias({part.name: part for part in self.variant.parts(False)})
    if own_bias or self.variant.normed or type(self.variant).apply is not Variant.apply:
      raise ValueError(
        f"`variant` {self.variant!r} does more than to add to a product, for which there is no "
        "place in Linen. Use `optax_lowmem.nn`."
      )
    found = find_targets(
      self.layers,
      self.targets,
      self.variant,
      self.rank,
      self.alpha,
      self.rank_pattern,
      self.alpha_pattern,
      self.use_rslora,
    )
    object.__setattr__(self, "chosen", found)

  def init(self, key: jax.Array) -> dict[str, Any]:
    """Returns new adapters, which change nothing: nested dicts of `lora_a` and `lora_b`."""
    flat: dict[tuple[str, ...], jax.Array] = {}
    for target, one in zip(self.chosen, jax.random.split(key, len(self.chosen)), strict=True):
      new = self.variant.initial(one, target.shapes, target.layer.embedding)
      flat |= {path: new[path[-1]] for path in target.paths}
    return traverse_util.unflatten_dict(flat)

  def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """`model.apply`, with adapters. Packed kernels run as in `linen.apply`.

    Args:
      variables: `{"params": …, "lora": adapters}` and other collections of the model.
      *args: arguments of the call.
      **kwargs: keyword arguments of `model.apply` and of the call.

    Returns:
      What `model.apply` returns.

    Raises:
      ValueError: `variables` lacks `"lora"`, or it holds other layers or shapes than `layers`; or
        there is dropout and `rngs` has no `dropout`.
    """
    lacking = [name for name in ("params", "lora") if name not in variables]
    if lacking:
      raise ValueError(
        f"`variables` has no collection {lacking[0]!r}, got {sorted(variables)}. "
        "Pass `{'params': params, 'lora': adapters}`."
      )
    rate = 0.0 if self.deterministic else self.dropout
    rngs = kwargs.get("rngs")
    if rate > 0 and not (rngs is not None and (not isinstance(rngs, Mapping) or "dropout" in rngs)):
      raise ValueError(
        f"`dropout` is {rate}, and `rngs` has no 'dropout'. Pass `rngs={{'dropout': key}}`, or to "
        "evaluate use `dataclasses.replace(lora, deterministic=True)`."
      )
    params = copied(variables["params"])
    flat = self.checked(variables["lora"])
    for target in self.chosen:
      parts = target.of(flat)
      parts |= {part.name: parts[part.name] * target.scale for part in target.parts if part.scaled}
      at = holder(params, target.layer.path)
      if FACTORS in at:
        raise ValueError(
          f"`{target.layer.name}` has a {FACTORS!r} in 'params' already. A layer has one adapter."
        )
      drops = 0.0 if target.layer.embedding else rate
      at[FACTORS] = Factors(parts, self.variant, target.rank, drops)
    out = apply(self.model, {**variables, "params": params}, *args, **kwargs)
    if kwargs.get("mutable", False) is not False and "params" in out[1]:
      return out[0], {**out[1], "params": self._without(out[1]["params"])}
    return out

  def merge(self, params: Mapping[str, Any], adapters: Any, dtype: Any = None) -> dict[str, Any]:
    r"""Takes adapters into the weights: :math:`W + s A B`, in float32.

    The result is for the model without adapters. A packed kernel with an adapter is decoded; one
    without stays packed, so that the model is called by `linen.apply`. For parameters that
    `model.apply` takes, pass `params` as they were before they were packed; nothing of them is
    rounded to 4 bits then. It is differentiable in `adapters`, but the gradient then needs float32
    arrays of the size of every adapted layer, where that of `apply` needs none. An embedding that
    the output layer is tied to is refused: its adapter is of the input alone, and a merged table
    would change both.

    Args:
      params: the parameters of the model, packed or not.
      adapters: as in `init`.
      dtype: of the merged weights; None is what each has (before it was packed).

    Returns:
      The parameters, as nested dicts.

    Raises:
      ValueError: `adapters` or `params` are not those of `layers`, or an embedding with an adapter
        is the output layer too (`attend`).
    """
    for target in self.chosen:
      if target.layer.name in self.layers.tied:
        raise ValueError(
          f"the embedding `{target.layer.name}` has an adapter, which is of the input alone, and "
          "the output layer is tied to it (`attend`). A merged table would change both. Keep the "
          "adapter, or leave the embedding out of `targets`."
        )
    params, flat = copied(params), self.checked(adapters)
    for target in self.chosen:
      layer = target.layer
      at, boxed = holder(params, layer.path), holder(params, layer.path)[layer.field]
      weight = weight_at(params, layer.path, layer.field)
      delta = target.scale * self.variant.delta(target.of(flat), matrix)
      if isinstance(weight, QuantizedArray):
        merged = layer.contraction.to_kernel(dequantize_stack(weight) + delta)
      else:
        merged = jnp.asarray(weight, jnp.float32) + layer.contraction.to_kernel(delta)
      merged = merged.astype(weight.dtype if dtype is None else dtype)
      boxes = isinstance(boxed, nn.meta.AxisMetadata)
      at[layer.field] = nn.meta.replace_boxed(boxed, merged) if boxes else merged
    return params

  def checked(self, adapters: Any) -> dict[tuple[str, ...], Any]:
    """The factors by their keys, all there and of the right shapes."""
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(copied(adapters))
    shapes = {(*t.layer.path, k): shape for t in self.chosen for k, shape in t.shapes.items()}
    # Layers of the model's own that have adapters keep theirs in the same collection.
    own = {name for name, kind in self.layers.others if kind == "LoRADense"}
    extra = [key for key in flat if key not in shapes and ".".join(key[:-1]) not in own]
    for key, shape in shapes.items():
      if key not in flat or jnp.shape(flat[key]) != shape:
        got = f"shape {jnp.shape(flat[key])}" if key in flat else "none"
        raise ValueError(f"the adapters must have `{'.'.join(key)}` of shape {shape}, got {got}.")
    if extra:
      raise ValueError(f"the adapters have `{'.'.join(extra[0])}`, which is not in `targets`.")
    return flat

  def _without(self, params: Any) -> dict[str, Any]:
    """The parameters without the factors that lay beside them."""
    params = copied(params)
    for target in self.chosen:
      holder(params, target.layer.path).pop(FACTORS, None)
    return params
