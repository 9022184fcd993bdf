"""Adapters, read from the files of PEFT."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from optax_lowmem.nn._adapters.adapter import Adapter
from optax_lowmem.nn._adapters.lora_scale import scale_of
from optax_lowmem.nn._layers.base_layer import is_embed, matrix_shape, stack_shape
from optax_lowmem.nn._model.places import (
  Place,
  adaptable,
  base_of,
  check_replaceable,
  layer_names,
  listing,
  nearest,
  places,
  replace,
)
from optax_lowmem.nn._model.surgery import adapter
from optax_lowmem.nn._model.targets import Target, pattern_value
from optax_lowmem.nn._model.trainable import below, check_saved, train_biases, train_modules
from optax_lowmem.nn._peft.config_targets import (
  check_patterns_of,
  check_tying,
  expected,
  plain_tensors,
  saved_modules,
  saved_names,
  tied_once,
)
from optax_lowmem.nn._peft.files import CONFIG, WEIGHTS, AdapterFile, read_config, read_tensors
from optax_lowmem.nn._peft.save import check_matrix

M = TypeVar("M", bound=nnx.Module)


def load_peft(
  model: M, dir: str | os.PathLike[str], *, stack: str = "layers", rngs: nnx.Rngs | None = None
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
    stack: the part of a stacked module's path after which the layer number belongs.
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
  dir = pathlib.Path(dir)
  config = read_config(dir / CONFIG)
  file = tied_once(str(dir), config, read_tensors(dir / WEIGHTS))
  everything = places(model)
  saved = saved_modules(everything, saved_names(config), file, stack)
  check_saved(saved)
  skip = {id(place.module) for place in below(saved, everything)}
  layers = [place for place in adaptable(everything) if id(place.module) not in skip]
  known = [name for place in layers for name in layer_names(place, stack)]
  have = set(known)
  unknown = [name for name in file.layers if name not in have]
  if unknown:
    raise ValueError(
      f"the adapter in {str(dir)!r} is for `{unknown[0]}`, which `model` does not have."
      f"{nearest(unknown[0], known)} Available modules: {listing(known)}."
    )
  check_tying(model, config, saved, file)
  check_patterns_of(str(dir / CONFIG), config, known)
  expects = expected(config, everything, stack)
  plan = _Plan(str(dir), config, file, stack, rngs)
  ready = [r for place in layers if (r := plan.layer(place, expects)) is not None]
  tensors = plain_tensors(everything, saved, config, file, stack, str(dir))
  check_replaceable([place for place, lora, _ in ready if lora is not place.module])
  for place, lora, values in ready:
    for variable, value in values:
      variable[...] = jnp.asarray(value, variable[...].dtype)
    if lora is not place.module:
      replace(place, lora)
  train_modules(saved)
  train_biases(places(model), config.get("bias", "none"))
  for tensor, value in tensors:
    old = tensor.variable
    setattr(tensor.holder, tensor.field, type(old)(jnp.asarray(value), **old.get_metadata()))
  return model


class _Plan:
  """What is to be put where, checked before anything is."""

  def __init__(self, dir: str, config: dict[str, Any], file: AdapterFile, stack: str, rngs: Any):
    self.dir, self.config, self.file, self.stack, self.rngs = dir, config, file, stack, rngs

  def setting(self, what: str, default: Any, name: str) -> Any:
    return pattern_value(self.config.get(what) or {}, name, default)

  def layer(self, place: Place, expects: Callable[[str], bool]) -> Any:
    """The place, its adapter, and the values of the adapter's Variables; None if it has none."""
    modules, names = self.file.layers, layer_names(place, self.stack)
    adapted = isinstance(place.module, Adapter)
    missing = [name for name in names if name not in modules]
    if len(missing) == len(names) and not adapted and not any(map(expects, missing)):
      return None
    lacks = [n for n in missing if expects(n) or len(missing) == len(names)]
    if lacks or not names:
      raise ValueError(
        f"the adapter in {self.dir!r} lacks `{lacks[0] if lacks else place.path}`"
        ". It must have every layer that its `target_modules` names, and every layer that has an "
        "adapter in `model`."
      )
    check_matrix(place)
    there = [name in modules for name in names]
    ranks = tuple(
      int(self.setting("rank_pattern", self.config["r"], n)) if have else 0
      for n, have in zip(names, there, strict=True)
    )
    alphas = tuple(self.setting("alpha_pattern", self.config["lora_alpha"], n) for n in names)
    self.check_shapes(place, names, ranks)  # before an adapter of that rank is made
    lora = place.module if adapted else self.new(place, names, ranks, alphas)
    if adapted:
      self.check_settings(place, names, ranks, alphas)
    return place, lora, self.values(lora, names, ranks)

  def new(self, place: Place, names: Sequence[str], ranks: Any, alphas: Any) -> Any:
    # A tuple only where layers differ, as `add_lora` gives it.
    same = len(set(ranks)) == 1 and len(set(alphas)) == 1
    dropout = float(self.config.get("lora_dropout") or 0.0) if self.rngs is not None else 0.0
    target = Target(place, ranks[0] if same else ranks, alphas[0] if same else alphas)
    return adapter(
      target,
      dropout=dropout,
      use_rslora=bool(self.config.get("use_rslora")),
      use_dora=bool(self.config.get("use_dora")),
      lora_bias=bool(self.config.get("lora_bias")),
      init="default",
      rngs=self.rngs or nnx.Rngs(0),
    )

  def check_shapes(self, place: Place, names: Sequence[str], ranks: Any) -> None:
    base = base_of(place.module)
    out, inputs = matrix_shape(base)[len(stack_shape(base)) :]
    for name, rank in zip(names, ranks, strict=True):
      if not rank:
        continue
      want = {"A": (rank, inputs), "B": (out, rank)}
      want |= {"magnitude": (out,)} if self.config.get("use_dora") else {}
      want |= {"bias": (out,)} if self.config.get("lora_bias") and not is_embed(base) else {}
      parts = self.file.layers[name]
      if parts.keys() != want.keys():
        wrong = sorted(parts.keys() ^ want.keys())
        raise ValueError(
          f"the adapter in {self.dir!r} {'lacks' if wrong[0] in want else 'holds'} the {wrong[0]} "
          f"of `{name}`, and its configuration says otherwise."
        )
      for part, shape in want.items():
        if parts[part].shape != shape:
          raise ValueError(
            f"the adapter in {self.dir!r} has lora_{part} of shape {parts[part].shape} for "
            f"`{name}`, where rank {rank} and the layer of `model` need shape {shape}."
          )

  def check_settings(self, place: Place, names: Sequence[str], ranks: Any, alphas: Any) -> None:
    lora: Any = place.module
    count = len(names)
    if (lora.ranks or (lora.rank,) * count) != ranks:
      raise ValueError(
        f"the adapter in {self.dir!r} has rank {ranks[0]} and so A and B of another shape than "
        f"the one at `{place.path}`, which has rank {lora.ranks or lora.rank}."
      )
    root = bool(self.config.get("use_rslora"))
    scales = [scale_of(r, a, root) for r, a in zip(ranks, alphas, strict=True)]
    for have, want in zip(lora.layer_scales(count), scales, strict=True):
      if abs(have - want) > 1e-6 * want:
        raise ValueError(
          f"the adapter in {self.dir!r} has scale {want:g}, the one at `{place.path}` "
          f"{have:g}. Give `model` the same alpha, rank and use_rslora."
        )
    kinds = {"use_dora": lora.use_dora, "lora_bias": getattr(lora, "lora_bias", None) is not None}
    for key, have in kinds.items():
      if have != bool(self.config.get(key)) and not (key == "lora_bias" and is_embed(lora.base)):
        raise ValueError(
          f"the adapter in {self.dir!r} has {key}={not have}, the one at `{place.path}` {have}."
        )
    if lora.start_a is not None:
      raise ValueError(
        f"the base of `{place.path}` was changed when its adapter was made (`init`), and the one "
        f"in {self.dir!r} is for an unchanged base. Load it into a new model."
      )

  def values(self, lora: Any, names: Sequence[str], ranks: Any) -> list[tuple[Any, np.ndarray]]:
    """Each Variable of the adapter, and its value."""
    stacked = bool(stack_shape(lora.base))
    parts = {"A": lora.lora_a, "B": lora.lora_b, "magnitude": lora.magnitude}
    parts["bias"] = getattr(lora, "lora_bias", None)
    found = []
    for part, variable in parts.items():
      if variable is None:
        continue
      # Layers without an adapter keep the magnitude they have, which they do not use.
      value = (
        np.array(variable[...]) if part == "magnitude" else np.zeros(variable[...].shape, "f4")
      )
      every = value if stacked else value[None]
      for i, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        if not rank:
          continue
        one = self.file.layers[name][part]
        if part == "A":
          every[i, :, :rank] = one.T
        elif part == "B":
          every[i, :rank] = one.T
        else:
          every[i] = one.reshape(every[i].shape)
      found.append((variable, value))
    return found
