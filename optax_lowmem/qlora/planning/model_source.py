"""A model to plan for: by its name, by a ``config.json``, or by its directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._arguments.spelling import did_you_mean
from optax_lowmem.qlora.files.model_files import check_regular, damage_of, member, read_json
from optax_lowmem.qlora.loading.config_files import config_from_hf
from optax_lowmem.qlora.loading.weights import open_checkpoint
from optax_lowmem.qlora.models.llama_config import LlamaConfig, expected_shapes
from optax_lowmem.qlora.planning.known_models import ALSO, MODELS

# What names have before and after what says a model's shape.
_BEFORE, _AFTER = re.compile(r"^meta-"), re.compile(r"-(hf|instruct|chat|it|base|pt)(?=-|$)")


def config_of(source: str | Path | Mapping[str, Any]) -> LlamaConfig:
  """The configuration of a model; no weights are needed, and nothing is fetched.

  Args:
    source: the name of a well-known model, in any case and with or without its owner
      (``"meta-llama/Llama-2-7b-hf"``); a ``config.json``, or a directory that holds one; a GGUF
      file; or the dictionary of a ``config.json``.

  Raises:
    ValueError: for an unknown name, with the nearest, and for a file that cannot be used.
    FileNotFoundError: for a path where nothing is.
  """
  if isinstance(source, Mapping):
    return config_from_hf(source)
  path = Path(source)
  if not path.exists():
    return config_from_hf(MODELS[_known(str(source))])
  with damage_of(path):
    if path.is_dir():
      path = member(path, "config.json")
      if not path.exists():
        raise ValueError(f"the directory has no config.json: {path.parent}.")
    check_regular(path)
    if path.suffix.lower() == ".gguf":
      return open_checkpoint(path).config
    return config_from_hf(read_json(path))


def model_shapes(
  source: str | Path | Mapping[str, Any], dtype: Any = jnp.float32
) -> dict[str, Any]:
  """The shapes of a model's parameters, for `optax_lowmem.plan` and its kin.

  Args:
    source: as in `config_of`: ``"llama-2-7b"``, a ``config.json``, a directory.
    dtype: of all parameters.

  Returns:
    A `jax.ShapeDtypeStruct` for each tensor, under its name in Hugging Face's files.

  Raises:
    ValueError, FileNotFoundError: as `config_of`.

  Examples:
    >>> import optax_lowmem as lowmem
    >>> params = model_shapes("llama-2-7b")
    >>> print(lowmem.compare_optimizer_memory(params, ["adamw", "adamw_8bit", "adamw_4bit"]))
    optimizer     device     host  B/param
    adamw       53.91 GB  0.00 GB    8.000
    adamw_8bit  14.32 GB  0.00 GB    2.125
    adamw_4bit   7.58 GB  0.00 GB    1.125
  """
  shapes = expected_shapes(config_of(source))
  return {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, shape in shapes.items()}


def name_of(source: str | Path | Mapping[str, Any]) -> str:
  """What a plan calls the model: its name here, or its path."""
  if isinstance(source, Mapping):
    return str(source.get("model_type"))
  return str(source) if Path(source).exists() else _known(str(source))


def _known(source: str) -> str:
  plain = source.lower().rpartition("/")[2].replace("_", "-")
  plain = _AFTER.sub("", _BEFORE.sub("", plain))
  name = ALSO.get(plain, plain)
  if name in MODELS:
    return name
  if source.endswith((".json", ".gguf")) or source.startswith(("/", ".")):
    raise FileNotFoundError(f"There is no file {source}.")
  hint = did_you_mean(plain, MODELS, count=2)
  raise ValueError(
    f"The model {source!r:.100} is unknown.{hint} Give a name of these, or a config.json, or a "
    f"directory that holds one: {', '.join(MODELS)}."
  )
