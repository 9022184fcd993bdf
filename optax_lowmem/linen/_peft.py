"""Adapters of Linen models in the files of PEFT."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from optax_lowmem._linear.names import listing, names_in_stack, nearest, torch_names
from optax_lowmem._peft.adapter_file import AdapterFile, read_adapter
from optax_lowmem._peft.config import configuration
from optax_lowmem._peft.files import PREFIX, check_writable, write_adapter
from optax_lowmem.linen._layers import Layer
from optax_lowmem.linen._lora import LoRA


def save_peft(
  lora: LoRA,
  adapters: Any,
  dir: str | os.PathLike[str],
  *,
  base_model: str | None = None,
  task_type: str = "CAUSAL_LM",
  stack: str = "layers",
  overwrite: bool = False,
) -> pathlib.Path:
  """Writes adapters as PEFT writes them.

  `PeftModel.from_pretrained(base, dir)` and `optax_lowmem.nn.load_peft` load the result, if the
  paths of the Linen model are those of theirs; a stacked `layers.q_proj` is written as
  `layers.{i}.q_proj`, one for each layer.

  Args:
    lora: the model that the adapters are of.
    adapters: as from `lora.init`.
    dir: the directory to write to; it is made if needed.
    base_model: name or path of the base model, for the configuration.
    task_type: PEFT's task type, for the configuration.
    stack: the part of a stacked layer's path after which the layer number belongs.
    overwrite: replace an adapter that is in `dir` already.

  Returns:
    `dir` as a `pathlib.Path`.

  Raises:
    FileExistsError: there is an adapter in `dir`, and `overwrite` is False.
    ValueError: `adapters` are not those of `lora`, or a layer has no one matrix or no clear name in
      PyTorch.
    ImportError: the package safetensors is not installed.

  >>> import jax, jax.numpy as jnp, tempfile
  >>> from flax import linen as flax_linen
  >>> from optax_lowmem import linen
  >>> model, x = flax_linen.Sequential([flax_linen.Dense(4)]), jnp.ones((3, 8))
  >>> layers = linen.find_layers(model, model.init(jax.random.key(0), x), x)
  >>> lora = linen.LoRA(model, layers, rank=2, alpha=4)
  >>> adapters = lora.init(jax.random.key(1))
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   back = linen.load_peft(lora, linen.save_peft(lora, adapters, folder))
  >>> bool((back["layers_0"]["lora_a"] == adapters["layers_0"]["lora_a"]).all())
  True

  References:
    https://huggingface.co/docs/peft/developer_guides/checkpoint
  """
  dir = check_writable(dir, overwrite)
  flat = lora.checked(adapters)
  tensors: dict[str, np.ndarray] = {}
  ranks: dict[str, int] = {}
  alphas: dict[str, float] = {}
  for target in lora.chosen:
    names = _names(target.layer, stack)
    values = target.of(flat)
    for i, name in enumerate(names):
      for part in target.parts:
        value = np.asarray(values[part.name])
        one = value[i] if target.layer.stack else value
        tensors[f"{PREFIX}{name}.{part.peft}"] = np.ascontiguousarray(one.T)
    ranks |= dict.fromkeys(names, target.rank)
    alphas |= dict.fromkeys(names, target.alpha)
  every = [
    name
    for layer in lora.layers.layers
    for name in names_in_stack(layer.name, layer.stack, stack) or [layer.name]
  ]
  config = configuration(
    ranks,
    alphas,
    every,
    base_model=base_model,
    task_type=task_type,
    dropout=lora.dropout,
    use_rslora=lora.use_rslora,
    variant=lora.variant,
  )
  write_adapter(dir, config, tensors)
  return dir


def load_peft(lora: LoRA, dir: str | os.PathLike[str], *, stack: str = "layers") -> dict[str, Any]:
  """Reads the adapters that PEFT or a `save_peft` wrote.

  The base weights that both put beside the adapters of embeddings and heads are not read: the
  parameters of the model are not in `lora`. Pass those that the adapter was trained on.

  Args:
    lora: the model that the adapters are for, with the targets, ranks and scales of the file.
    dir: the directory of `adapter_config.json` and `adapter_model.safetensors`.
    stack: the part of a stacked layer's path after which the layer number belongs.

  Returns:
    The adapters, as from `lora.init`.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the file holds what is not supported (DoRA, biases, modules saved whole), or does
      not fit `lora`: other layers, shapes, ranks or scales.
    ImportError: the package safetensors is not installed.
  """
  file = read_adapter(dir, lora.variant)
  file.check_patterns(list(file.layers))
  names = [name for target in lora.chosen for name in _names(target.layer, stack)]
  for name in file.layers:
    if name not in names:
      raise ValueError(
        f"the adapter in {file.dir!r} holds `{name}`, which has no adapter in `lora`."
        f"{nearest(name, names)} Adapted layers: {listing(names)}."
      )
  _check_plain(lora, file, stack)
  flat: dict[tuple[str, ...], Any] = {}
  for target in lora.chosen:
    layer, layers = target.layer, _names(target.layer, stack)
    *_, out, inputs = layer.matrix_shape
    for name in layers:
      if name not in file.layers:
        raise ValueError(
          f"the adapter in {file.dir!r} must have tensors for `{name}`, got none. Give `lora` the "
          "targets of the file."
        )
      sizes = {"in": inputs, "out": out, "rank": target.rank}
      file.check_shapes(name, sizes, layer.embedding, "lora")
      file.check_scale(name, target.scale, "lora")
    for path in target.paths:
      values = [file.layers[name][path[-1]] for name in layers]
      flat[path] = jnp.asarray(np.stack(values) if layer.stack else values[0])
  return traverse_util.unflatten_dict(flat)


def _check_plain(lora: LoRA, file: AdapterFile, stack: str) -> None:
  """Refuses tensors that are no adapter's, but for the frozen weights of adapted layers."""
  frozen: dict[str, tuple[int, ...]] = {}
  for target in lora.chosen:
    *_, out, inputs = target.layer.matrix_shape
    shape = (inputs, out) if target.layer.embedding else (out, inputs)
    frozen |= {f"{name}.weight": shape for name in _names(target.layer, stack)}
  for name, value in file.plain.items():
    if name not in frozen:
      raise ValueError(
        f"the adapter in {file.dir!r} holds `{name}`, which was trained beside the adapters "
        "(`modules_to_save` or `bias`); that is not supported. Use `optax_lowmem.nn`."
      )
    if value.shape != frozen[name]:
      raise ValueError(
        f"the adapter in {file.dir!r} has the base weight `{name}` of shape {value.shape}, and "
        f"`lora` adapts one of {frozen[name]}."
      )


def _names(layer: Layer, stack: str) -> list[str]:
  """What the layers of a stack are called in PyTorch."""
  names = torch_names(layer.name, layer.stack, stack)
  if len(layer.matrix_shape) > 2:
    raise ValueError(
      f"`{layer.name}` multiplies by one matrix for each index of an axis that its kernel shares "
      "with input and output, for which PEFT has no adapter. Merge it with `LoRA.merge` instead."
    )
  return names
