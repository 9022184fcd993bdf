"""The linear layers of a model, found by tracing a call of it once."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from flax import nnx

from optax_lowmem._linear.contraction import Contraction
from optax_lowmem._linear.names import nearest, summary
from optax_lowmem.nn._layers.base_layer import contraction_of, is_known, stack_shape
from optax_lowmem.nn._model.checks import check_model
from optax_lowmem.nn._model.model_tree import ModelTree, Place
from optax_lowmem.nn._model.watched_calls import Calls, candidates, rank_of, watched_calls
from optax_lowmem.nn._proofs.flax_layers import is_embed
from optax_lowmem.nn._proofs.foreign_modules import Reading
from optax_lowmem.nn._proofs.reading import forget, read_called, remember


@dataclasses.dataclass(frozen=True)
class Layer:
  """A linear layer or an embedding of a model.

  Attributes:
    name: its dotted path.
    kind: the name of its class.
    stack: the leading axes that its weight has in the model, and not where it is called.
    contraction: how the axes of its weight make a matrix.
    inputs: the shapes and dtypes of the inputs that it was called with, each once.
  """

  name: str
  kind: str
  stack: tuple[int, ...]
  contraction: Contraction
  inputs: tuple[tuple[tuple[int, ...], Any], ...]

  @property
  def weight_shape(self) -> tuple[int, ...]:
    """The shape of the float layer's weight, with the axes of the stack."""
    return (*self.stack, *self.contraction.kernel_shape)

  @property
  def matrix_shape(self) -> tuple[int, ...]:
    """(out, in), or (batch, out, in), of one layer."""
    return self.contraction.matrix_shape


class Layers(NamedTuple):
  """What `find_layers` found.

  Attributes:
    layers: the linear layers and embeddings, in the order of the calls.
    others: (dotted path, why) of every other module that has a matrix and might have been one.
  """

  layers: tuple[Layer, ...]
  others: tuple[tuple[str, str], ...]

  def __repr__(self) -> str:
    """How many there are, and their names, numbers folded into a star."""
    return f"Layers({summary(self.names, self.others)})"

  @property
  def names(self) -> list[str]:
    """The dotted paths of the linear layers and embeddings."""
    return [layer.name for layer in self.layers]


def find_layers(
  model: nnx.Module, *args: Any, method: Callable[..., Any] | None = None, **kwargs: Any
) -> Layers:
  """Finds the linear layers and embeddings that a call of the model goes through.

  The model is traced once, abstractly, and nothing is computed or changed. Layers of flax are known
  by their class. A module of any other class is seen with the inputs that the model gives it, and
  from what it computes of them it is proved to be one product (see `QuantizedModule`); that, too,
  is how a stack of layers is told from a weight of one more axis. Without it, `add_lora` and
  `quantize_model` make up inputs from the shape of the weight.

  Args:
    model: any NNX module. It is not changed.
    *args: arguments of the call, arrays or `jax.ShapeDtypeStruct`.
    method: what is called with the model and the arguments; None is the model itself.
    **kwargs: keyword arguments of the call.

  Returns:
    `Layers`, for `add_lora` and `quantize_model`.

  Raises:
    TypeError: `model` is no module of NNX, or `method` one that is bound to a model.
    ValueError: `model` is a layer itself.

  >>> import jax, jax.numpy as jnp
  >>> from flax import nnx
  >>> from optax_lowmem import nn
  >>> model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
  >>> layers = nn.find_layers(model, jax.ShapeDtypeStruct((1, 3, 8), jnp.float32))
  >>> layers
  Layers(4 found: query, key, value, out; others: 0)
  >>> layers.layers[3].weight_shape, layers.layers[3].matrix_shape
  ((2, 4, 8), (8, 8))
  """
  check_model(model)
  if method is not None and (inspect.ismethod(method) or not callable(method)):
    raise TypeError(
      "`method` must be a function of the model and the arguments, such as "
      f"`{type(model).__name__}.__call__`, got {method!r:.200}."
    )
  calls = watched_calls(model, args, kwargs, method)
  places = {place.path: place for place in candidates(ModelTree(model))}
  found: list[Layer] = []
  others: list[tuple[str, str]] = []
  for path in (*calls, *(path for path in places if path not in calls)):
    layer = _layer(places[path], calls.get(path))
    if isinstance(layer, Layer):
      found.append(layer)
    else:
      others.append((path, f"{type(places[path].base).__name__}: {layer}"))
  return Layers(tuple(found), tuple(others))


def _layer(place: Place, calls: Calls | None) -> Layer | str:
  """A layer from its calls, or why it is none."""
  base = place.base
  if place.norm:
    return place.reason
  if calls is None and not place.replaceable:
    return "it is held in a tuple, in which it cannot be replaced"
  if calls is None:
    return read_called(base, 0, ()).reason or "the call does not come to it"
  if is_known(base) or is_embed(base):
    try:
      contraction, stack = contraction_of(base), stack_shape(base)
    except ValueError as error:
      return str(error)
  else:
    if calls.more:
      return f"it is called with more than an input: {', '.join(calls.more)}"
    if not calls.inputs:
      return "its input is no array"
    lead = rank_of(base) - calls.rank
    known = read_called(base, lead, tuple(calls.inputs))
    if known.foreign is None or known.contraction is None:
      return known.reason
    contraction = known.contraction
    stack = getattr(base, known.foreign.weight)[...].shape[:lead]
  return Layer(place.path, type(base).__name__, tuple(stack), contraction, tuple(calls.inputs))


@contextlib.contextmanager
def shown(model: nnx.Module, layers: Layers | None) -> Iterator[None]:
  """For its time, what was found takes the place of guesses; for good where adapters are put on."""
  if layers is None:
    yield
    return
  tree = ModelTree(model)
  known, reasons = _by_name(tree, layers), dict(layers.others)
  noted: list[Any] = []
  for place in candidates(tree):
    if place.adapted or is_known(place.module) or is_embed(place.module):
      continue
    if (layer := known.get(place.path)) is None:
      why = reasons.get(place.path, "").partition(": ")[2]
      reading = Reading(reason=why or "`layers` does not have it")
    else:
      reading = read_called(place.module, len(layer.stack), layer.inputs)
    remember(place.module, reading)
    noted.append(place.module)
  try:
    yield
  finally:
    kept = {id(place.base) for place in ModelTree(model).adapters}
    for module in noted:
      if id(module) not in kept:
        forget(module)


def _by_name(tree: ModelTree, layers: Any) -> dict[str, Layer]:
  if not isinstance(layers, Layers):
    raise TypeError(f"`layers` must be what `find_layers` returns, got {type(layers).__name__}.")
  shapes = {place.path: _weight_shape(place.base) for place in candidates(tree)}
  for layer in layers.layers:
    if shapes.get(layer.name) != layer.weight_shape:
      raise ValueError(
        f"`layers` has `{layer.name}` with a weight of shape {layer.weight_shape}, and `model` has "
        f"{shapes.get(layer.name, 'no such layer')}.{nearest(layer.name, list(shapes))} Call "
        "`find_layers` on this model."
      )
  return {layer.name: layer for layer in layers.layers}


def _weight_shape(base: Any) -> tuple[int, ...]:
  """Of a float layer, or of what a packed one was."""
  if is_known(base):
    return tuple(base.kernel.shape)
  return max((v.shape for v in vars(base).values() if isinstance(v, nnx.Variable)), key=len)
