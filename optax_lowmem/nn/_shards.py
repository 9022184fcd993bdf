"""Safetensors, read and written one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


class Weights(NamedTuple):
  """Tensors by name, read one at a time."""

  shapes: dict[str, tuple[int, ...]]
  dtypes: dict[str, np.dtype]
  files: dict[str, str]
  read: Callable[[str], np.ndarray]


def weight_files(path: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a model, those that its index names if it has one."""
  if path.is_file():
    return [path]
  index = path / "model.safetensors.index.json"
  if index.exists():
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [path / name for name in dict.fromkeys(names)]
  found = sorted(path.glob("*.safetensors"))
  if not found:
    raise FileNotFoundError(
      f"there are no safetensors in {str(path)!r}. Pass the directory of the original model."
    )
  return found


@contextlib.contextmanager
def open_weights(source: str | os.PathLike[str] | Mapping[str, Any]) -> Iterator[Weights]:
  """The tensors of a mapping, a safetensors file, or a directory of them."""
  if isinstance(source, Mapping):
    arrays = source
    shapes = {name: tuple(value.shape) for name, value in arrays.items()}
    dtypes = {name: np.dtype(value.dtype) for name, value in arrays.items()}
    yield Weights(shapes, dtypes, dict.fromkeys(shapes, ""), lambda name: np.asarray(arrays[name]))
    return
  with contextlib.ExitStack() as open_files:
    where: dict[str, tuple[Any, int, dict[str, Any]]] = {}
    files: dict[str, str] = {}
    for path in weight_files(pathlib.Path(source)):
      file = open_files.enter_context(open(path, "rb"))
      (length,) = struct.unpack("<Q", file.read(8))
      for name, entry in json.loads(file.read(length)).items():
        if name != "__metadata__":
          where[name] = (file, 8 + length, entry)
          files[name] = path.name
    for name, (_, _, entry) in where.items():
      if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{files[name]!r} holds {name!r} as {entry['dtype']}, which is not read.")

    def read(name: str) -> np.ndarray:
      file, start, entry = where[name]
      begin, end = entry["data_offsets"]
      file.seek(start + begin)
      data = file.read(end - begin)
      return np.frombuffer(data, _DTYPES[entry["dtype"]]).reshape(entry["shape"])

    shapes = {name: tuple(entry["shape"]) for name, (_, _, entry) in where.items()}
    dtypes = {name: np.dtype(_DTYPES[entry["dtype"]]) for name, (_, _, entry) in where.items()}
    yield Weights(shapes, dtypes, files, read)


def write_shard(
  path: pathlib.Path,
  kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
  get: Callable[[str], Any],
) -> int:
  """Writes the tensors that `kinds` names, asking `get` for one at a time; returns the bytes.

  The file is whole when it gets its name.
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for name, (dtype, shape) in kinds.items():
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    header[name] = {
      "dtype": _NAMES[np.dtype(dtype)],
      "shape": list(shape),
      "data_offsets": [offset, offset + size],
    }
    offset += size
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  partial = path.with_name(f".{path.name}.partial")
  with open(partial, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for name, (dtype, shape) in kinds.items():
      value = np.asarray(get(name)).astype(dtype)
      if value.shape != shape:
        raise ValueError(f"{name!r} has shape {value.shape}, {shape} was announced.")
      file.write(np.ascontiguousarray(value).tobytes())
  os.replace(partial, path)
  return offset
