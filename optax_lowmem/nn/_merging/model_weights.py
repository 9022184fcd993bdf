"""The weights of a model under PyTorch's names, decoded one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optax_lowmem._peft.tensor_files import Weights
from optax_lowmem.nn._layers.base_layer import dense_variable, is_linear, matrix_shape, stack_shape
from optax_lowmem.nn._model.model_tree import ModelTree, Place
from optax_lowmem.nn._model.trainable import tensors_of
from optax_lowmem.nn._peft.save import check_matrix

# Variables that are no weights.
_NO_WEIGHTS = (nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation)


class _Entry(NamedTuple):
  """A tensor of one layer, or of each layer of a stack, in PyTorch's arrangement."""

  suffix: str
  variable: Any
  lead: tuple[int, ...]
  shape: tuple[int, ...]  # of one layer
  dtype: Any
  convert: Callable[[Any], Any]  # of one layer's value


def model_weights(tree: ModelTree) -> Weights:
  """Every weight of a model, as it is without adapters; packed ones as float32.

  Raises:
    ValueError: the model has a Variable, or a stack of layers, whose name is not known.
  """
  shapes, dtypes, reads = {}, {}, {}
  known: set[int] = set()
  plain: set[int] = set()  # of layers without an adapter
  for place in tree.outer:
    if place.adapted:
      known |= {id(v) for v in vars(place.module).values() if isinstance(v, nnx.Variable)}
    for entry in _entries(place):
      known.add(id(entry.variable))
      if not place.adapted:
        if id(entry.variable) in plain:  # tied: Hugging Face writes it once, too
          continue
        plain.add(id(entry.variable))
      for i, name in enumerate(tree.torch_names(place, entry.lead)):
        full = f"{name}.{entry.suffix}"
        shapes[full], dtypes[full] = entry.shape, np.dtype(entry.dtype)
        reads[full] = (entry, i if entry.lead else None)
  for path, variable in nnx.iter_graph(tree.model):
    if isinstance(variable, nnx.Variable) and not isinstance(variable, _NO_WEIGHTS):
      if id(variable) not in known:
        raise ValueError(
          f"`{'.'.join(map(str, path))}` is of type {type(variable).__name__}, and its name in a "
          "file is not known: only linear layers, nnx.Embed, nnx.RMSNorm and nnx.LayerNorm have a "
          "counterpart. Pass the weights before training as `original`; those are copied."
        )

  def read(name: str) -> np.ndarray:
    entry, i = reads[name]
    value = entry.variable.get_value()
    if i is not None:
      value = jax.tree.map(lambda leaf: leaf[i], value)
    return np.asarray(entry.convert(value))

  return Weights(shapes, dtypes, {}, read)


def _decoded(weight: Any) -> jax.Array:
  return weight.dequantize(jnp.float32)  # its own dtype may be coarser than its codes


def _entries(place: Place) -> Iterator[_Entry]:
  base = place.base
  if is_linear(base):
    check_matrix(place)
    if dense_variable(base) is None:
      lead = stack_shape(base)
      shape = matrix_shape(base)[len(lead) :]
      yield _Entry("weight", base.weight, lead, shape, jnp.float32, _decoded)
  for t in tensors_of(base) or []:
    dtype = t.variable[...].dtype
    yield _Entry(t.suffix, t.variable, t.lead, t.torch_shape, dtype, t.to_torch)
