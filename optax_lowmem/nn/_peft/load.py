"""Adapters, read from the files of PEFT."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from optax_lowmem._linear.names import listing, nearest
from optax_lowmem._peft.adapter_file import AdapterFile, read_adapter
from optax_lowmem._variants.variant import Variant
from optax_lowmem.nn._adapters.variants import VARIANTS
from optax_lowmem.nn._layers.base_layer import matrix_shape, stack_shape
from optax_lowmem.nn._model.found_layers import Layers, shown
from optax_lowmem.nn._model.model_tree import ModelTree, Place, check_replaceable, holders_of, put
from optax_lowmem.nn._model.surgery import adapter
from optax_lowmem.nn._model.targets import Target
from optax_lowmem.nn._model.trainable import check_saved, train_biases, train_modules
from optax_lowmem.nn._peft.config_targets import (
  check_tying,
  expected,
  plain_tensors,
  saved_modules,
  tied_once,
)
from optax_lowmem.nn._peft.save import check_matrix
from optax_lowmem.nn._proofs.flax_layers import is_embed

M = TypeVar("M", bound=nnx.Module)


def load_peft(
  model: M,
  dir: str | os.PathLike[str],
  *,
  variant: Variant | None = None,
  stack: str = "layers",
  layers: Layers | None = None,
  rngs: nnx.Rngs | None = None,
) -> M:
  """Loads an adapter that PEFT or `save_peft` wrote, in place.

  Layers without an adapter get a `LoRALinear` or `LoRAEmbed`; layers with one get its values
  replaced, and must agree with it in rank, scale and kind. Where only some layers of a stack have
  an adapter, or of another rank, the others are filled up with zeros, which training leaves zero.
  Modules saved whole, and biases, become `nnx.LoRAParam` too. Everything is read and
  checked first: a file that does not fit leaves the model as it was.

  Args:
    model: a module whose paths are those of the PyTorch model, stacked or not.
    dir: the directory of `adapter_config.json` and `adapter_model.safetensors`.
    variant: the kind of adapter, if it is one of your own (see `Variant`). None is LoRA or DoRA, as
      the configuration says.
    stack: the part of a stacked module's path after which the layer number belongs.
    layers: as in `quantize_model`.
    rngs: with it, new `LoRALinear` layers get the adapter's dropout, to go on training; without
      it they have none.

  Returns:
    `model`.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the adapter is of a kind that is not supported (its configuration sets a key that
      is not known here), or does not fit `model`: unknown or missing layers, other shapes,
      another rank or scale.
    ImportError: the package safetensors is not installed.

  >>> import tempfile
  >>> from flax import nnx
  >>> from optax_lowmem import nn
  >>> def make():
  ...     return nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
  >>> model = nn.add_lora(make(), rank=2, alpha=4, targets=".*", rngs=nnx.Rngs(1))
  >>> with tempfile.TemporaryDirectory() as folder:
  ...     other = nn.load_peft(make(), nn.save_peft(model, folder))
  >>> bool((other.layers[0].lora_a[...] == model.layers[0].lora_a[...]).all())
  True

  References:
    https://huggingface.co/docs/peft/developer_guides/checkpoint
  """
  with shown(model, layers):
    return _load(model, tied_once(read_adapter(dir, variant or VARIANTS)), stack, rngs)


def _load(model: M, file: AdapterFile, stack: str, rngs: nnx.Rngs | None) -> M:
  tree = ModelTree(model, stack)
  saved = saved_modules(tree, file)
  check_saved(tree, saved)
  skip = {id(place.module) for place in tree.below(saved)}
  layers = [place for place in tree.layers() if id(place.module) not in skip]
  known = [name for place in layers for name in tree.names(place)]
  have = set(known)
  unknown = [name for name in file.layers if name not in have]
  if unknown:
    raise ValueError(
      f"the adapter in {file.dir!r} is for `{unknown[0]}`, which `model` does not have."
      f"{nearest(unknown[0], known)} Available modules: {listing(known)}."
    )
  check_tying(model, saved, file)
  file.check_patterns(known)
  expects, plan = expected(file, tree), _Plan(file, tree, rngs)
  ready = [r for place in layers if (r := plan.layer(place, expects)) is not None]
  tensors = plain_tensors(tree, saved, file)
  check_replaceable([place for place, lora, _ in ready if lora is not place.module])
  for place, lora, values in ready:
    for variable, value in values:
      variable[...] = jnp.asarray(value, variable[...].dtype)
    if lora is not place.module:
      place.replace(lora)
  train_modules(model, saved)
  train_biases(ModelTree(model), file.config.get("bias", "none"))
  for tensor, value in tensors:
    old = tensor.variable
    new = type(old)(jnp.asarray(value), **old.get_metadata())
    for holder, key in holders_of(model, old):
      put(holder, key, new)
  return model


class _Plan(NamedTuple):
  """What is to be put where, checked before anything is."""

  file: AdapterFile
  tree: ModelTree
  rngs: nnx.Rngs | None

  def layer(self, place: Place, expects: Callable[[str], bool]) -> Any:
    """The place, its adapter, and the values of the adapter's Variables; None if it has none."""
    file, names = self.file, self.tree.names(place)
    missing = [name for name in names if name not in file.layers]
    if len(missing) == len(names) and not place.adapted and not any(map(expects, missing)):
      return None
    lacks = [n for n in missing if expects(n) or len(missing) == len(names)]
    if lacks or not names:
      raise ValueError(
        f"the adapter in {file.dir!r} lacks `{lacks[0] if lacks else place.path}`"
        ". It must have every layer that its `target_modules` names, and every layer that has an "
        "adapter in `model`."
      )
    check_matrix(place)
    base = place.base
    *_, out, inputs = matrix_shape(base)
    for name in names:
      if name not in missing:  # before an adapter of that rank is made
        file.check_shapes(name, {"in": inputs, "out": out}, is_embed(base))
    ranks = tuple(0 if name in missing else file.rank(name) for name in names)
    lora = place.module
    if place.adapted:
      self.check_settings(place, names, ranks)
    else:
      alphas = tuple(map(file.alpha, names))
      # A tuple only where layers differ, as `add_lora` gives it.
      same = len(set(ranks)) == 1 and len(set(alphas)) == 1
      dropout = float(file.config.get("lora_dropout") or 0.0) if self.rngs is not None else 0.0
      lora = adapter(
        Target(place, ranks[0] if same else ranks, alphas[0] if same else alphas),
        dropout=dropout,
        use_rslora=bool(file.config.get("use_rslora")),
        variant=file.variant,
        init="default",
        rngs=self.rngs or nnx.Rngs(0),
      )
    return place, lora, self.values(lora, names, ranks)

  def check_settings(self, place: Place, names: Sequence[str], ranks: Any) -> None:
    """Refuses a file that does not agree with the adapter that is there."""
    file, lora = self.file, place.module
    if (lora.ranks or (lora.rank,) * len(names)) != ranks:
      raise ValueError(
        f"the adapter in {file.dir!r} has rank {ranks[0]} and so parts of another shape than "
        f"the one at `{place.path}`, which has rank {lora.ranks or lora.rank}."
      )
    for name, rank, have in zip(names, ranks, lora.layer_scales(len(names)), strict=True):
      if rank:
        file.check_scale(name, have, "model")
    have, want = ((type(v), v.parts(lora.is_embed)) for v in (lora.variant, file.variant))
    if have != want:
      raise ValueError(
        f"the adapter in {file.dir!r} is {file.variant!r}, the one at `{place.path}` "
        f"{lora.variant!r}."
      )
    if lora.variant.room(lora):
      raise ValueError(
        f"the base of `{place.path}` was changed when its adapter was made (`init`), and the one "
        f"in {file.dir!r} is for an unchanged base. Load it into a new model."
      )

  def values(self, lora: Any, names: Sequence[str], ranks: Any) -> list[tuple[Any, np.ndarray]]:
    """Each Variable of the adapter, and its value: zero beyond a layer's rank.

    What has no axis of the rank (a magnitude), layers without an adapter keep, and do not use.
    Nothing else is read of the model: within `jax.jit` its values are not there.
    """
    found = []
    for part in lora.parts:
      variable = getattr(lora, part.name)
      kept = "rank" not in part.axes and not all(ranks)
      value = np.array(variable[...]) if kept else np.zeros(variable[...].shape, "f4")
      every = value if stack_shape(lora.base) else value[None]
      for i, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        if rank:
          one = every[i][part.within(rank)]
          one[...] = self.file.layers[name][part.name].reshape(one.shape)
      found.append((variable, value))
    return found
