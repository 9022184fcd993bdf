"""Parameters of the base that are trained beside adapters: whole modules, and biases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem._linear.names import listing, nearest
from optax_lowmem.nn._adapters.adapter import Adapter
from optax_lowmem.nn._layers.base_layer import (
  bias_field,
  contraction_of,
  dense_variable,
  is_linear,
  stack_shape,
  weight_field,
)
from optax_lowmem.nn._model.model_tree import ModelTree, Place, holders_of, put
from optax_lowmem.nn._proofs.flax_layers import is_embed

_KNOWN = "linear layers of one matrix, nnx.Embed, nnx.RMSNorm and nnx.LayerNorm"


def _same(value: Any) -> Any:
  return value


class Tensor(NamedTuple):
  """A Variable of a layer, and what it is in PyTorch.

  `to_torch` is of one layer or of a stack with its leading axes, and `from_torch` its inverse.
  """

  holder: Any
  field: str
  suffix: str  # "weight" or "bias"
  lead: tuple[int, ...]  # the leading axes of a stack
  to_torch: Callable[[Any], Any] = _same
  from_torch: Callable[[Any], Any] = _same

  @property
  def variable(self) -> Any:
    return getattr(self.holder, self.field)

  @property
  def torch_shape(self) -> tuple[int, ...]:
    """Of one layer."""
    old = self.variable[...]
    return jax.eval_shape(self.to_torch, old).shape[len(self.lead) :]


def tensors_of(module: Any) -> list[Tensor] | None:
  """The Variables of one layer under PyTorch's names; None if it is of an unknown kind."""
  module = module.base if isinstance(module, Adapter) else module
  if is_embed(module):
    return [Tensor(module, "embedding", "weight", stack_shape(module))]
  if is_linear(module):
    return _of_linear(module)
  if isinstance(module, (nnx.RMSNorm, nnx.LayerNorm)):
    fields = (("scale", "weight"), ("bias", "bias"))
    return [
      Tensor(module, field, suffix, getattr(module, field)[...].shape[:-1])
      for field, suffix in fields
      if getattr(module, field, None) is not None
    ]
  return None


def _of_linear(layer: Any) -> list[Tensor]:
  """Weight (out, in), unless it is packed, and bias (out,)."""
  lead, contraction = stack_shape(layer), contraction_of(layer)
  if len(contraction.matrix_shape) > 2:
    return []  # one matrix for each expert: PyTorch has no such linear layer
  found: list[Tensor] = []
  if dense_variable(layer) is not None:
    turns = (contraction.to_matrix, contraction.to_kernel)
    found.append(Tensor(layer, weight_field(layer), "weight", lead, *turns))
  field = bias_field(layer)
  bias = getattr(layer, field, None)
  if bias is None:
    return found
  own = bias[...].shape[len(lead) :]

  def to_vector(value: Any) -> Any:
    return contraction.bias_to_vector(value, value.ndim - len(own))

  def from_vector(value: Any) -> Any:
    return contraction.vector_to_bias(value).reshape(*value.shape[:-1], *own)

  return [*found, Tensor(layer, field, "bias", lead, to_vector, from_vector)]


def train(model: nnx.Module, holder: Any, field: str, dtype: Any = jnp.float32) -> None:
  """Makes a Variable one that an optimizer of `nnx.LoRAParam` trains, in `dtype` or a wider one.

  It takes the old one's place wherever the model refers to it: a table may be the head's, too.

  In bfloat16, a step of less than 1/512 of a weight leaves it as it is: at a learning rate of 1e-5,
  more than nine of ten. What a layer computes in stays what it was.
  """
  old = getattr(holder, field)
  value = old[...]
  wide = jnp.promote_types(value.dtype, dtype)
  if wide != value.dtype and hasattr(holder, "dtype"):
    value = value.astype(wide)
  if isinstance(old, nnx.LoRAParam) and value.dtype == old[...].dtype:
    return
  # Made anew, it would be placed by its annotation, for which there may be no mesh any more.
  new = nnx.LoRAParam.from_metadata(value, old.get_metadata())
  for place, key in holders_of(model, old):
    if value.dtype != old[...].dtype and getattr(place, "dtype", value.dtype) is None:
      place.dtype = old[...].dtype  # or it would compute in what its weight is held in
    put(place, key, new)


def find_saved(tree: ModelTree, modules: str | Sequence[str]) -> list[Place]:
  """The modules whose path is, or ends in, one of the names."""
  found: dict[str, Place] = {}
  for name in [modules] if isinstance(modules, str) else modules:
    if not isinstance(name, str):
      raise ValueError(f"`modules_to_save` must be a list of names, got {modules!r}.")
    matched = [p for p in tree.places if p.path == name or p.path.endswith("." + name)]
    if not matched:
      raise ValueError(
        f"`modules_to_save` {name!r} is no module of `model`.{nearest(name, tree.paths)} "
        f"Available modules: {listing(tree.paths)}."
      )
    found.update((p.path, p) for p in matched)
  return list(found.values())


def check_saved(tree: ModelTree, places: Sequence[Place]) -> None:
  """Refuses modules to save that hold what cannot be trained."""
  for place in places:
    if place.adapted:
      raise ValueError(f"`{place.path}` of `modules_to_save` has an adapter already.")
    for path, module in nnx.iter_modules(place.module):
      inner = ".".join([place.path, *map(str, path)])
      for field, value in vars(module).items():
        holders = holders_of(tree.model, value) if isinstance(value, nnx.Param) else []
        if any(isinstance(holder, tuple) for holder, _ in holders):
          raise ValueError(
            f"`{inner}.{field}` of `modules_to_save` is held in a tuple too, which cannot be "
            "changed in place. Hold it in an `nnx.List` instead."
          )
      if is_linear(module) and dense_variable(module) is None:
        raise ValueError(
          f"`{inner}` of `modules_to_save` is quantized, and only floating-point weights are "
          "trained. Name it in `quantize_model`'s `exclude`."
        )


def check_named(
  tree: ModelTree, saved: Sequence[Place], adapted: Sequence[Place], bias: str
) -> None:
  """Refuses to train what an adapter's file has no name for."""
  wanted: dict[tuple[str, str], Any] = {}
  for place in tree.below(saved):
    held = [k for k, v in vars(place.module).items() if isinstance(v, nnx.Param)]
    wanted.update(((place.path, field), place.module) for field in held)
  for place in {"none": [], "all": tree.places, "lora_only": adapted}[bias]:
    layer = place.base
    if (field := _trainable_bias(layer)) is not None:
      wanted[place.path, field] = layer
  for (path, field), layer in wanted.items():
    if field not in {tensor.field for tensor in tensors_of(layer) or []}:
      raise ValueError(
        f"`{path}.{field}` of a {type(layer).__name__} would be trained (`modules_to_save`, "
        f"`bias`), and what it is called in PEFT is not known: only {_KNOWN} have a counterpart. "
        "Name other modules, or choose `bias='lora_only'` or 'none'."
      )


def train_modules(model: nnx.Module, places: Sequence[Place], dtype: Any = jnp.float32) -> None:
  """Makes every `nnx.Param` in the modules trainable, held in `dtype` or a wider one."""
  for place in places:
    for _, module in nnx.iter_modules(place.module):
      for field, value in list(vars(module).items()):
        if isinstance(value, nnx.Param):
          train(model, module, field, dtype)


def check_bias(bias: str) -> None:
  if bias not in ("none", "all", "lora_only"):
    raise ValueError(f"`bias` must be 'none', 'all' or 'lora_only', got {bias!r}.")


def train_biases(tree: ModelTree, bias: str, dtype: Any = jnp.float32) -> None:
  """Makes the biases of adapted layers, or all, trainable."""
  for place in {"none": [], "all": tree.outer, "lora_only": tree.adapters}[bias]:
    if (field := _trainable_bias(place.base)) is not None:
      train(tree.model, place.base, field, dtype)


def _trainable_bias(layer: Any) -> str | None:
  field = bias_field(layer) if is_linear(layer) else "bias"
  return field if isinstance(getattr(layer, field, None), nnx.Param) else None


def trained_beside(tree: ModelTree) -> dict[str, tuple[Tensor, list[str]]]:
  """{path.suffix: tensor and names} of every trained Variable that is no adapter's."""
  found: dict[str, tuple[Tensor, list[str]]] = {}
  named: set[int] = set()  # a Variable that is another's, too, may have a name there
  unnamed: dict[str, Any] = {}
  for place in tree.outer:
    module = place.base
    tensors = {t.field: t for t in tensors_of(module) or []}
    for field, variable in vars(module).items():
      if not isinstance(variable, nnx.LoRAParam):
        continue
      if field not in tensors:
        unnamed[f"{place.path}.{field}"] = variable
        continue
      tensor = tensors[field]
      names = tree.torch_names(place, tensor.lead)
      found[f"{place.path}.{tensor.suffix}"] = (tensor, names)
      named.add(id(variable))
  for path, variable in unnamed.items():
    if id(variable) not in named:
      raise ValueError(
        f"`{path}` is trained, and what it is called in PEFT is not known: only {_KNOWN} have a "
        "counterpart."
      )
  return found
