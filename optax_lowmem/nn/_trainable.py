"""Parameters of the base that are trained beside adapters: whole modules, and biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from optax_lowmem.nn._adapter import Adapter
from optax_lowmem.nn._base import bias_field, contraction_of, dense_variable, is_embed, is_linear
from optax_lowmem.nn._places import Place, base_of, listing, names_in_stack, nearest


class Tensor(NamedTuple):
  """A Variable of a layer, and what it is in PyTorch."""

  holder: Any
  field: str
  suffix: str  # "weight" or "bias"
  axes: int  # of one layer's array
  transposed: bool

  @property
  def variable(self) -> Any:
    return getattr(self.holder, self.field)

  @property
  def lead(self) -> tuple[int, ...]:
    shape = self.variable[...].shape
    return shape[: len(shape) - self.axes]

  def to_torch(self, value: Any) -> Any:
    return value.swapaxes(-1, -2) if self.transposed else value


def tensors_of(module: Any) -> list[Tensor] | None:
  """The Variables of one layer under PyTorch's names; None if it is of an unknown kind."""
  module = base_of(module)
  if is_embed(module):
    return [Tensor(module, "embedding", "weight", 2, False)]
  if is_linear(module):
    found = []
    if contraction_of(module) is not None:
      return found
    if dense_variable(module) is not None:
      found.append(Tensor(module, "kernel", "weight", 2, True))
    if module.bias is not None:
      found.append(Tensor(module, "bias", "bias", 1, False))
    return found
  if isinstance(module, (nnx.RMSNorm, nnx.LayerNorm)):
    fields = (("scale", "weight"), ("bias", "bias"))
    return [
      Tensor(module, field, suffix, 1, False)
      for field, suffix in fields
      if getattr(module, field, None) is not None
    ]
  return None


def train(holder: Any, field: str) -> None:
  """Makes a Variable one that an optimizer of `nnx.LoRAParam` trains."""
  old = getattr(holder, field)
  if not isinstance(old, nnx.LoRAParam):
    # Made anew, it would be placed by its annotation, for which there may be no mesh any more.
    setattr(holder, field, nnx.LoRAParam.from_metadata(old[...], old.get_metadata()))


def find_saved(everything: Sequence[Place], modules: Sequence[str]) -> list[Place]:
  """The modules whose path is, or ends in, one of the names."""
  found: dict[str, Place] = {}
  for name in modules:
    matched = [p for p in everything if p.path == name or p.path.endswith("." + name)]
    if not matched:
      paths = [p.path for p in everything]
      raise ValueError(
        f"`modules_to_save` {name!r} is no module of `model`.{nearest(name, paths)} "
        f"Available modules: {listing(paths)}."
      )
    found.update((p.path, p) for p in matched)
  return list(found.values())


def check_saved(places: Sequence[Place]) -> None:
  """Refuses modules to save that hold what cannot be trained."""
  for place in places:
    if isinstance(place.module, Adapter):
      raise ValueError(f"`{place.path}` of `modules_to_save` has an adapter already.")
    for path, module in nnx.iter_modules(place.module):
      if is_linear(module) and dense_variable(module) is None:
        inner = ".".join([place.path, *map(str, path)])
        raise ValueError(
          f"`{inner}` of `modules_to_save` is quantized, and only floating-point weights are "
          "trained. Name it in `quantize_model`'s `exclude`."
        )


def train_modules(places: Sequence[Place]) -> None:
  """Makes every `nnx.Param` in the modules trainable."""
  for place in places:
    for _, module in nnx.iter_modules(place.module):
      for field, value in list(vars(module).items()):
        if isinstance(value, nnx.Param):
          train(module, field)


def below(places: Sequence[Place], everything: Sequence[Place]) -> list[Place]:
  """The places, and all that lie under them."""
  roots = tuple(place.path for place in places)
  return [p for p in everything if any((p.path + ".").startswith(r + ".") for r in roots)]


def check_bias(bias: str) -> None:
  if bias not in ("none", "all", "lora_only"):
    raise ValueError(f"`bias` must be 'none', 'all' or 'lora_only', got {bias!r}.")


def train_biases(everything: Sequence[Place], bias: str) -> None:
  """Makes the biases of adapted layers, or all, trainable."""
  for place in everything:
    module = base_of(place.module)
    adapted = isinstance(place.module, Adapter)
    if bias == "none" or (bias == "lora_only" and not adapted):
      continue
    field = bias_field(module) if is_linear(module) else "bias"
    if isinstance(getattr(module, field, None), nnx.Param):
      train(module, field)


def trained_beside(everything: Sequence[Place], stack: str) -> dict[str, tuple[Tensor, list[str]]]:
  """{path.suffix: tensor and names} of every trained Variable that is no adapter's."""
  bases = {id(p.module.base) for p in everything if isinstance(p.module, Adapter)}
  found: dict[str, tuple[Tensor, list[str]]] = {}
  for place in everything:
    if id(place.module) in bases:
      continue
    module = base_of(place.module)
    held = [k for k, v in vars(module).items() if isinstance(v, nnx.LoRAParam)]
    tensors = {t.field: t for t in tensors_of(module) or []}
    for field in held:
      if field not in tensors:
        raise ValueError(
          f"`{place.path}.{field}` is trained, and what it is called in PEFT is not known: only "
          "nnx.Linear, nnx.Embed, nnx.RMSNorm and nnx.LayerNorm have a counterpart."
        )
      tensor = tensors[field]
      names = names_in_stack(place.path, tensor.lead, stack)
      if not names:
        raise ValueError(
          f"`{place.path}` is a stack of layers, and where its layer number belongs in PEFT's "
          f"name is not clear: the path must have one part {stack!r}. Name the part in `stack`."
        )
      found[f"{place.path}.{tensor.suffix}"] = (tensor, names)
  return found


def as_array(value: Any) -> jax.Array:
  return jax.numpy.asarray(value)
