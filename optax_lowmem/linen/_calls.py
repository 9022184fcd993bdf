"""The call of a layer of Linen: what it multiplies, and by which of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from optax_lowmem._linear.contraction import Contraction
from optax_lowmem.linen._lora_dense import LoRADense
from optax_lowmem.linen._nf4_dense import NF4Dense

_KINDS = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Embed)
_METHODS = {inspect.unwrap(kind.__call__): kind for kind in _KINDS}


class Call(NamedTuple):
  """The call of a layer: its input, its weight's name, and how it multiplies by the weight."""

  x: Any
  field: str  # "kernel", or "embedding", whose table is looked up
  contraction: Contraction


def call_of(args: Sequence[Any], kwargs: Mapping[str, Any], context: Any) -> Call | None:
  """What a method call that was intercepted computes; None unless it is a layer's product.

  Told by the function that runs, not by the module's type: the class that `nn.remat` makes of Dense
  calls Dense's, inside of the transformation, and so may a subclass.
  """
  module = context.module
  method = getattr(context.orig_method, "func", context.orig_method)
  kind = _METHODS.get(inspect.unwrap(method))
  if kind is None or isinstance(module, (LoRADense, NF4Dense)):
    return None
  x = jnp.asarray(args[0] if args else kwargs["inputs"])
  if kind is nn.Embed:
    return Call(x, "embedding", Contraction.dense(module.num_embeddings, module.features))
  if kind is nn.Dense:
    return Call(x, "kernel", Contraction.dense(x.shape[-1], module.features))
  if kind is nn.Einsum:
    equation = module.einsum_str or (args[1] if len(args) > 1 else kwargs["einsum_str"])
    return Call(x, "kernel", Contraction.of_equation(equation, tuple(module.shape)))
  axis = sorted(a % x.ndim for a in _several(module.axis))
  batch = len(_several(module.batch_dims))
  shape = (*x.shape[:batch], *(x.shape[a] for a in axis), *_several(module.features))
  return Call(x, "kernel", Contraction(None, tuple(axis), batch, shape))


def _several(value: Any) -> tuple[int, ...]:
  return (value,) if isinstance(value, int) else tuple(value)
