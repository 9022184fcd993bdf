"""A model's folder, as Hugging Face loads it: weights, configuration, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optax_lowmem.nn._merging.changes import Changes
from optax_lowmem.nn._merging.merged_folder import copy_companions, write_merged
from optax_lowmem.nn._merging.model_weights import model_weights
from optax_lowmem.nn._model.model_tree import ModelTree
from optax_lowmem.qlora.files.model_files import read_json
from optax_lowmem.qlora.kinds.kind import Source
from optax_lowmem.qlora.loading.checkpoint import Checkpoint
from optax_lowmem.qlora.loading.config_files import config_to_hf
from optax_lowmem.qlora.run.checkpoints import METRICS, STATE, SUMS
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer


def check_writable(model: str | None, base: Checkpoint) -> None:
  """Raises ValueError where no config.json can be written for a model that is trained."""
  if model is None or not Path(model).is_dir():  # of a directory, its own is copied
    config_to_hf(base.config)


def save_model(model: Any, folder: Path, source: Source) -> None:
  """Writes a model to a folder: each tensor as it is, and what lies beside those of its base.

  One tensor at a time is on the host.
  """
  weights = model_weights(ModelTree(model, "layers"))
  write_merged(folder, weights, Changes({}, {}), dtype=None, limit=None, index={})
  dtype = np.dtype(model.model.embed_tokens.embedding.dtype)
  if source.path.is_dir():
    copy_companions(source.path, folder, dtype)
    remove_of_run(folder)
    write_ends(folder, source.tokenizer)
    write_template(folder, source.tokenizer)
  else:
    config = config_to_hf(model.config) | {"torch_dtype": dtype.name}
    write_companions(folder, config, source.tokenizer)


def remove_of_run(folder: Path) -> None:
  """Removes what a run has written about the model that was copied."""
  for name in (SUMS, METRICS, STATE):
    (folder / name).unlink(missing_ok=True)


def template_of(tokenizer: ChatTokenizer) -> str:
  """The template of a run's conversations, which may have begun without `bos`."""
  source = tokenizer.template.source
  without = tokenizer.bos is not None and not tokenizer.writes_bos
  return "{% set bos_token = '' %}" + source if without else source


def write_template(folder: Path, tokenizer: ChatTokenizer) -> None:
  """Writes the template, where it is not the model's own.

  This file goes before what tokenizer_config.json says.
  """
  if not tokenizer.template.is_own:
    (folder / "chat_template.jinja").write_text(template_of(tokenizer), encoding="utf-8")


def write_ends(folder: Path, tokenizer: ChatTokenizer) -> None:
  """Names all tokens that end an answer in the files of a base that may know another end.

  Those who generate read generation_config.json where there is one, and config.json elsewhere.
  """
  for name in ("config.json", "generation_config.json"):
    if (folder / name).is_file():
      about = read_json(folder / name)
      known = about.get("eos_token_id")
      known = known if isinstance(known, list) else [known] if known is not None else []
      about["eos_token_id"] = listed(tokenizer, known)
      (folder / name).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def listed(tokenizer: ChatTokenizer, more: Sequence[int] = ()) -> int | list[int]:
  """The tokens that end an answer, as configurations have them: a number, or several."""
  ends = sorted({*tokenizer.stop_ids, *more})
  return ends if len(ends) > 1 else ends[0]


def write_companions(folder: Path, config: dict[str, Any], tokenizer: ChatTokenizer) -> None:
  """Writes the configuration and the tokenizer.

  All tokens that end an answer are named, not `eos` alone: generation would run past the others.
  """
  config |= {"eos_token_id": listed(tokenizer)}
  tokenizer.backend.save(str(folder / "tokenizer.json"))
  about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.eos}
  about |= {"pad_token": tokenizer.backend.id_to_token(tokenizer.pad_id)}
  about |= {"chat_template": template_of(tokenizer)}
  if tokenizer.bos is not None:
    config |= {"bos_token_id": tokenizer.backend.token_to_id(tokenizer.bos)}
    about |= {"bos_token": tokenizer.bos}
  ids = {name: value for name, value in config.items() if name.endswith("_token_id")}
  files = {
    "tokenizer_config.json": about, "config.json": config, "generation_config.json": ids,
  }  # fmt: skip
  for name, content in files.items():
    (folder / name).write_text(json.dumps(content, indent=2) + "\n")
