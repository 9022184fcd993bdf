"""Adapters in the files of PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from optax_lowmem.nn._lora import LoRALinear
from optax_lowmem.nn._peft_files import (
  CONFIG,
  PREFIX,
  WEIGHTS,
  import_safetensors,
  read_config,
  read_tensors,
  write_adapter,
)
from optax_lowmem.nn._places import (
  Place,
  adaptable,
  check_replaceable,
  listing,
  nearest,
  places,
  replace,
)

M = TypeVar("M", bound=nnx.Module)


class _Entry(NamedTuple):
  """A place, and what its layers (one, or one for each index of the stack) are called in PEFT."""

  place: Place
  names: list[str]
  stacked: bool


def _entries(found: Sequence[Place], stack: str) -> list[_Entry]:
  entries = []
  for place in found:
    module = place.module.base if isinstance(place.module, LoRALinear) else place.module
    shape = (
      module.kernel[...].shape
      if isinstance(module, nnx.Linear)
      else module.weight.get_value().shape
    )
    parts = place.path.split(".")
    if len(shape) == 2:
      entries.append(_Entry(place, [place.path], False))
    elif len(shape) == 3 and parts.count(stack) == 1:
      at = parts.index(stack) + 1
      names = [".".join([*parts[:at], str(i), *parts[at:]]) for i in range(shape[0])]
      entries.append(_Entry(place, names, True))
    else:
      entries.append(_Entry(place, [], True))
  return entries


def _nameable(entry: _Entry, stack: str) -> None:
  if not entry.names:
    raise ValueError(
      f"`{entry.place.path}` is a stack of layers, and where its layer number belongs in "
      f"PEFT's name is not clear: the path must have one part {stack!r} and the weight one "
      "leading axis. Name the part in `stack`."
    )


def _target_modules(adapted: Sequence[_Entry], everything: Sequence[_Entry]) -> list[str]:
  """The shortest `target_modules` with which PEFT adapts these layers and no others."""
  names = [name for entry in adapted for name in entry.names]
  lasts = {name.rpartition(".")[2] for name in names}
  same = {n for entry in everything for n in entry.names if n.rpartition(".")[2] in lasts}
  return sorted(lasts if same == set(names) else names)


def save_peft(
  model: nnx.Module,
  dir: str | os.PathLike[str],
  *,
  base_model: str | None = None,
  task_type: str = "CAUSAL_LM",
  stack: str = "layers",
  overwrite: bool = False,
) -> pathlib.Path:
  """Writes the adapters of a model as PEFT writes them.

  `PeftModel.from_pretrained(base, dir)` loads the result, if module paths here are those of the
  PyTorch model. A stacked module `model.layers.self_attn.q_proj` is written as
  `model.layers.{i}.self_attn.q_proj`, one for each layer.

  Args:
    model: a module with `LoRALinear` layers in it, all of one rank, alpha and dropout.
    dir: the directory to write to; it is made if needed.
    base_model: name or path of the base model, for the configuration.
    task_type: PEFT's task type, for the configuration.
    stack: the part of a stacked module's path after which the layer number belongs.
    overwrite: replace an adapter that is in `dir` already.

  Returns:
    `dir` as a `pathlib.Path`.

  Raises:
    FileExistsError: there is an adapter in `dir`, and `overwrite` is False.
    ValueError: `model` has no adapter, or adapters of different settings, or a stack whose
      layers cannot be named.
    ImportError: the package safetensors is not installed.

  >>> import pathlib, tempfile
  >>> from flax import nnx
  >>> from optax_lowmem import nn
  >>> model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
  >>> model = nn.add_lora(model, rank=2, alpha=4, targets=".*", rngs=nnx.Rngs(1))
  >>> with tempfile.TemporaryDirectory() as folder:
  ...     sorted(path.name for path in nn.save_peft(model, folder).iterdir())
  ['adapter_config.json', 'adapter_model.safetensors']

  References:
    https://huggingface.co/docs/peft/developer_guides/checkpoint
  """
  import_safetensors()  # before any work, if it is missing
  dir = pathlib.Path(dir)
  if not overwrite:
    there = [name for name in (CONFIG, WEIGHTS) if (dir / name).exists()]
    if there:
      raise FileExistsError(
        f"`dir` {str(dir)!r} holds an adapter already ({', '.join(there)}). "
        "Choose another directory, or pass `overwrite=True`."
      )
  everything = _entries(adaptable(places(model)), stack)
  adapted = [entry for entry in everything if isinstance(entry.place.module, LoRALinear)]
  if not adapted:
    raise ValueError("`model` holds no LoRALinear, there is no adapter to save.")
  tensors: dict[str, np.ndarray] = {}
  settings: dict[tuple[Any, ...], str] = {}
  for entry in adapted:
    _nameable(entry, stack)
    lora: Any = entry.place.module
    rate = 0.0 if lora.dropout is None else lora.dropout.rate
    settings.setdefault((lora.rank, lora.alpha, lora.use_rslora, rate), entry.place.path)
    for part, value in (("A", lora.lora_a[...]), ("B", lora.lora_b[...])):
      value = np.swapaxes(np.asarray(value, np.float32), -1, -2)  # PEFT: (r, in), (out, r)
      for name, one in zip(entry.names, value if entry.stacked else value[None], strict=True):
        tensors[f"{PREFIX}{name}.lora_{part}.weight"] = np.ascontiguousarray(one)
  if len(settings) > 1:
    raise ValueError(
      "`model` has adapters of different (rank, alpha, use_rslora, dropout): "
      + ", ".join(f"{value} at `{path}`" for value, path in settings.items())
      + ". One adapter file holds one of each."
    )
  ((rank, alpha, use_rslora, rate),) = settings
  config = {
    "peft_type": "LORA",
    "task_type": task_type,
    "base_model_name_or_path": base_model,
    "r": rank,
    "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
    "lora_dropout": rate,
    "target_modules": _target_modules(adapted, everything),
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "use_rslora": use_rslora,
  }
  write_adapter(dir, config, tensors)
  return dir


def _expects(config: dict[str, Any], name: str) -> bool:
  """Whether PEFT, following `target_modules`, put an adapter on the layer of this name."""
  targets = config.get("target_modules")
  if not targets or config.get("layers_to_transform") or config.get("exclude_modules"):
    return False
  if isinstance(targets, str):
    return targets != "all-linear" and re.fullmatch(targets, name) is not None
  return any(name == target or name.endswith("." + target) for target in targets)


def load_peft(
  model: M, dir: str | os.PathLike[str], *, stack: str = "layers", rngs: nnx.Rngs | None = None
) -> M:
  """Loads an adapter that PEFT or `save_peft` wrote, in place.

  Layers without an adapter get a `LoRALinear`; layers with one get its values replaced, and must
  agree with it in rank and scale. Everything is read and checked first: a file that does not fit
  leaves the model as it was.

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
    ValueError: the adapter is more than plain LoRA or rsLoRA on linear layers (DoRA, embeddings,
      `modules_to_save`, patterns of ranks), or does not fit `model`: unknown or missing layers,
      other shapes, another rank or scale.
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
  modules = read_tensors(dir / WEIGHTS)
  rank, alpha = config["r"], config["lora_alpha"]
  dropout = float(config.get("lora_dropout") or 0.0) if rngs is not None else 0.0
  entries = _entries(adaptable(places(model)), stack)
  known = [name for entry in entries for name in entry.names]
  unknown = [name for name in modules if name not in set(known)]
  if unknown:
    raise ValueError(
      f"the adapter in {str(dir)!r} is for `{unknown[0]}`, which `model` does not have."
      f"{nearest(unknown[0], known)} Available modules: {listing(known)}."
    )
  ready: list[tuple[Place, LoRALinear, np.ndarray, np.ndarray]] = []
  for entry in entries:
    missing = [name for name in entry.names if name not in modules]
    adapted = isinstance(entry.place.module, LoRALinear)
    if len(missing) == len(entry.names) and not adapted:
      if not any(_expects(config, name) for name in missing):
        continue
    if missing or not entry.names:
      raise ValueError(
        f"the adapter in {str(dir)!r} lacks `{missing[0] if missing else entry.place.path}`"
        ". It must have every layer that its `target_modules` names, every layer of a "
        "stack, and every layer that has an adapter in `model`."
      )
    lora: Any = entry.place.module
    if not adapted:
      lora = LoRALinear(
                lora, rank, alpha, dropout=dropout, use_rslora=bool(config.get("use_rslora")),
                rngs=rngs or nnx.Rngs(0),
            )  # fmt: skip
    values = []
    for part, variable in (("A", lora.lora_a), ("B", lora.lora_b)):
      want = variable[...].shape[-2:][::-1]
      for name in entry.names:
        got = modules[name][part].shape
        if got != want:
          raise ValueError(
            f"the adapter in {str(dir)!r} has lora_{part} of shape {got} for `{name}`, "
            f"where rank {lora.rank} and the layer of `model` need {want}."
          )
      stacked = np.stack([modules[name][part].T for name in entry.names])
      values.append(stacked if entry.stacked else stacked[0])
    ready.append((entry.place, lora, *values))
  for place, lora, _, _ in ready:
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    if abs(lora.scale - scale) > 1e-6 * scale:
      raise ValueError(
        f"the adapter in {str(dir)!r} has scale {scale:g}, the one at `{place.path}` "
        f"{lora.scale:g}. Give `model` the same alpha, rank and use_rslora."
      )
  check_replaceable([place for place, lora, _, _ in ready if lora is not place.module])
  for place, lora, a, b in ready:
    lora.lora_a[...], lora.lora_b[...] = jnp.asarray(a), jnp.asarray(b)
    if lora is not place.module:
      replace(place, lora)
  return model
