"""A model with its adapters taken into the weights, written without being held."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from flax import nnx

from optax_lowmem._arguments.sizes import bytes_of
from optax_lowmem._peft.adapter_file import read_adapter
from optax_lowmem._peft.tensor_files import Weights, open_weights, read_index, read_json
from optax_lowmem._variants.variant import Variant
from optax_lowmem.nn._adapters.variants import VARIANTS
from optax_lowmem.nn._merging.changes import (
  Changes,
  changes_of_file,
  changes_of_model,
  check_changes,
  check_tied,
  says_tied,
  shares_table,
)
from optax_lowmem.nn._merging.merged_folder import (
  copy_companions,
  float_dtype,
  new_folder,
  write_merged,
)
from optax_lowmem.nn._merging.model_weights import model_weights
from optax_lowmem.nn._model.model_tree import ModelTree
from optax_lowmem.nn._peft.config_targets import check_whole, tied_once
from optax_lowmem.nn._peft.save import is_tied

Source = str | os.PathLike[str] | Mapping[str, Any]


def save_merged(
  model: nnx.Module,
  dir: str | os.PathLike[str],
  original: Source | None = None,
  *,
  dtype: Any = None,
  max_shard_size: int | str | None = None,
  stack: str = "layers",
) -> pathlib.Path:
  """Writes base weights plus adapters as a model that Hugging Face loads.

  Each weight W becomes W + s B A, or DoRA's, summed in float32 and rounded once. The tensors are
  read, merged and written one at a time: beside `model`, one tensor as it is read and as it is
  written is in memory, and a few MiB. `model` is left as it is.

  With `original`, the model before it was quantized, W is read from there, tensors that were
  trained beside the adapters (`modules_to_save`, biases) are taken from `model`, and all others
  are copied. Without it, everything is taken from `model`, and W is decoded from the packed base.

  The directory appears under its name when it is whole. If `original` is a directory, it gets
  everything that lies beside the weights there: configuration, tokenizer, licence.

  Args:
    model: a module with adapters, whose paths are those of the PyTorch model, as for `save_peft`.
    dir: the directory to write; it must be new or empty.
    original: the weights under PyTorch's names: a Hugging Face directory, a safetensors file, or
      a mapping. The mapping's values need a `shape`, a `dtype`, and `numpy.asarray` to work on
      them; they may be lazy.
    dtype: of all floating-point tensors. None keeps that of each; without `original`, a packed
      weight is float32.
    max_shard_size: the bytes of a file, as a number or a text like "5GB". None keeps the files of
      `original`, or is "5GB" where there are none.
    stack: the part of a stacked module's path after which the layer number belongs.

  Returns:
    `dir` as a `pathlib.Path`.

  Raises:
    FileExistsError: there is something in `dir`.
    FileNotFoundError: there are no weights at `original`.
    TypeError: `original` maps to something that is no array.
    ValueError: `model` has no adapter; a name or a shape does not fit `original`; a merged weight
      is not finite in its dtype; an embedding with an adapter is tied to the output layer, which
      the adapter does not change; or, without `original`, `model` holds a Variable whose name in
      a file is not known.
    ImportError: the package safetensors is not installed.

  >>> import pathlib, tempfile
  >>> from flax import nnx
  >>> from safetensors.numpy import load_file
  >>> from optax_lowmem import nn
  >>> model = nnx.Dict(q_proj=nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
  >>> model = nn.add_lora(model, rank=2, alpha=4, targets="q_proj", rngs=nnx.Rngs(1))
  >>> with tempfile.TemporaryDirectory() as folder:
  ...     path = nn.save_merged(model, pathlib.Path(folder) / "merged", dtype="bfloat16")
  ...     weights = load_file(path / "model.safetensors")
  >>> {name: (x.shape, x.dtype.name) for name, x in sorted(weights.items())}
  {'q_proj.bias': ((4,), 'bfloat16'), 'q_proj.weight': ((4, 8), 'bfloat16')}
  """
  tree = ModelTree(model, stack)
  changes = changes_of_model(tree, original is not None)
  if not changes.deltas:
    raise ValueError("`model` holds no LoRALinear, there is nothing to merge.")
  tied = is_tied(model) or shares_table(tree) or None
  output = (dir, dtype, max_shard_size)
  if original is None:
    return _save("`model`", model_weights(tree), changes, None, tied, *output)
  return _save("`original`", open_weights(original), changes, original, tied, *output)


def merge_peft(
  original: Source,
  adapter: str | os.PathLike[str],
  dir: str | os.PathLike[str],
  *,
  variant: Variant | None = None,
  dtype: Any = None,
  max_shard_size: int | str | None = None,
  tied: bool | None = None,
) -> pathlib.Path:
  """Merges an adapter of PEFT into the weights it was trained for, from disk to disk.

  As `save_merged`, but the adapter is read from its files, and no model is needed: one tensor as
  it is read and as it is written is in memory, the adapter, and a few MiB.

  Args:
    original: as in `save_merged`.
    adapter: the directory of `adapter_config.json` and `adapter_model.safetensors`, as PEFT's
      `save_pretrained` or `save_peft` wrote it.
    dir: as in `save_merged`.
    variant: as in `load_peft`.
    dtype: as in `save_merged`.
    max_shard_size: as in `save_merged`.
    tied: whether the output layer is the embedding, so that there is one table for both. None is
      what `config.json` says; without one, no.

  Returns:
    `dir` as a `pathlib.Path`.

  Raises:
    FileExistsError: there is something in `dir`.
    FileNotFoundError: a file is missing.
    TypeError: `original` maps to something that is no array.
    ValueError: the adapter is of a kind that is not supported, is not whole, or does not fit
      `original`; and as in `save_merged`.
    ImportError: the package safetensors is not installed.

  >>> import pathlib, tempfile
  >>> import jax.numpy as jnp
  >>> from flax import nnx
  >>> from optax_lowmem import nn
  >>> model = nnx.Dict(q_proj=nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0)))
  >>> weights = {"q_proj.weight": model.q_proj.kernel[...].T}
  >>> model = nn.add_lora(model, rank=2, alpha=4, targets="q_proj", rngs=nnx.Rngs(1))
  >>> with tempfile.TemporaryDirectory() as folder:
  ...     adapter = nn.save_peft(model, pathlib.Path(folder) / "adapter")
  ...     path = nn.merge_peft(weights, adapter, pathlib.Path(folder) / "merged")
  ...     sorted(file.name for file in path.iterdir())
  ['model.safetensors']
  """
  file = tied_once(read_adapter(adapter, variant or VARIANTS))
  file.check_patterns(list(file.layers))
  changes, follows = changes_of_file(file), bool(file.config.get("ensure_weight_tying"))
  weights, output = open_weights(original), (dir, dtype, max_shard_size)
  check_whole(file, weights.shapes)
  try:
    return _save("`original`", weights, changes, original, tied, *output, follows)
  except ValueError as error:
    raise ValueError(f"merging the adapter in {file.dir!r}: {error}") from error


def _save(
  source: str,
  weights: Weights,
  changes: Changes,
  original: Source | None,
  tied: bool | None,
  dir: str | os.PathLike[str],
  dtype: Any,
  max_shard_size: int | str | None,
  head_follows: bool = True,
) -> pathlib.Path:
  as_dtype, size = float_dtype(dtype), max_shard_size
  limit = None if size is None else bytes_of("max_shard_size", size, least=1)
  check_changes(weights, changes, source)
  folder = None
  if original is not None and not isinstance(original, Mapping) and os.path.isdir(original):
    folder = pathlib.Path(original)
  if tied is None:
    tied = folder is not None and says_tied(read_json(folder / "config.json"), weights)
  check_tied(weights, changes, tied, head_follows)
  index = {} if folder is None else read_index(folder)
  with new_folder(dir) as new:
    if folder is not None:
      copy_companions(folder, new, as_dtype)
    write_merged(new, weights, changes, dtype=as_dtype, limit=limit, index=index)
  return pathlib.Path(dir)
