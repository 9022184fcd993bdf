"""What stands at the start of a GGUF file: its metadata, and where its tensors lie.

Own code, because the package `gguf` trusts the file: it makes an object for each of the elements
that an array says it has, be it 2**60 of a file of 100 bytes. Here every length is compared with
what is left of the file before anything is made, and arrays are read when they are asked for.

References:
  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import mmap
import pathlib
import struct
from typing import Any, NamedTuple

import numpy as np

_NUMBERS = ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8")
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


class Tensor(NamedTuple):
  """Where a tensor lies; `shape` is as in the file, the fastest axis first."""

  shape: tuple[int, ...]
  type: Any  # gguf.GGMLQuantizationType
  start: int
  nbytes: int


@dataclasses.dataclass
class _Array:
  type: int
  count: int
  start: int


class Header:
  """The start of a GGUF file.

  Attributes:
    tensors: by name.

  Raises:
    ValueError: where the file is no GGUF file, is one part of several, or ends too early.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    with open(path, "rb") as file:
      try:
        self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
      except ValueError:  # an empty file
        self.data = b""
    self.at = 0
    if self.data[:4] != b"GGUF":
      raise self._wrong("it does not begin with GGUF")
    self.at = 4
    version = self._number("<u4")
    if version not in (2, 3):
      raise self._wrong(f"version {version}; 2 and 3 are read")
    tensors, fields = self._number("<u8"), self._number("<u8")
    self._check_count(tensors, 24, "tensors")
    self._check_count(fields, 13, "fields of metadata")
    self._fields: dict[str, Any] = {}
    for _ in range(fields):
      key = self._text()
      if key in self._fields:
        raise self._wrong(f"the field {key!r:.100} is there twice")
      self._fields[key] = self._value(self._number("<u4"))
    parts = self.value("split.count", 1)
    if isinstance(parts, int) and parts > 1:
      raise ValueError(
        f"it is part {self.value('split.no', 0) + 1} of a model in {parts} files. Join them with "
        "llama.cpp's `llama-gguf-split --merge`."
      )
    self.tensors = self._read_tensors(tensors)

  def __contains__(self, key: str) -> bool:
    return key in self._fields

  def keys(self) -> list[str]:
    return list(self._fields)

  def value(self, key: str, default: Any = None) -> Any:
    """A field as a Python value: a number, a text, or a list of them."""
    found = self._fields.get(key, default)
    if not isinstance(found, _Array):
      return found
    if found.type == _STRING:
      self.at = found.start
      return [self._text() for _ in range(found.count)]
    return np.frombuffer(self.data, _NUMBERS[found.type], found.count, found.start).tolist()

  def array(self, name: str) -> np.ndarray:
    """A tensor as its numbers, or the bytes of its codes, rows first; not read yet."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    tensor = self.tensors[name]
    kinds = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2"}
    kinds |= {GGMLQuantizationType.F64: "<f8"}
    flat = np.memmap(self.path, np.uint8, "r", tensor.start, (tensor.nbytes,))
    if tensor.type in kinds:
      return flat.view(kinds[tensor.type]).reshape(tensor.shape[::-1])
    block, size = GGML_QUANT_SIZES[tensor.type]
    return flat.reshape(*tensor.shape[:0:-1], tensor.shape[0] // block * size)

  def _read_tensors(self, count: int) -> dict[str, Tensor]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    found = {}
    for _ in range(count):
      name = self._text()
      if name in found:
        raise self._wrong(f"the tensor {name!r:.100} is there twice")
      dimensions = self._number("<u4")
      if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise self._wrong(f"the tensor {name!r:.100} has {dimensions} axes")
      shape = tuple(self._number("<u8") for _ in range(dimensions))
      number, start = self._number("<u4"), self._number("<u8")
      try:
        kind = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[kind]
      except (ValueError, KeyError):
        raise self._wrong(f"the tensor {name!r:.100} is of the unknown type {number}") from None
      total = 1
      for axis in shape:
        total *= axis
      if not total or shape[0] % block:
        raise self._wrong(f"the tensor {name!r:.100} has the shape {shape}")
      found[name] = Tensor(shape, kind, start, total // block * size)
    alignment = self.value("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
      raise self._wrong(f"`general.alignment` is {alignment!r:.100}")
    begin = -(-self.at // alignment) * alignment
    for name, tensor in found.items():
      found[name] = tensor = tensor._replace(start=begin + tensor.start)
      if tensor.start + tensor.nbytes > len(self.data):
        raise self._wrong(f"the tensor {name!r:.100} ends behind it")
    return found

  def _value(self, kind: int) -> Any:
    if kind == _STRING:
      return self._text()
    if kind == _ARRAY:
      kind, count = self._number("<u4"), self._number("<u8")
      array = _Array(kind, count, self.at)
      if kind == _STRING:
        self._check_count(count, 8, "texts in an array")
        for _ in range(count):
          self._skip(self._number("<u8"))
        return array
      size = np.dtype(self._kind(kind)).itemsize
      self._check_count(count, size, "numbers in an array")
      self._skip(count * size)
      return array
    return self._number(self._kind(kind))

  def _kind(self, kind: int) -> str:
    name = _NUMBERS[kind] if kind < len(_NUMBERS) else None
    if name is None:  # among them arrays of arrays, which no known file has
      raise self._wrong(f"a value of the unknown type {kind}")
    return name

  def _number(self, kind: str) -> Any:
    size = np.dtype(kind).itemsize
    start = self.at
    self._skip(size)
    if kind == "<u4":
      return struct.unpack_from("<I", self.data, start)[0]
    if kind == "<u8":
      return struct.unpack_from("<Q", self.data, start)[0]
    return np.frombuffer(self.data, kind, 1, start)[0].item()

  def _text(self) -> str:
    length = self._number("<u8")
    start = self.at
    self._skip(length)
    return str(self.data[start : self.at], "utf-8", "replace")

  def _skip(self, size: int) -> None:
    if size > len(self.data) - self.at:
      raise self._wrong(f"at byte {self.at} it says that {size:,} more follow")
    self.at += size

  def _check_count(self, count: int, least: int, what: str) -> None:
    """Refuses a number of things of at least so many bytes for which the file is too short."""
    if count * least > len(self.data) - self.at:
      raise self._wrong(f"it says that it has {count:,} {what}")

  def _wrong(self, what: str) -> ValueError:
    return ValueError(
      f"truncated or not a GGUF file ({what}); it has {len(self.data)} bytes. "
      "(Of a Hugging Face model, give the directory.)"
    )
