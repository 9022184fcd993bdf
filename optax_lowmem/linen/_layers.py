"""Which linear layers and embeddings a Linen model has, found by tracing it once."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
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
from optax_lowmem.linen._stored import Marks, Weight

# What they hold is not what their layer multiplies by, so that nothing can be merged into it.
_NORMED = (nn.WeightNorm, nn.SpectralNorm)
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
_TRACES = itertools.count()


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
  `nn.WeightNorm` and `nn.SpectralNorm`, nor where `nn.map_variables` changes the weights: what is
  stored there is not what is multiplied by.

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
  seen = _Seen(variables["params"])
  rest = {name: tree for name, tree in variables.items() if name != "params"}

  def call(_: Any, given: Any) -> None:
    rest, args, kwargs = given

    def run(arrays: Sequence[Any]) -> list[jax.Array]:
      given = {**rest, **seen.names, "params": seen.with_arrays(arrays)}
      # The first is the outer one: packed layers do not go on to what is inside of `intercept`.
      with nn.intercept_methods(functools.partial(_record, seen)), nn.intercept_methods(intercept):
        results = model.apply(given, *args, rngs=rngs, method=method, mutable=True, **kwargs)
      return [leaf for leaf in jax.tree.leaves(results) if isinstance(leaf, jax.Array)]

    seen.marks.read(jax.make_jaxpr(run)(seen.arrays))

  trace(call, (), (rest, args, kwargs))
  return seen.layers()


class _Seen:
  """What is seen of a model while it is traced.

  Attributes:
    params: its parameters.
    arrays: those of their leaves that are arrays: the model is traced as a function of them.
    places: the parameters with the positions of the arrays in their places.
    names: a collection in which every module has its own path for a key. `nn.jit` takes what it
      traced, in this model or before, for any module of the same settings, and that would not be
      seen; but not where the names of variables differ.
    marks: of the weights that layers took.
    found: the layers by their paths.
    others: the classes of the other modules, by their dotted paths.
    tied: the dotted paths of embeddings that are output layers too.
    misfits: what is wrong with weights whose stacks lie along other axes, by dotted paths.
    normed: the norms that are running, by their classes.
  """

  def __init__(self, params: Any):
    self._leaves, self._structure = jax.tree.flatten(params)
    at = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, _ARRAYS)]
    place = {i: n for n, i in enumerate(at)}
    self.params = params
    self.arrays = [self._leaves[i] for i in at]
    self.places = self._structure.unflatten([place.get(i) for i in range(len(self._leaves))])
    self.names = {f"traced {next(_TRACES)}": _names(params, "")}
    self.marks = Marks()
    self.found: dict[tuple[str, ...], Layer] = {}
    self.others: dict[str, str] = {}
    self.tied: dict[str, None] = {}
    self.misfits: dict[str, str] = {}
    self.normed: list[str] = []

  def with_arrays(self, arrays: Sequence[Any]) -> Any:
    """The parameters with other arrays."""
    given = iter(arrays)
    leaves = [next(given) if isinstance(leaf, _ARRAYS) else leaf for leaf in self._leaves]
    return self._structure.unflatten(leaves)

  def layers(self) -> Layers:
    """The layers, without those that multiply by something else than what is stored."""
    layers: list[Layer] = []
    for layer in self.found.values():
      if layer.name in self.marks.computed:
        why = f"whose {layer.field} is computed from the stored one (`nn.map_variables`)"
        self.others[layer.name] = f"{layer.kind} {why}"
      elif layer.name in self.misfits:
        raise ValueError(self.misfits[layer.name])
      else:
        self.others.pop(layer.name, None)
        layers.append(layer)
    return Layers(tuple(layers), tuple(self.others.items()), tuple(self.tied))


def _names(tree: Mapping[str, Any], path: str) -> dict[str, Any]:
  inner = {key: _names(t, f"{path}.{key}") for key, t in tree.items() if isinstance(t, Mapping)}
  return {f"at {path}": {}, **inner}


def _record(seen: _Seen, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
  module, call = context.module, call_of(args, kwargs, context)
  kind, name = type(module).__name__, ".".join(module.path)
  if isinstance(module, _NORMED):
    seen.normed.append(kind)
    try:
      return next_fun(*args, **kwargs)
    finally:
      seen.normed.pop()
  if isinstance(module, nn.Embed) and context.method_name == "attend":
    seen.tied[name] = None
  weight = call and weight_at(seen.params, module.path, call.field)
  if call is None or weight is None or seen.normed:
    seen.others.setdefault(name, " in a ".join([kind, *seen.normed]))
    return next_fun(*args, **kwargs)
  packed = isinstance(weight, QuantizedArray)
  one = call.contraction.matrix_shape if packed else call.contraction.kernel_shape
  stack = weight.shape[: len(weight.shape) - len(one)]
  fits = (*stack, *one) == weight.shape
  taken = module.get_variable("params", call.field)
  if not fits:
    seen.misfits[name] = (
      f"`{name}` needs a {call.field} of shape {one} and has one of {weight.shape}. {STACKED}"
    )
    if getattr(nn.unbox(taken), "shape", one) != one:
      raise ValueError(seen.misfits[name])
  own = own_settings(module, nn.Dense.promote_dtype)
  layer = Layer(tuple(module.path), kind, call.field, stack, call.contraction, own)
  before = seen.found.setdefault(layer.path, layer)
  if before.contraction.groups() != layer.contraction.groups():
    raise ValueError(f"`{name}` is called with two equations, which see its kernel differently.")
  y = next_fun(*args, **kwargs)
  places = jax.tree.leaves(_at(seen.places, module.path, call.field))
  return seen.marks.on(y, Weight(name, tuple(places), len(stack) if fits else None), taken)


def copied(tree: Any) -> dict[str, Any]:
  """The same leaves in nested dicts of their own, in which entries can be set."""
  return core.unfreeze(tree)


def weight_at(params: Any, path: Sequence[str], field: str) -> Any:
  """A weight in a tree of parameters, without its box of partitioning names; None if absent."""
  return nn.unbox(_at(params, path, field))


def _at(params: Any, path: Sequence[str], field: str) -> Any:
  for key in (*path, field):
    params = params.get(key) if isinstance(params, Mapping) else None
  return params
