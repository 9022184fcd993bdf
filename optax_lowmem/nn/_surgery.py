"""Replace the linear layers of a model, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import jax
from flax import nnx

from optax_lowmem.nn._lora import LoRALinear, check_base, check_lora
from optax_lowmem.nn._nf4 import NF4Linear, check_weight
from optax_lowmem.nn._places import (
  adaptable,
  check_replaceable,
  choose,
  is_linear,
  matches,
  patterns,
  places,
  replace,
)

M = TypeVar("M", bound=nnx.Module)


def quantize_model(
  model: M,
  *,
  targets: str | Sequence[str] | None = None,
  exclude: str | Sequence[str] | None = r"(^|\.)lm_head$",
  block_size: int = 64,
  double_quantize: bool = True,
) -> M:
  """Turns `nnx.Linear` layers into `NF4Linear`, in place.

  Layers are turned one at a time, so no more than one dense weight is held beside the model.
  The base of a `LoRALinear` is quantized under it. Layers that are `NF4Linear` already, and
  subclasses of `nnx.Linear` with a `__call__` of their own, are left as they are. Everything is
  checked before the first layer is changed.

  Args:
    model: any NNX module that holds the layers: as attributes, in `nnx.List`, `nnx.Dict`, lists
      or dicts, stacked along leading axes or not.
    targets: a regular expression or a list of them, each matching a module's whole dotted path
      or the last part of it. None means every `nnx.Linear`.
    exclude: the same, for layers to leave alone. None excludes nothing.
    block_size: how many inputs share a scale.
    double_quantize: store the scales in 8 bits too.

  Returns:
    `model`.

  Raises:
    ValueError: nothing matches (the message lists the modules that could), or a weight holds
      integers, NaN or Inf, or a layer uses its own `dot_general`.

  >>> from flax import nnx
  >>> from optax_lowmem import nn
  >>> mlp = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
  >>> type(nn.quantize_model(mlp).layers[0]).__name__
  'NF4Linear'
  """
  everything = places(model)
  skip = [] if exclude is None else patterns("exclude", exclude)
  possible = [
    place
    for place in everything
    if is_linear(place.module) and not any(matches(pattern, place.path) for pattern in skip)
  ]
  chosen = choose("targets", ".*" if targets is None else targets, everything, possible)
  for place in chosen:
    linear = place.module
    check_weight(f"{place.path}.kernel", linear.kernel[...])
    if linear.dot_general is not jax.lax.dot_general or linear.preferred_element_type is not None:
      raise ValueError(
        f"`{place.path}` sets `dot_general` or `preferred_element_type`, which an "
        "NF4Linear does not have. Name it in `exclude`."
      )
  while chosen:
    place = chosen.pop(0)
    linear = place.module
    new = NF4Linear.from_weight(
      linear.kernel[...].swapaxes(-1, -2),
      linear.bias,
      block_size=block_size,
      double_quantize=double_quantize,
      dtype=linear.dtype,
      precision=linear.precision,
    )
    replace(place, new)
  return model


def add_lora(
  model: M,
  rank: int,
  alpha: float,
  targets: str | Sequence[str],
  *,
  dropout: float = 0.0,
  use_rslora: bool = False,
  rngs: nnx.Rngs,
) -> M:
  r"""Puts a `LoRALinear` around the layers that `targets` names, in place.

  Args:
    model: any NNX module that holds `nnx.Linear` or `NF4Linear` layers.
    rank: as in `LoRALinear`.
    alpha: as in `LoRALinear`.
    targets: a regular expression or a list of them, each matching a module's whole dotted path
      (`model.layers.self_attn.q_proj`) or the last part of it (`q_proj|v_proj`).
    dropout: as in `LoRALinear`.
    use_rslora: as in `LoRALinear`.
    rngs: as in `LoRALinear`.

  Returns:
    `model`.

  Raises:
    ValueError: nothing matches (the message lists the modules that could), a matching layer has
      an adapter already or holds integers, NaN or Inf, or an argument is out of range.
    TypeError: `rngs` is not an `nnx.Rngs`.

  >>> from flax import nnx
  >>> from optax_lowmem import nn
  >>> mlp = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
  >>> nn.add_lora(mlp, rank=2, alpha=4, targets="layer.0", rngs=nnx.Rngs(1))
  Traceback (most recent call last):
    ...
  ValueError: `targets` 'layer.0' matches no module that can be changed. Nearest: layers.0. ...
  """
  check_lora(rank, alpha, dropout, rngs)
  everything = places(model)
  chosen = choose("targets", targets, everything, adaptable(everything))
  for place in chosen:
    check_base(place.path, place.module)
  for place in chosen:
    new = LoRALinear(place.module, rank, alpha, dropout=dropout, use_rslora=use_rslora, rngs=rngs)
    replace(place, new)
  return model


def merge_lora(model: M) -> M:
  """Turns every `LoRALinear` into one plain `nnx.Linear`, in place.

  The kernel becomes W + scale * A B in float32; where the base is an `NF4Linear`, W is its
  decoded weight, so the merged model no longer is in 4 bits.

  Args:
    model: any NNX module with `LoRALinear` layers in it.

  Returns:
    `model`.

  Raises:
    ValueError: there is no `LoRALinear` in `model`.

  >>> from flax import nnx
  >>> from optax_lowmem import nn
  >>> mlp = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
  >>> mlp = nn.add_lora(mlp, rank=2, alpha=4, targets=".*", rngs=nnx.Rngs(1))
  >>> type(nn.merge_lora(mlp).layers[0]).__name__
  'Linear'
  """
  chosen = [place for place in places(model) if isinstance(place.module, LoRALinear)]
  if not chosen:
    raise ValueError("`model` holds no LoRALinear, there is nothing to merge.")
  check_replaceable(chosen)
  for place in chosen:
    replace(place, place.module.merge())
  return model
