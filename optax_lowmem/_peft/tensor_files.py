"""Safetensors, read and written one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_lowmem._peft.files import WEIGHTS, import_safetensors
from optax_lowmem._peft.foreign_files import check_name, check_regular, member, read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32,
    "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def dtype_name(what: str, dtype: np.dtype) -> str:
  """What safetensors calls a dtype."""
  if dtype not in _NAMES:
    raise ValueError(f"`{what}` is {dtype}, which is not written. Choose another dtype for it.")
  return _NAMES[dtype]


class Weights(NamedTuple):
  """Tensors by name, read one at a time.

  Attributes:
    shapes: of every tensor.
    dtypes: of every tensor.
    files: the name of the file that each is in; empty where they are in none.
    read: gives the array of a name.
  """

  shapes: dict[str, tuple[int, ...]]
  dtypes: dict[str, np.dtype]
  files: dict[str, str]
  read: Callable[[str], np.ndarray]


def weight_files(path: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a model, the ones that Hugging Face would load."""
  if path.exists() and not path.is_dir():
    check_regular(path)
    return [path]
  if (single := member(path, SINGLE)).exists():
    return [single]
  if member(path, INDEX).exists():
    names = dict.fromkeys(str(name) for name in read_index(path)["weight_map"].values())
    files = [member(path, name) for name in names]
    absent = [file.name for file in files if not file.exists()]
    if absent:
      raise FileNotFoundError(
        f"{str(path / INDEX)!r} names files that are not there: {', '.join(absent[:20])}."
      )
    return files
  found = sorted(member(path, file.name) for file in path.glob("*.safetensors"))
  found = [file for file in found if file.name != WEIGHTS]
  if not found:
    raise FileNotFoundError(
      f"there are no safetensors in {str(path)!r}. Pass the directory of the original model."
    )
  return found


def read_index(path: pathlib.Path) -> dict[str, Any]:
  """The index of a model in several files; {} if it has none."""
  index = read_json(path / INDEX)
  if index and not isinstance(index.get("weight_map"), dict):
    raise ValueError(f"{str(path / INDEX)!r} has no `weight_map` of tensor names to file names.")
  return index


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object; {} if there is no such file."""
  return read_object(path) if member(path.parent, path.name).exists() else {}


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def open_weights(source: str | os.PathLike[str] | Mapping[str, Any]) -> Weights:
  """The tensors of a mapping, a safetensors file, or a directory of them.

  Values of a mapping are asked for their `shape` and `dtype`, and turned into an array when they
  are read: they may be lazy.
  """
  if isinstance(source, Mapping):
    return _of_mapping(source)
  safetensors = import_safetensors()
  where: dict[str, pathlib.Path] = {}
  shapes, dtypes = {}, {}
  for path in weight_files(pathlib.Path(source)):
    try:
      with safetensors.safe_open(path, framework="np") as file:
        for name in file.keys():
          check_name(path, name)
          part = file.get_slice(name)
          if name in where:
            raise ValueError(
              f"`{name}` is in {where[name].name!r} and in {path.name!r}. Delete one of the files."
            )
          if part.get_dtype() not in _DTYPES:
            raise ValueError(
              f"{str(path)!r} holds `{name}` as {part.get_dtype()}, which NumPy does not have. "
              "Pass the model as it was before it was quantized."
            )
          where[name], shapes[name] = path, tuple(part.get_shape())
          dtypes[name] = np.dtype(_DTYPES[part.get_dtype()])
    except safetensors.SafetensorError as error:
      raise ValueError(
        f"{str(path)!r} is not a whole safetensors file: {error}. Copy it again."
      ) from error

  def read(name: str) -> np.ndarray:
    # Opened anew: safetensors maps the file, and what was read would stay resident until it is
    # closed (999 MiB of a file of 938 MiB).
    with safetensors.safe_open(where[name], framework="np") as file:
      return file.get_tensor(name)

  return Weights(shapes, dtypes, {name: path.name for name, path in where.items()}, read)


def _of_mapping(source: Mapping[str, Any]) -> Weights:
  shapes, dtypes = {}, {}
  for name in source:
    value = source[name]
    try:
      shapes[name], dtypes[name] = tuple(map(int, value.shape)), np.dtype(value.dtype)
    except (AttributeError, TypeError) as error:
      raise TypeError(
        f"`original` maps {name!r} to a {type(value).__name__}, which is no array of NumPy or JAX. "
        "Each value must have a `shape` and a NumPy `dtype`."
      ) from error
    del value  # or it would be held while the next one is made
  return Weights(shapes, dtypes, {}, lambda name: np.asarray(source[name]))


class Kind(NamedTuple):
  """What a tensor in a file is."""

  dtype: np.dtype
  shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def write_shard(
  path: pathlib.Path, kinds: Mapping[str, Kind], get: Callable[[str], np.ndarray]
) -> None:
  """Writes the tensors that `kinds` names, asking `get` for one at a time.

  The package safetensors writes whole dictionaries of arrays. This holds one array: the header,
  which comes first in the file, follows from `kinds` alone.
  """
  # Of large elements first, as safetensors sorts them: each then lies at a multiple of its size.
  names = sorted(kinds, key=lambda name: -kinds[name].dtype.itemsize)
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for name in names:
    dtype, shape = kinds[name]
    end = offset + kinds[name].nbytes
    entry = {"dtype": dtype_name(name, dtype), "shape": list(shape), "data_offsets": [offset, end]}
    header[name], offset = entry, end
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
      value = get(name)
      if (value.dtype, value.shape) != kinds[name]:
        raise ValueError(
          f"`{name}` was announced as {kinds[name].dtype}{list(kinds[name].shape)} and read as "
          f"{value.dtype}{list(value.shape)}."
        )
      file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
      del value  # before the next one is made
    file.flush()
    os.fsync(file.fileno())


def split_shards(kinds: Mapping[str, Kind], names: Iterable[str], limit: int) -> dict[str, str]:
  """{name: file} with at most `limit` bytes a file, but for a tensor that alone has more."""
  shards: list[list[str]] = [[]]
  size = 0
  for name in names:
    if shards[-1] and size + kinds[name].nbytes > limit:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += kinds[name].nbytes
  if len(shards) == 1:
    return dict.fromkeys(shards[0], SINGLE)
  return {
    name: f"model-{number:05}-of-{len(shards):05}.safetensors"
    for number, names in enumerate(shards, 1)
    for name in names
  }
