"""Checkpoints on disk: a Hugging Face directory of safetensors, or a GGUF file.

Nothing is read before it is asked for, so the one who loads decides how much of a model is in
memory at a time.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np

from optax_lowmem._arguments.spelling import nearest
from optax_lowmem.qlora.files.model_files import check_regular, damage_of, member, read_json
from optax_lowmem.qlora.loading.checkpoint import Checkpoint
from optax_lowmem.qlora.loading.config_files import config_from_hf
from optax_lowmem.qlora.loading.gguf_files import open_gguf
from optax_lowmem.qlora.models.llama_config import Shape
from optax_lowmem.qlora.models.llama_config import expected_shapes as expected_shapes

# Buffers that old checkpoints carry and that follow from the configuration.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
  """Opens a model and checks, without reading its weights, that they are all there.

  Args:
    path: a Hugging Face directory with ``config.json`` and safetensors (one file, or several
      with an index), or a ``.gguf`` file.

  Returns:
    The checkpoint.

  Raises:
    FileNotFoundError: if there is nothing at `path`.
    ValueError: if the model is not supported, if a file is truncated, or if tensors are
      missing, misshapen or unexpected.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(f"There is no model at {path}.")
  with damage_of(path):
    if not path.is_dir():
      check_regular(path)
    checkpoint = _open_directory(path) if path.is_dir() else open_gguf(path)
    _check_tensors(checkpoint)
  return checkpoint


def _check_tensors(checkpoint: Checkpoint) -> None:
  found, layers = checkpoint.shapes, checkpoint.config.num_hidden_layers
  if layers > len(found):  # before anything is made for each of them
    raise ValueError(
      f"the configuration says {layers:,} layers, and there are {len(found)} tensors."
    )
  expected = expected_shapes(checkpoint.config)
  missing = [name for name in expected if name not in found]
  extra = [n for n in found if n not in expected and not n.endswith(IGNORED_SUFFIXES)]
  if checkpoint.config.tie_word_embeddings and "lm_head.weight" in extra:
    # Some tied models are saved with both copies. Dropping one is right only if it is a copy.
    extra.remove("lm_head.weight")
    head, table = (checkpoint.read(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
    if not np.array_equal(head, table):
      raise ValueError(
        "`tie_word_embeddings` is true, but lm_head.weight differs from "
        "model.embed_tokens.weight; set it to false to use both."
      )
  if missing:
    near = nearest(missing[0], extra)
    hint = f" (it has {near[0]})" if near else ""
    raise ValueError(f"missing {_listing(missing)}{hint}.")
  wrong = [f"{n} {found[n]}, expected {s}" for n, s in expected.items() if found[n] != s]
  if wrong:
    raise ValueError(f"wrong shape of {_listing(wrong)}.")
  if extra:
    raise ValueError(
      f"unexpected {_listing(extra)}. A model with more tensors than its configuration asks for "
      "computes something else."
    )


def _listing(names: list[str], limit: int = 20) -> str:
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return f"{len(names)} tensor{'s' * (len(names) > 1)}: " + "; ".join(names[:limit]) + more


def weight_files(path: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a directory, those that Hugging Face would load.

  Raises:
    ValueError: where there are none, or the index names what is not a file in the directory.
  """
  single, index = (member(path, f"model.safetensors{end}") for end in ("", ".index.json"))
  if single.exists():
    return [single]
  if not index.exists():
    raise ValueError(
      "the directory has neither model.safetensors nor "
      "model.safetensors.index.json. Save the model as safetensors first "
      "(`save_pretrained(..., safe_serialization=True)`)."
    )
  weight_map = read_json(index).get("weight_map")
  if not (isinstance(weight_map, dict) and weight_map):
    raise ValueError(f"{index.name} has no `weight_map` of tensor names to file names.")
  names = dict.fromkeys(str(name) for name in weight_map.values())
  files = [member(path, name) for name in sorted(names)]
  absent = [file.name for file in files if not file.exists()]
  if absent:
    raise ValueError(f"{index.name} names files that are not there: {', '.join(absent[:20])}.")
  return files


def _open_directory(path: pathlib.Path) -> Checkpoint:
  from safetensors import SafetensorError, safe_open

  config_file = member(path, "config.json")
  if not config_file.exists():
    raise ValueError("the directory has no config.json.")
  with damage_of(config_file):
    said = read_json(config_file)
    config = config_from_hf(said)
  files = weight_files(path)

  shapes: dict[str, Shape] = {}
  where: dict[str, Any] = {}
  for file in files:
    try:
      tensors: Any = safe_open(file, framework="numpy")
      names = tensors.keys()
    except SafetensorError as error:
      raise ValueError(
        f"{file.name} is truncated or not a safetensors file ({error}); "
        f"it has {file.stat().st_size} bytes."
      ) from error
    for name in names:
      if name in where:
        raise ValueError(f"{name} is in more than one file.")
      part = tensors.get_slice(name)
      if not name.endswith(IGNORED_SUFFIXES) and part.get_dtype() not in (
        "F32",
        "F16",
        "BF16",
      ):
        raise ValueError(
          f"{name} is of type {part.get_dtype()}; supported: F32, F16, "
          "BF16. Save the model unquantized."
        )
      where[name], shapes[name] = tensors, tuple(part.get_shape())
  return Checkpoint(said["model_type"], config, shapes, lambda name: where[name].get_tensor(name))
