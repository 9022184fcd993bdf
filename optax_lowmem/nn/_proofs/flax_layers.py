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
    ValueError: its equation is not a plain product, or its layers are not stacked along the leading
      axes.
  """
  if isinstance(layer, nnx.LinearGeneral):
    batch = tuple(layer.batch_axis.values())
    shape = (*batch, *layer.in_features, *layer.out_features)
    found = Contraction(None, tuple(layer.axis), len(batch), shape)
  elif isinstance(layer, nnx.Einsum):
    found = Contraction.of_equation(layer.einsum_str, tuple(layer.kernel_shape))
  else:
    sizes = ("num_embeddings", "features") if is_embed(layer) else ("in_features", "out_features")
    shape = (layer.embedding if is_embed(layer) else layer.kernel)[...].shape
    if len(shape) > 2:  # one matrix tells its sizes itself, and may have been replaced
      shape = tuple(getattr(layer, name) for name in sizes)
    found = Contraction.dense(*shape)
  _check_stack(layer, found)
  return found


def _check_stack(layer: Any, contraction: Contraction) -> None:
  """Refuses layers that are stacked along another axis than the first."""
  name = "embedding" if is_embed(layer) else "kernel"
  shape, one = getattr(layer, name)[...].shape, tuple(contraction.kernel_shape)
  if shape[-len(one) :] != one:
    raise ValueError(
      f"the {name} of a {type(layer).__name__} has shape {shape}, which does not end in {one}. "
      "Stack layers along the leading axes, as `nnx.vmap` does where `out_axes` is 0."
    )
