"""A PEFT adapter that was read: its configuration, and the arrays of its layers."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_lowmem._linear.patterns import pattern_value
from optax_lowmem._peft.files import (
  CONFIG,
  PREFIX,
  WEIGHTS,
  Kinds,
  import_safetensors,
  read_config,
)
from optax_lowmem._peft.foreign_files import check_name, member
from optax_lowmem._peft.foreign_patterns import check_pattern
from optax_lowmem._variants.lora_scale import scale_of
from optax_lowmem._variants.variant import Part, Variant

_COPY, _BEFORE = ".modules_to_save.bias", ".original_module.bias"


class AdapterFile(NamedTuple):
  """A configuration, and tensors in float32.

  Attributes:
    dir: the directory, for messages.
    config: what `adapter_config.json` holds, under the keys of LoRA.
    variant: what kind of adapter it is.
    layers: {module name: {"lora_a": (in, r), "lora_b": (r, out), …}}, the parts of `variant`.
    plain: {name of a tensor of the base: value}, of modules to save and of biases.
    embeddings: the names of those layers that are embeddings.
  """

  dir: str
  config: dict[str, Any]
  variant: Variant
  layers: dict[str, dict[str, np.ndarray]]
  plain: dict[str, np.ndarray]
  embeddings: set[str]

  def parts(self, name: str) -> tuple[Part, ...]:
    """What the adapter of a layer consists of."""
    return self.variant.parts(name in self.embeddings)

  def rank(self, name: str) -> int:
    """Of a layer."""
    return int(pattern_value(self.config.get("rank_pattern") or {}, name, self.config["r"]))

  def alpha(self, name: str) -> float:
    """Of a layer."""
    return pattern_value(self.config.get("alpha_pattern") or {}, name, self.config["lora_alpha"])

  def scale(self, name: str) -> float:
    """Of a layer."""
    return scale_of(self.rank(name), self.alpha(name), bool(self.config.get("use_rslora")))

  def check_shapes(
    self, name: str, sizes: dict[str, int], embedding: bool, argument: str = "model"
  ) -> None:
    """Refuses parts that do not fit a layer, whose rank may be among its sizes."""
    sizes = {"rank": self.rank(name)} | sizes
    if self.parts(name) != self.variant.parts(embedding):
      raise ValueError(
        f"the adapter in {self.dir!r} has {self.parts(name)[0].peft} for `{name}`, which is "
        f"{'an' if embedding else 'no'} embedding in `{argument}`."
      )
    for part in self.parts(name):
      got, want = self.layers[name][part.name].shape[::-1], part.shape(sizes)[::-1]
      if got != want:
        raise ValueError(
          f"the adapter in {self.dir!r} has {part.peft} of shape {got} for `{name}`, where rank "
          f"{sizes['rank']} and the layer of `{argument}` need shape {want}. Its configuration "
          f"says rank {self.rank(name)}."
        )

  def check_patterns(self, names: Sequence[str]) -> None:
    """Refuses regular expressions that are none, or take too long for these names of layers."""
    config, path = self.config, os.path.join(self.dir, CONFIG)
    for key in ("target_modules", "exclude_modules"):
      if isinstance(config.get(key), str):
        check_pattern(f"{path!r} {key}", config[key], names)
    for key in ("rank_pattern", "alpha_pattern"):
      for pattern in config.get(key) or {}:
        check_pattern(f"{path!r} {key}", pattern, names, r"(.*\.)?({})$")
    below_ = config.get("layers_pattern") or []
    for pattern in [below_] if isinstance(below_, str) else below_:
      check_pattern(f"{path!r} layers_pattern", pattern, names, r"(?:^|.*?\.){}\.(\d+)\.")

  def check_scale(self, name: str, have: float, argument: str) -> None:
    """Refuses a layer whose adapter has another scale."""
    scale = self.scale(name)
    if abs(have - scale) > 1e-6 * scale:
      raise ValueError(
        f"the adapter in {self.dir!r} has scale {scale:g} for `{name}`, `{argument}` has {have:g}. "
        f"Give `{argument}` the same alpha, rank and use_rslora."
      )


def read_adapter(dir: str | os.PathLike[str], variant: Variant | Kinds) -> AdapterFile:
  """The adapter in a directory, of that variant or of one of those kinds."""
  path = pathlib.Path(dir) / WEIGHTS
  config, variant = read_config(path.with_name(CONFIG), variant)
  if not path.exists():
    raise FileNotFoundError(
      f"there is no {WEIGHTS} in {str(path.parent)!r}. Adapters saved as .bin are not read; "
      "save them with safetensors."
    )
  path, safetensors = member(path.parent, path.name), import_safetensors()
  try:
    with safetensors.safe_open(path, framework="np") as file:
      tensors = {name: file.get_tensor(name) for name in file.keys()}
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{str(path)!r} is not a whole safetensors file: {error}. Copy it again."
    ) from error
  found = AdapterFile(str(path.parent), config, variant, {}, {}, set())
  # How names end: the part that each is, and whether only embeddings have it.
  ends = {
    end: (part, embedding)
    for embedding in (True, False)
    for part in variant.parts(embedding)
    for end in (part.peft, part.older)
    if end
  }
  for name, value in tensors.items():
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise ValueError(f"{str(path)!r}: {name!r} is {value.dtype}, not floating point.")
    _sort(path, name, value.astype(np.float32), found, ends)
  _drop_copies(path, found.plain)
  for name, parts in found.layers.items():
    for part in found.parts(name):
      if part.name not in parts:
        raise ValueError(
          f"{str(path)!r} lacks the {part.name.removeprefix('lora_')} of `{name}`: "
          f"{PREFIX}{name}.{part.peft}. Its configuration is that of {variant!r}."
        )
  return found


def _drop_copies(path: pathlib.Path, plain: dict[str, np.ndarray]) -> None:
  """Drops the biases that PEFT writes again for modules saved whole, where all biases are trained.

  One copy is equal, the other is the value before training.
  """
  for name in [name for name in plain if name.endswith((_COPY, _BEFORE))]:
    whole = name.removesuffix(_COPY).removesuffix(_BEFORE) + ".bias"
    if whole not in plain:
      raise ValueError(f"{str(path)!r} holds {PREFIX}{name} and lacks {PREFIX}{whole}.")
    if name.endswith(_COPY) and not np.array_equal(plain[name], plain[whole]):
      raise ValueError(
        f"{str(path)!r} holds two values of a bias: {PREFIX}{name} and {PREFIX}{whole}. Remove the "
        "one that is wrong."
      )
    del plain[name]


def _sort(
  path: pathlib.Path, name: str, value: np.ndarray, found: AdapterFile, ends: dict[str, Any]
) -> None:
  check_name(path, name)
  inner = name.removeprefix(PREFIX)
  end = next((end for end in ends if inner.endswith(f".{end}")), None)
  if end is not None and inner != name:
    (part, embedding), module = ends[end], inner.removesuffix(f".{end}")
    one_axis = len(part.axes) == 1
    found.layers.setdefault(module, {})[part.name] = value.reshape(-1) if one_axis else value.T
    if embedding:
      found.embeddings.add(module)
    return
  stem = next(iter(ends)).partition("_")[0] + "_"  # "lora_"
  if inner == name or f".{stem}" in name or not re.fullmatch(r".+\.(weight|bias)", name):
    listed = ", ".join(dict.fromkeys(part.peft for part, _ in ends.values()))
    raise ValueError(
      f"{str(path)!r} holds the tensor {name!r}, which is not supported. Names of "
      f"{type(found.variant).__name__} are {PREFIX}<module> and one of {listed}; a module that is "
      "saved whole is <module>.weight and <module>.bias."
    )
  # The base of a layer with an adapter goes by the name of the layer.
  found.plain[re.sub(r"\.base_layer(\.\w+)$", r"\1", inner)] = value
