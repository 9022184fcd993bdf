"""Modules of any class that are proved to multiply by one matrix.

Packages of models have linear layers of their own: an `Einsum` with a Param `w`, a `Dense` that
computes `x @ self.kernel + self.bias`. They are not recognized by name. Such a module is called on
abstract inputs, and its jaxpr is read: see `product`. What is proved for one shape of the input
is proved again for each shape that it is used with. The first comes from a call of the model
(`find_layers`), or is guessed.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optax_lowmem._linear.contraction import Contraction
from optax_lowmem.nn._proofs.product import NotAProduct, Product, prove

# What `nnx.Module.train` and `eval` switch: what is proved of one mode is not of the other.
_MODES = ("deterministic", "training", "use_running_average")
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


@dataclasses.dataclass(frozen=True)
class Foreign:
  """A module's class and settings, without its arrays: hashable, so it can rest in a graphdef.

  Attributes:
    graphdef: of the module.
    treedef: of its state.
    fields: the names of its arrays, in the order of the state's leaves.
    shapes: of its arrays, of one layer, in the same order.
    dtypes: the same.
    constants: the names of those that are no Variables, and that the product is made without.
    weight: the name of the matrix.
    bias: the name of the bias, or None.
    plain: whether the product accumulates in its own dtype.
    sides: which axes of the weight are shared with the input and the output, are inputs, and are
      outputs; None while that is looked for.
  """

  graphdef: Any
  treedef: Any
  fields: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]
  dtypes: tuple[Any, ...]
  constants: tuple[str, ...]
  weight: str
  bias: str | None
  plain: bool = True
  sides: tuple[tuple[int, ...], ...] | None = None

  @property
  def kernel_shape(self) -> tuple[int, ...]:
    return self.shapes[self.fields.index(self.weight)]

  def at(self, shape: tuple[int, ...], dtype: Any) -> Product:
    """What the module computes from an input of that shape and dtype.

    Raises:
      NotAProduct: something else than a product, or one of other axes of the weight than what is
        kept of it, a matrix, was made by.
    """
    # A program depends on these too, and may be asked for under several of them.
    config: Any = jax.config
    under = config.jax_default_matmul_precision, config.jax_enable_x64
    product = _prove(self, tuple(shape), jnp.dtype(dtype), under)
    if self.sides is not None and self.contraction(product).sides != self.sides:
      raise NotAProduct("it uses other axes of its weight as inputs")
    return product

  def contraction(self, product: Product) -> Contraction:
    return Contraction(product.equation, (), 0, self.kernel_shape)

  def build(self, **values: Any) -> Any:
    """The module with these arrays in its Variables."""
    return nnx.merge(self.graphdef, self.treedef.unflatten([values[name] for name in self.fields]))


@functools.lru_cache(maxsize=4096)
def _prove(foreign: Foreign, shape: tuple[int, ...], dtype: Any, under: Any) -> Product:
  kinds = dict.fromkeys(foreign.constants, "c") | {foreign.weight: "w", foreign.bias: "b"}

  def call(arrays: Any, x: jax.Array) -> Any:
    module = foreign.build(**dict(zip(foreign.fields, arrays, strict=True)))
    before = set(vars(module))
    y = module(x, **placement(module, None))
    if set(vars(module)) != before:
      raise NotAProduct("it changes itself when it is called")
    return y

  arrays = [jax.ShapeDtypeStruct(*a) for a in zip(foreign.shapes, foreign.dtypes, strict=True)]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    jaxpr = jax.make_jaxpr(call)(arrays, jax.ShapeDtypeStruct(shape, dtype))
  return prove(jaxpr, "".join(kinds[name] for name in foreign.fields) + "x")


@dataclasses.dataclass(frozen=True)
class Reading:
  """What is known of a module that is not of flax's kinds.

  Attributes:
    foreign: the module without its arrays, or None if it is no product.
    contraction: how the axes of its weight make a matrix.
    reason: why it is none.
  """

  foreign: Foreign | None = None
  contraction: Contraction | None = None
  reason: str = ""


NOTHING = Reading()


class Parts(NamedTuple):
  """A module without its arrays: see `Foreign`, but with the shapes of a whole stack."""

  graphdef: Any
  treedef: Any
  fields: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]
  dtypes: tuple[Any, ...]
  constants: tuple[str, ...]

  @property
  def rank(self) -> int:
    """How many axes the weight has, which has the most."""
    return max(len(shape) for name, shape in self._own())

  def _own(self) -> list[tuple[str, tuple[int, ...]]]:
    pairs = zip(self.fields, self.shapes, strict=True)
    return [(name, shape) for name, shape in pairs if name not in self.constants]

  def layer(self, lead: int) -> Foreign | None:
    """One layer of a stack with so many leading axes; None if it cannot be one."""
    own = self._own()
    if len({shape[:lead] for _, shape in own}) > 1:
      return None
    weight = next(name for name, shape in own if len(shape) == self.rank)
    bias = next((name for name, _ in own if name != weight), None)
    shapes = tuple(
      shape if name in self.constants else shape[lead:]
      for name, shape in zip(self.fields, self.shapes, strict=True)
    )
    return Foreign(*self._replace(shapes=shapes), weight, bias)


def parts_of(module: Any) -> Parts | Reading:
  """A module that may be such a product, or why it is none."""
  if not isinstance(module, nnx.Module) or not callable(module):
    return NOTHING
  variables = {k: v for k, v in vars(module).items() if isinstance(v, nnx.Variable)}
  constants = {k for k, v in vars(module).items() if isinstance(v, _ARRAYS)}
  arrays = {k: v.get_value() for k, v in variables.items()}
  if not all(isinstance(v, jax.Array | jax.ShapeDtypeStruct) for v in arrays.values()):
    return NOTHING
  if not any(_is_matrix(v) for v in arrays.values()):
    return NOTHING
  names = ", ".join(f"`{name}`" for name in variables)
  if sum(1 for _ in nnx.iter_modules(module)) > 1:
    return Reading(reason=f"it holds {names} beside other modules")
  if any(name in vars(module) for name in _MODES):
    return Reading(reason="it may compute something else in training")
  if not all(isinstance(v, nnx.Param) for v in variables.values()):
    return Reading(reason="it holds other Variables than an nnx.Param")
  if len(variables) > 2:
    return Reading(reason=f"it holds {names}")
  graphdef, state = nnx.split(module)
  leaves, treedef = jax.tree.flatten_with_path(state)
  if len(leaves) != len(variables) + len(constants):
    return Reading(reason="it holds trees of arrays that are no Variables")
  if more := _more_arguments(module):
    return Reading(reason=f"its `__call__` needs {more}, on which what it computes may depend")
  order = {str(getattr(path[0], "key", path[0])): leaf for path, leaf in leaves}
  shapes = tuple(tuple(leaf.shape) for leaf in order.values())
  dtypes = tuple(leaf.dtype for leaf in order.values())
  fixed = tuple(name for name in order if name in constants)
  return Parts(graphdef, treedef, tuple(order), shapes, dtypes, fixed)


def placement(module: Any, out_sharding: Any) -> dict[str, Any]:
  """`out_sharding` as keyword arguments for a layer: none where it is None and may be left out."""
  if out_sharding is None and "out_sharding" not in _required(module):
    return {}
  return {"out_sharding": out_sharding}


def _more_arguments(module: Any) -> str:
  """The arguments that a module must be given besides an input and an `out_sharding`."""
  more = [name for name in _required(module)[1:] if name != "out_sharding"]
  return ", ".join(f"`{name}`" for name in more)


def _required(module: Any) -> list[str]:
  parameters = inspect.signature(module.__call__).parameters.values()
  several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  return [p.name for p in parameters if p.default is p.empty and p.kind not in several]


def _is_matrix(value: Any) -> bool:
  return value.ndim >= 2 and jnp.issubdtype(value.dtype, jnp.floating)


def setting_of(wrapper: Any, layer: Any, name: str) -> Any:
  """What a wrapper of `layer` gives for an attribute that it does not have itself.

  Models ask their layers for more than a call: `self.query.features`, `self.query.kernel.shape`.
  Settings are those of the layer. Of an array there is a `jax.ShapeDtypeStruct`, and of a method
  nothing: who computes past the wrapper gets an error, not a result that lacks the adapter.
  """
  value = None if layer is None or name.startswith("_") else getattr(layer, name)
  array = value.get_value() if isinstance(value, nnx.Variable) else None
  if isinstance(array, jax.Array | jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
  if layer is None or name.startswith("_") or array is not None or inspect.ismethod(value):
    raise AttributeError(f"{type(wrapper).__name__!r} object has no attribute {name!r}")
  return value
