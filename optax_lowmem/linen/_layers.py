"""Which linear layers and embeddings a Linen model has, found by tracing it once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flax import core
from flax import linen as nn

from optax_lowmem._linear.contraction import Contraction
from optax_lowmem._linear.names import summary
from optax_lowmem._linear.own_product import own_settings
from optax_lowmem._linear.tracing import trace
from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem.linen._calls import call_of
from optax_lowmem.linen._intercept import intercept
from optax_lowmem.linen._product import STACKED

# What they hold is not what their layer multiplies by, so that nothing can be merged into it.
_NORMED = (nn.WeightNorm, nn.SpectralNorm)


@dataclasses.dataclass(frozen=True)
class Layer:
  """A linear layer or an embedding of a model.

  Attributes:
    path: its keys in `params`.
    kind: the name of its class.
    field: its weight's name in `params`, `"kernel"` or `"embedding"`.
    stack: the leading axes that the weight has in `params` and not in the layer itself.
    contraction: how the axes of the weight make a matrix.
    own: the settings by which it multiplies in a way of its own, which a packed layer would not.
  """

  path: tuple[str, ...]
  kind: str
  field: str
  stack: tuple[int, ...]
  contraction: Contraction
  own: tuple[str, ...]

  @property
  def name(self) -> str:
    """The path, dotted."""
    return ".".join(self.path)

  @property
  def embedding(self) -> bool:
    """Whether it looks up in its weight instead of multiplying by it."""
    return self.field == "embedding"

  @property
  def matrix_shape(self) -> tuple[int, ...]:
    """(out, in), or (batch, out, in), of one layer."""
    return self.contraction.matrix_shape


class Layers(NamedTuple):
  """What `find_layers` found.

  Attributes:
    layers: the linear layers and embeddings, in the order of the calls.
    others: (dotted path, class) of every other module that was called.
    tied: the dotted paths of the embeddings whose `attend` is an output layer.
  """

  layers: tuple[Layer, ...]
  others: tuple[tuple[str, str], ...]
  tied: tuple[str, ...] = ()

  def __repr__(self) -> str:
    """How many there are, and their names, numbers folded into a star."""
    return f"Layers({summary(self.names, self.others)})"

  @property
  def names(self) -> list[str]:
    """The dotted paths of the linear layers and embeddings."""
    return [layer.name for layer in self.layers]


def find_layers(
  model: nn.Module,
  variables: Mapping[str, Any],
  *args: Any,
  rngs: Any = None,
  method: Any = None,
  **kwargs: Any,
) -> Layers:
  """Finds the linear layers and embeddings that a call of the model goes through.

  The model is traced once, abstractly, and nothing is computed: only that tells a kernel of shape
  (heads, dim, out) from three stacked ones of shape (dim, out). `nn.Dense`, `nn.DenseGeneral`,
  `nn.Einsum` and `nn.Embed` are found wherever they are called: in attention layers of flax, under
  `nn.scan`, `nn.vmap`, `nn.remat` and `nn.jit`, in `setup` or in compact methods; not in
  `nn.WeightNorm` and `nn.SpectralNorm`, whose weights are not what is multiplied by.

  Args:
    model: any Linen module. It is not changed.
    variables: its variables, `{"params": …}`; arrays or `jax.ShapeDtypeStruct`.
    *args: arguments of the call, arrays or `jax.ShapeDtypeStruct`.
    rngs: as in `model.apply`.
    method: as in `model.apply`.
    **kwargs: keyword arguments of the call.

  Returns:
    `Layers`, for `LoRA` and `quantize_params`.

  Raises:
    TypeError: `model` is not a Linen module.
    ValueError: `variables` has no `"params"`, or layers are stacked along other than leading axes.

  >>> import jax, jax.numpy as jnp
  >>> from flax import linen as flax_linen
  >>> from optax_lowmem import linen
  >>> model = flax_linen.MultiHeadDotProductAttention(num_heads=2)
  >>> x = jnp.ones((1, 3, 8))
  >>> variables = model.init(jax.random.key(0), x)
  >>> layers = linen.find_layers(model, variables, x)
  >>> layers
  Layers(4 found: query, key, value, out; others: 1)
  >>> layers.layers[3].matrix_shape
  (8, 8)
  """
  if not isinstance(model, nn.Module):
    raise TypeError(f"`model` must be a flax.linen.Module, got {type(model).__name__}.")
  if "params" not in variables:
    raise ValueError(
      f"`variables` must have a collection 'params', got {sorted(variables)}. "
      "Pass `{'params': params}`."
    )
  found: dict[tuple[str, ...], Layer] = {}
  others: dict[str, str] = {}
  tied: dict[str, None] = {}
  record = functools.partial(_record, variables["params"], found, others, tied, [])

  def call(_: Any, given: Any) -> None:
    variables, args, kwargs = given
    with nn.intercept_methods(intercept), nn.intercept_methods(record):
      model.apply(variables, *args, rngs=rngs, method=method, mutable=True, **kwargs)

  trace(call, (), (variables, args, kwargs))
  for layer in found.values():
    others.pop(layer.name, None)
  return Layers(tuple(found.values()), tuple(others.items()), tuple(tied))


def _record(
  params: Any,
  found: dict[tuple[str, ...], Layer],
  others: dict[str, str],
  tied: dict[str, None],
  normed: list[str],
  next_fun: Callable[..., Any],
  args: Any,
  kwargs: Any,
  context: Any,
) -> Any:
  module, call = context.module, call_of(args, kwargs, context)
  kind = type(module).__name__
  if isinstance(module, _NORMED):
    normed.append(kind)
    try:
      return next_fun(*args, **kwargs)
    finally:
      normed.pop()
  if isinstance(module, nn.Embed) and context.method_name == "attend":
    tied[".".join(module.path)] = None
  weight = call and weight_at(params, module.path, call.field)
  if call is None or weight is None or normed:
    others.setdefault(".".join(module.path), " in a ".join([kind, *normed]))
    return next_fun(*args, **kwargs)
  packed = isinstance(weight, QuantizedArray)
  one = call.contraction.matrix_shape if packed else call.contraction.kernel_shape
  stack = weight.shape[: len(weight.shape) - len(one)]
  name = ".".join(module.path)
  if (*stack, *one) != weight.shape:
    raise ValueError(
      f"`{name}` needs a {call.field} of shape {one} and has one of {weight.shape}. {STACKED}"
    )
  own = own_settings(module, nn.Dense.promote_dtype)
  layer = Layer(tuple(module.path), kind, call.field, stack, call.contraction, own)
  before = found.setdefault(layer.path, layer)
  if before.contraction.groups() != layer.contraction.groups():
    raise ValueError(f"`{name}` is called with two equations, which see its kernel differently.")
  return next_fun(*args, **kwargs)


def copied(tree: Any) -> dict[str, Any]:
  """The same leaves in nested dicts of their own, in which entries can be set."""
  return core.unfreeze(tree)


def weight_at(params: Any, path: Sequence[str], field: str) -> Any:
  """A weight in a tree of parameters, without its box of partitioning names; None if absent."""
  for key in path:
    params = params.get(key) if isinstance(params, Mapping) else None
  return nn.unbox(params[field]) if isinstance(params, Mapping) and field in params else None
