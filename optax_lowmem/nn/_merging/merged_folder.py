"""A folder with a merged model, written one tensor at a time."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_lowmem._peft.foreign_files import leads_out
from optax_lowmem._peft.tensor_files import (
  INDEX,
  SINGLE,
  Kind,
  Weights,
  dtype_name,
  read_json,
  split_shards,
  write_json,
  write_shard,
)
from optax_lowmem.nn._merging.changes import Changes

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz",
    ".index.json",
)  # fmt: skip


def float_dtype(dtype: Any) -> np.dtype | None:
  """A dtype that weights can be written in; None stays None."""
  if dtype is None:
    return None
  try:
    found = np.dtype(jnp.dtype(dtype))
  except TypeError as error:
    raise ValueError(
      f"`dtype` must be a dtype such as 'bfloat16' or None, got {dtype!r}."
    ) from error
  if not jnp.issubdtype(found, jnp.floating):
    raise ValueError(f"`dtype` must be floating point, got {found.name}.")
  dtype_name("dtype", found)
  return found


@contextlib.contextmanager
def new_folder(dir: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """A folder to write to, which is given the name `dir` once all is written.

  Where anything is raised before that, nothing is left.

  Raises:
    FileExistsError: there is something at `dir` that is no empty folder.
  """
  final = pathlib.Path(os.path.abspath(dir))
  if final.exists() and (not final.is_dir() or any(final.iterdir())):
    raise FileExistsError(f"`dir` {str(dir)!r} exists and is not empty. Choose another one.")
  if final.exists():
    try:  # now, not after all the work: a mounted folder cannot be replaced
      final.rmdir()
    except OSError as error:
      raise FileExistsError(
        f"`dir` {str(dir)!r} cannot be replaced ({error}). Name a new one inside it."
      ) from error
  partial = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")
  partial.mkdir(parents=True)
  try:
    yield partial
    for path in [*partial.iterdir(), partial]:
      _sync(path)
    os.rename(partial, final)
    _sync(final.parent)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _sync(path: pathlib.Path) -> None:
  """Waits until a file, or the list of a folder's files, is on the disk."""
  try:
    descriptor = os.open(path, os.O_RDONLY)
  except PermissionError:  # Windows opens no folders
    return
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_merged(
  folder: pathlib.Path,
  weights: Weights,
  changes: Changes,
  *,
  dtype: np.dtype | None,
  limit: int | None,
  index: Mapping[str, Any],
) -> None:
  """Writes every tensor of `weights`, those of `changes` changed."""

  def wanted(name: str) -> np.dtype:
    have = weights.dtypes[name]
    dtype_name(name, have)
    return have if dtype is None or not jnp.issubdtype(have, jnp.floating) else dtype

  kinds = {name: Kind(wanted(name), shape) for name, shape in weights.shapes.items()}
  if limit is None and weights.files:
    files = dict(weights.files)
    if len(set(files.values())) == 1:
      files = dict.fromkeys(files, SINGLE)
  else:
    files = split_shards(kinds, kinds, limit or 5 * 10**9)
  by_file: dict[str, dict[str, Kind]] = {}
  for name, file in files.items():
    by_file.setdefault(file, {})[name] = kinds[name]
  for file, inside in by_file.items():
    write_shard(folder / file, inside, lambda name: _value(name, kinds[name], weights, changes))
  if set(by_file) != {SINGLE}:
    total = sum(kind.nbytes for kind in kinds.values())
    metadata = {**index.get("metadata", {}), "total_size": total}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": files})


def _value(name: str, kind: Kind, weights: Weights, changes: Changes) -> np.ndarray:
  module, _, field = name.rpartition(".")
  value = changes.whole.get(name)
  if value is None:
    value = weights.read(name)
  delta = changes.deltas.get(module)
  merged = delta is not None and (field == "weight" or (field == "bias" and delta.bias is not None))
  with np.errstate(over="ignore", invalid="ignore"):  # raised below
    if delta is not None and merged:
      add = delta.add_to if field == "weight" else delta.add_to_bias
      new = add(value, kind.dtype)
    elif value.dtype != kind.dtype:
      new = value.astype(kind.dtype)
    else:
      return value
  if not np.isfinite(new).all() and (merged or np.isfinite(value).all()):
    why = "the adapter or the weight holds NaN or Inf, or the sum" if merged else "a value"
    raise ValueError(
      f"`{name}` is not finite as {kind.dtype.name}: {why} is beyond that dtype's range. "
      "Check the adapter, or pass `dtype='bfloat16'`."
    )
  return new


def copy_companions(source: pathlib.Path, folder: pathlib.Path, dtype: np.dtype | None) -> None:
  """Copies what lies beside the weights: configuration, tokenizer, licence.

  Links out of the folder are left out, as what is no regular file.

  The configuration's dtype becomes `dtype`, unless that is None.
  """
  for path in sorted(source.iterdir()):
    hidden = path.name.startswith((".", "adapter_"))
    if path.is_symlink() and leads_out(path):
      continue  # to a file of this machine, which is nobody else's business
    if path.is_file() and not hidden and not path.name.endswith(_WEIGHTS):
      shutil.copyfile(path, folder / path.name)
  config = read_json(source / "config.json")
  if config and dtype is not None:
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
      for key in {"dtype", "torch_dtype"} & part.keys():
        part[key] = dtype.name
    if not {"dtype", "torch_dtype"} & config.keys():
      config["torch_dtype"] = dtype.name  # the older name, which all versions read
    write_json(folder / "config.json", config)
