"""What takes the place of a layer's product while a model that was not edited runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem._variants.variant import Arrays, Variant
from optax_lowmem.linen._calls import Call, call_of
from optax_lowmem.linen._product import STACKED, correction, drop, packed_product

FACTORS = "lora"  # the name of the factors beside a kernel


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("parts",),
  meta_fields=("variant", "rank", "dropout"),
)
@dataclasses.dataclass(frozen=True)
class Factors:
  """The adapter of one layer, put beside its kernel for the time of a call.

  There the transformations of Linen slice it as they slice the kernel. The rate of dropout is
  part of the tree's structure, so that `nn.jit` does not mistake one rate for another.

  Attributes:
    parts: the arrays of the adapter, with its scale in them.
    variant: the kind of adapter.
    rank: its rank.
    dropout: the share of the inputs to zero.
  """

  parts: Arrays
  variant: Variant
  rank: int
  dropout: float


def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
  """For `flax.linen.intercept_methods`: lets layers run on packed kernels and with factors.

  `apply` is the same for a whole call; this is for a program with interceptors of its own.

  Args:
    next_fun: the method that is called.
    args: its arguments.
    kwargs: its keyword arguments.
    context: flax's `InterceptorContext`, which says of what module.

  Returns:
    What the method returns, or would return with a decoded kernel, plus the correction.

  Raises:
    ValueError: a layer's bias or factors are missing or of other shapes than the layer's.

  >>> import jax, jax.numpy as jnp
  >>> from flax import linen as flax_linen
  >>> from optax_lowmem import linen
  >>> model, x = flax_linen.Dense(32), jnp.ones((3, 64))
  >>> variables = model.init(jax.random.key(0), x)
  >>> layers = linen.find_layers(model, variables, x)
  >>> packed = linen.quantize_params(variables["params"], layers)
  >>> with flax_linen.intercept_methods(linen.intercept):
  ...   model.apply({"params": packed}, x).shape
  (3, 32)
  """
  call = call_of(args, kwargs, context)
  if call is None:
    return next_fun(*args, **kwargs)
  module = context.module
  weight = nn.unbox(module.get_variable("params", call.field))
  if isinstance(weight, QuantizedArray):
    y = _packed(module, call, weight)
  else:
    y = next_fun(*args, **kwargs)
  factors = module.get_variable("params", FACTORS)
  return y + _correction(module, call, factors, y.dtype) if isinstance(factors, Factors) else y


def _packed(module: Any, call: Call, weight: QuantizedArray) -> jax.Array:
  bias = nn.unbox(module.get_variable("params", "bias")) if module.use_bias else None
  if module.use_bias and bias is None:
    raise ValueError(f"`{'.'.join(module.path)}` has `use_bias`, and 'params' has no bias for it.")
  return packed_product(call.x, weight, call.contraction, bias, module.dtype, module.precision)


def _correction(module: Any, call: Call, factors: Factors, dtype: Any) -> jax.Array:
  variant, parts, embedding = factors.variant, factors.parts, call.field == "embedding"
  *batch, out, inputs = call.contraction.matrix_shape
  sizes = {"in": inputs, "out": out, "rank": factors.rank}
  for part in variant.parts(embedding):
    want = (*batch, *part.shape(sizes))
    if parts[part.name].shape != want:
      raise ValueError(
        f"`{part.name}` of `{'.'.join(module.path)}` must have shape {want} in the layer, got "
        f"{parts[part.name].shape}. {STACKED}"
      )
  if embedding:
    rows = call.x if module.num_embeddings > 1 else jnp.zeros_like(call.x)
    parts = variant.looked_up(parts, lambda part: jnp.take(part, rows, axis=0))
    return variant.delta({name: part.astype(dtype) for name, part in parts.items()}, jnp.matmul)
  x = jnp.asarray(call.x, dtype)
  if factors.dropout > 0:
    x = drop(x, factors.dropout, module.make_rng("dropout"))
  return correction(x, variant, parts, call.contraction, dtype)


def apply(model: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> Any:
  """`model.apply`, of a model whose parameters `quantize_params` has packed.

  Each packed kernel is decoded for its product, again in the backward pass, and never kept; it gets
  no gradient. The dtypes are those that the layer has with the dense kernel. Parameters without
  packed kernels give what `model.apply` gives.

  Args:
    model: a Linen module. It is not changed.
    variables: its variables, with packed kernels in `"params"`.
    *args: arguments of the call.
    **kwargs: keyword arguments of `model.apply` and of the call.

  Returns:
    What `model.apply` returns.

  >>> import jax, jax.numpy as jnp
  >>> from flax import linen as flax_linen
  >>> from optax_lowmem import linen
  >>> model, x = flax_linen.Dense(32), jnp.ones((3, 64))
  >>> variables = model.init(jax.random.key(0), x)
  >>> layers = linen.find_layers(model, variables, x)
  >>> packed = linen.quantize_params(variables["params"], layers)
  >>> linen.apply(model, {"params": packed}, x).shape
  (3, 32)
  """
  with nn.intercept_methods(intercept):
    return model.apply(variables, *args, **kwargs)
