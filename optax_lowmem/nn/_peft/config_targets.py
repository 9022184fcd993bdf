"""What a PEFT adapter's configuration names: layers, modules saved whole, and biases."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from optax_lowmem._linear.head_names import HEAD_WEIGHT, HEADS, TABLE
from optax_lowmem._linear.names import names_in_stack, nearest
from optax_lowmem._peft.adapter_file import AdapterFile
from optax_lowmem.nn._model.model_tree import ModelTree, Place
from optax_lowmem.nn._model.trainable import Tensor, find_saved, tensors_of
from optax_lowmem.nn._peft.save import is_tied
from optax_lowmem.nn._proofs.flax_layers import is_embed


def expected(file: AdapterFile, tree: ModelTree | None = None) -> Callable[[str], bool]:
  """Whether PEFT, following the configuration, put an adapter on the layer of a name.

  Without a model, "all-linear" names none.
  """
  config = file.config
  targets, excluded = config.get("target_modules"), config.get("exclude_modules")
  indices, below_ = config.get("layers_to_transform"), config.get("layers_pattern")
  if isinstance(targets, str) and targets.lower() == "all-linear":
    linear = [] if tree is None else tree.all_linear()
    targets = [name for place in linear if tree for name in tree.names(place)]

  def matches(wanted: Any, name: str) -> bool:
    if isinstance(wanted, str):
      return re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith("." + one) for one in wanted)

  def expects(name: str) -> bool:
    if not targets or (excluded and matches(excluded, name)) or not matches(targets, name):
      return False
    if isinstance(targets, str) or indices is None or indices == []:
      return True
    parts = [below_] if isinstance(below_, str) else (below_ or [None])
    found = None
    for part in parts:
      pattern = r".*?\.[^.]*\.(\d+)\." if part is None else rf"(?:^|.*?\.){part}\.(\d+)\."
      found = found or re.match(pattern, name)
    wanted = [indices] if isinstance(indices, int) else indices
    return found is not None and int(found[1]) in wanted

  return expects


def saved_names(file: AdapterFile) -> list[str]:
  """The names in `modules_to_save`, of which a single one may be a text."""
  names = file.config.get("modules_to_save") or []
  return [names] if isinstance(names, str) else names


def saved_modules(tree: ModelTree, file: AdapterFile) -> list[Place]:
  """The modules that PEFT saves whole: those whose name ends in a `saved_names`.

  A name that neither the model nor the file has is passed over: PEFT writes "classifier" and
  "score" into the configuration of every classifier.
  """
  found = []
  for name in saved_names(file):
    # PEFT asks for no dot before the name: "norm" is input_layernorm too.
    ends = [p.path for p in tree.places if any(n.endswith(name) for n in _names(tree, p))]
    held = any(name in tensor for tensor in file.plain)
    found += ends or ([name] if held else [])
  return find_saved(tree, list(dict.fromkeys(found)))


def _names(tree: ModelTree, place: Place) -> list[str]:
  tensors = tensors_of(place.module) or []
  named = [names_in_stack(place.path, tensor.lead, tree.stack) for tensor in tensors[:1]]
  return [place.path, *(name for names in named for name in names)]


def check_tying(model: Any, saved: Sequence[Place], file: AdapterFile) -> None:
  """In PEFT an output layer that is tied to the embedding follows it only if asked to."""
  if not is_tied(model):
    return
  tying = bool(file.config.get("ensure_weight_tying"))
  if not tying and any(isinstance(place.module, nnx.Embed) for place in saved):
    raise ValueError(
      "the adapter saves the embedding whole, and in PEFT the output layer that is tied to it "
      "stays as it was, which here it would not. Save the adapter with `ensure_weight_tying`."
    )
  if tying and any("embed" in name.rpartition(".")[2] for name in file.layers):
    raise ValueError(
      "the adapter ties the output layer to an adapted embedding (`ensure_weight_tying`), which "
      "is not supported. Train the adapter without it."
    )


def tied_once(file: AdapterFile) -> AdapterFile:
  """The file with one table, where PEFT wrote that of the tied output layer a second time."""
  tables = [name for name in file.plain if name.endswith(TABLE)]
  heads = [name for name in file.plain if name.endswith(HEAD_WEIGHT)]
  if not file.config.get("ensure_weight_tying") or len(tables) != 1 or len(heads) != 1:
    return file
  if not np.array_equal(file.plain[tables[0]], file.plain[heads[0]]):
    raise ValueError(
      f"the adapter in {file.dir!r} ties the output layer to the embedding "
      f"(`ensure_weight_tying`), and holds two values for them: `{tables[0]}` and `{heads[0]}`. "
      "Remove the one that is wrong."
    )
  return file._replace(plain={n: v for n, v in file.plain.items() if n != heads[0]})


def plain_tensors(
  tree: ModelTree, saved: Sequence[Place], file: AdapterFile
) -> list[tuple[Tensor, np.ndarray]]:
  """The Variables of the base that the file replaces, and their values."""
  left, config, dir = dict(file.plain), file.config, file.dir
  whole = {id(place.module) for place in tree.below(saved)}
  found: list[tuple[Tensor, np.ndarray]] = []
  for place in tree.outer:
    for tensor in tensors_of(place.module) or []:
      names = names_in_stack(place.path, tensor.lead, tree.stack)
      full = [f"{name}.{tensor.suffix}" for name in names]
      have = [name for name in full if name in left]
      if len(have) < len(full) and (have or id(place.module) in whole):
        lacking = next(name for name in full if name not in left)
        raise ValueError(
          f"the adapter in {dir!r} lacks `{lacking}`, which its `modules_to_save` or `bias` names."
        )
      if not have:
        continue
      trained = id(place.module) in whole
      trained = trained or (tensor.suffix == "bias" and config.get("bias", "none") != "none")
      if not trained and not any(name in file.layers for name in names):
        raise ValueError(
          f"the adapter in {dir!r} holds `{have[0]}`, which neither its `modules_to_save` nor its "
          "`bias` names."
        )
      read = [left.pop(name) for name in full]
      for name, one in zip(full, read, strict=True):
        linear = len(one.shape) == 2 and not is_embed(place.base)
        if config.get("fan_in_fan_out") and linear and not HEADS.fullmatch(place.path):
          raise ValueError(
            f"the adapter in {dir!r} saves `{name}` whole, and with `fan_in_fan_out` it is not "
            "clear which of its axes is the input. Train an adapter on it instead."
          )
        if one.shape != tensor.torch_shape:
          raise ValueError(
            f"the adapter in {dir!r} has `{name}` of another shape than `model`: {one.shape} "
            f"there, {tensor.torch_shape} needed."
          )
      value = tensor.from_torch(np.stack(read))
      found.append((tensor, value if tensor.lead else value[0]))
  if left:
    name = next(iter(left))
    raise ValueError(
      f"the adapter in {dir!r} holds `{name}`, which `model` does not have, or has quantized."
      f"{nearest(name.rpartition('.')[0], tree.paths)}"
    )
  return found


def check_whole(file: AdapterFile, shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Refuses a file that lacks what its configuration names, or holds more.

  `shapes` are those of the tensors of the model.
  """
  saved, dir = tuple(saved_names(file)), file.dir
  names = [tensor.rpartition(".")[0] for tensor in shapes]
  file.check_patterns(names)
  expects = expected(file)

  def whole(tensor: str) -> bool:
    parts = tensor.split(".")[:-1]
    paths = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return bool(saved) and any(path.endswith(saved) for path in paths)

  for tensor, shape in shapes.items():
    name, _, suffix = tensor.rpartition(".")
    if whole(tensor) and tensor not in file.plain:
      raise ValueError(f"the adapter in {dir!r} lacks `{tensor}`, which `modules_to_save` names.")
    lacks = suffix == "weight" and len(shape) == 2 and name not in file.layers
    if lacks and not whole(tensor) and expects(name):
      raise ValueError(f"the adapter in {dir!r} lacks `{name}`, which its `target_modules` names.")
  for tensor in file.plain:
    name, _, suffix = tensor.rpartition(".")
    trained = suffix == "bias" and file.config.get("bias", "none") != "none"
    if not (whole(tensor) or trained or name in file.layers):
      raise ValueError(
        f"the adapter in {dir!r} holds `{tensor}`, which neither its `modules_to_save` nor its "
        "`bias` names."
      )
