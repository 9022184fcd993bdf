"""The layers of flax that multiply by a matrix, known by their class."""

from __future__ import annotations

from typing import Any

from flax import nnx

from optax_lowmem._linear.contraction import Contraction

LINEAR = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)


def is_kind(module: Any, kind: type) -> bool:
  """Whether a module is of that kind: subclasses that compute something else are not."""
  return isinstance(module, kind) and type(module).__call__ is kind.__call__


def is_embed(module: Any) -> bool:
  return is_kind(module, nnx.Embed)


def is_flax_linear(module: Any) -> bool:
  return any(is_kind(module, kind) for kind in LINEAR)


def is_no_product(module: Any) -> bool:
  """Whether a class says that a module is no product: norms, and what else is of flax."""
  norm = isinstance(module, (nnx.RMSNorm, nnx.LayerNorm))  # a stack of them has a matrix
  of_flax = type(module).__module__.partition(".")[0] == "flax"
  return norm or (of_flax and not is_flax_linear(module))


def flax_contraction(layer: Any) -> Contraction:
  """How the axes of a layer's weight make a matrix.

  Raises:
    ValueError: its equation is not a plain product.
  """
  if isinstance(layer, nnx.LinearGeneral):
    batch = tuple(layer.batch_axis.values())
    shape = (*batch, *layer.in_features, *layer.out_features)
    return Contraction(None, tuple(layer.axis), len(batch), shape)
  if isinstance(layer, nnx.Einsum):
    return Contraction.of_equation(layer.einsum_str, tuple(layer.kernel_shape))
  weight = layer.embedding if is_embed(layer) else layer.kernel
  return Contraction.dense(*weight[...].shape[-2:])
