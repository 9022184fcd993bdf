"""Adapters, written in the files of PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from optax_lowmem._linear.head_names import EMBEDDINGS, HEAD_WEIGHT, TABLE
from optax_lowmem._peft.config import configuration
from optax_lowmem._peft.files import PREFIX, check_writable, write_adapter
from optax_lowmem.nn._layers.base_layer import (
  contraction_of,
  dense_variable,
  matrix_of,
  stack_shape,
)
from optax_lowmem.nn._model.model_tree import ModelTree, Place
from optax_lowmem.nn._model.trainable import trained_beside


class Layer(NamedTuple):
  """One layer's adapter, as a file holds it."""

  rank: int
  alpha: float
  parts: dict[str, np.ndarray]


def check_matrix(place: Place) -> None:
  """Refuses layers that have no one matrix in PyTorch."""
  if len(contraction_of(place.base).matrix_shape) > 2:
    raise ValueError(
      f"`{place.path}` multiplies by one matrix for each index of an axis that its kernel shares "
      "with input and output, for which PEFT has no adapter. Merge it with `merge_lora` instead."
    )


def peft_layers(place: Place, names: Sequence[str], of_original: bool = True) -> dict[str, Layer]:
  """{name: adapter} of one place; layers of a stack that have none are left out.

  With `of_original` it is to be added to the weight before room was made in it for the adapter,
  else to the one that the base holds.
  """
  lora: Any = place.module
  count = len(names)
  ranks, alphas = lora.ranks or (lora.rank,) * count, lora.alphas or (lora.alpha,) * count
  values = {name: _each(lora, value) for name, value in lora.values().items()}
  room = lora.variant.room(lora) if of_original else {}
  room = {name: _each(lora, value) for name, value in room.items()}
  found = {}
  for i, (name, rank, alpha) in enumerate(zip(names, ranks, alphas, strict=True)):
    if rank == 0:
      continue
    within = {part.name: part.within(rank) for part in lora.parts}
    parts = {k: v[i][within[k]] for k, v in values.items()}
    if room:
      # The base gave up the product of the first factors: what was learned is the difference.
      first = {k: v[i][within[k]] for k, v in room.items()}
      parts, rank, alpha = lora.variant.difference(parts, first, rank, alpha, lora.use_rslora)
    found[name] = Layer(rank, alpha, parts)
  return found


def _each(lora: Any, value: Any) -> np.ndarray:
  """A value of each layer of a stack, or of the one layer."""
  value = np.asarray(value, np.float32)
  return value if stack_shape(lora.base) else value[None]


def save_peft(
  model: nnx.Module,
  dir: str | os.PathLike[str],
  *,
  base_model: str | None = None,
  task_type: str = "CAUSAL_LM",
  stack: str = "layers",
  save_embedding_layers: bool = True,
  overwrite: bool = False,
) -> pathlib.Path:
  """Writes the adapters of a model as PEFT writes them.

  `PeftModel.from_pretrained(base, dir)` loads the result, if module paths here are those of the
  PyTorch model. A stacked module `model.layers.self_attn.q_proj` is written as
  `model.layers.{i}.self_attn.q_proj`, one for each layer.

  Ranks and alphas that differ become PEFT's `rank_pattern` and `alpha_pattern`; what
  `modules_to_save` and `bias` of `add_lora` made trainable is written as PEFT writes it. Adapters
  are written in the dtype they are trained in; what is trained beside them in float32.

  The file is an adapter of the *original* weights. Where the base was changed when the adapter
  was made (`init` "pissa" or "loftq"), it holds the difference to the start, B A - B0 A0, as a
  plain adapter of twice the rank. For PiSSA on a float base that gives the same logits; with a
  quantized base they differ by the error of quantization, as those of any adapter do that is
  moved to a base of other bits.

  Args:
    model: a module with adapters in it, all of one dropout, and all or none of them rsLoRA, DoRA
      and with a bias.
    dir: the directory to write to; it is made if needed.
    base_model: name or path of the base model, for the configuration.
    task_type: PEFT's task type, for the configuration.
    stack: the part of a stacked module's path after which the layer number belongs.
    save_embedding_layers: write the base weights of adapted embeddings and heads
      (`embed_tokens`, `lm_head`) too, as PEFT does; not those that are packed, or were changed
      when the adapter was made.
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
  dir = check_writable(dir, overwrite)
  tree = ModelTree(model, stack)
  layers: dict[str, Layer] = {}
  tensors: dict[str, np.ndarray] = {}
  settings: dict[tuple[Any, ...], str] = {}
  for place in tree.adapters:
    names = tree.torch_names(place)
    check_matrix(place)
    lora: Any = place.module
    written = peft_layers(place, names)
    layers |= written
    tensors |= _tensors(lora, written)
    if save_embedding_layers:
      tensors |= _base_tables(lora, names, written)
    rate = () if lora.is_embed else (0.0 if lora.dropout is None else lora.dropout.rate,)
    settings.setdefault((lora.variant, lora.use_rslora, *rate), place.path)
  if not layers:
    raise ValueError("`model` holds no LoRALinear, there is no adapter to save.")
  longest = max(settings, key=len)
  if any(key != longest[: len(key)] for key in settings):
    raise ValueError(
      "`model` has adapters of different (variant, use_rslora, dropout): "
      + ", ".join(f"{value} at `{path}`" for value, path in settings.items())
      + ". One adapter file holds one of each."
    )
  variant, use_rslora, *rates = longest
  own = {part.name for part in variant.parts(False)} - {part.name for part in variant.parts(True)}
  if own and len(settings) > 1:
    raise ValueError(
      f"`{own.pop()}` on linear layers does not go with adapters on embeddings in PEFT."
    )
  all_names = [name for place in tree.layers() for name in tree.names(place)]
  bias, modules = _beside(tree, set(layers), tensors)
  for name in modules:
    others = {n for n in all_names if n.endswith(name)} - set(modules)
    if others:
      raise ValueError(
        f"`{name}` is trained whole, and PEFT would take {sorted(others)[0]!r} for it too, whose "
        "name ends in the same letters. Train both, or rename one."
      )
  tying = bool(modules) and is_tied(model)
  if tying:  # PEFT looks for the tied output layer's own copy
    for name in [name for name in tensors if name.endswith(TABLE)]:
      root = name.removesuffix(TABLE).removesuffix("model.")
      tensors[root + HEAD_WEIGHT] = tensors[name].copy()
  config = configuration(
    {name: layer.rank for name, layer in layers.items()},
    {name: layer.alpha for name, layer in layers.items()},
    all_names,
    base_model=base_model,
    task_type=task_type,
    dropout=rates[0] if rates else 0.0,
    use_rslora=use_rslora,
    variant=variant,
    bias=bias,
    modules_to_save=modules,
    ensure_weight_tying=tying,
  )
  write_adapter(dir, config, tensors)
  return dir


def _tensors(lora: Any, layers: dict[str, Layer]) -> dict[str, np.ndarray]:
  """An adapter's arrays by their names in PEFT, in the dtype they are trained in."""
  held = [*lora.values().values(), *lora.variant.room(lora).values()]
  dtype = functools.reduce(jnp.promote_types, (value.dtype for value in held))
  return {
    f"{PREFIX}{name}.{part.peft}": np.ascontiguousarray(layer.parts[part.name].T.astype(dtype))
    for name, layer in layers.items()
    for part in lora.parts
  }


def _base_tables(lora: Any, names: Sequence[str], layers: dict[str, Layer]) -> dict[str, Any]:
  """The weights under adapters of embeddings and heads, which PEFT writes too.

  A base that made room holds no weight that the adapter in the file could be added to.
  """
  if dense_variable(lora.base) is None or lora.variant.room(lora):
    return {}
  return {
    f"{PREFIX}{name}.base_layer.weight": np.ascontiguousarray(one.T if lora.is_embed else one)
    for name, one in zip(names, _each(lora, matrix_of(lora.base)), strict=True)
    if name in layers and name.rpartition(".")[2] in EMBEDDINGS
  }


def is_tied(model: Any) -> bool:
  """Whether the model says that its output layer is its embedding."""
  return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def _beside(
  tree: ModelTree, adapted: set[str], tensors: dict[str, np.ndarray]
) -> tuple[str, list[str]]:
  """Adds what is trained beside adapters to `tensors`; returns `bias` and `modules_to_save`."""
  biases, modules = set(), dict[str, set[str]]()
  for tensor, names in trained_beside(tree).values():
    value = tensor.to_torch(np.asarray(tensor.variable[...], np.float32))
    for name, one in zip(names, value if tensor.lead else value[None], strict=True):
      inner = f"{name}.base_layer" if name in adapted else name
      tensors[f"{PREFIX}{inner}.{tensor.suffix}"] = np.ascontiguousarray(one)
      modules.setdefault(name, set()).add(tensor.suffix)
  for name, suffixes in list(modules.items()):
    if suffixes == {"bias"}:
      biases.add(name)
      del modules[name]
    elif name in adapted:
      raise ValueError(
        f"`{name}` has an adapter, and its weight is trained too. Train one of them."
      )
  if not biases:
    return "none", sorted(modules)
  return ("lora_only" if biases <= adapted else "all"), sorted(modules)
