"""``lowmem merge RUN --out DIR``: a model without adapters, as Hugging Face loads it."""

import dataclasses
import glob
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from optax_lowmem import nn as lowmem_nn
from optax_lowmem.qlora.files.disk import written_to
from optax_lowmem.qlora.kinds.model_folder import (
  remove_of_run,
  write_companions,
  write_ends,
  write_template,
)
from optax_lowmem.qlora.loading.checkpoint import Checkpoint
from optax_lowmem.qlora.loading.config_files import config_to_hf
from optax_lowmem.qlora.loading.weights import open_checkpoint
from optax_lowmem.qlora.models.llama_config import expected_shapes
from optax_lowmem.qlora.run.checkpoints import replacing
from optax_lowmem.qlora.run.finished import adapter_of, parser_of
from optax_lowmem.qlora.run.run_folder import new_folder
from optax_lowmem.qlora.run.terminal import say, sentences
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer


def merge(argv: Sequence[str]) -> int:
  """Writes base model plus adapter, the base as it was before it was packed."""
  parser = parser_of(
    "merge",
    "Take a run's adapter into its base model's original weights, in one model that "
    "needs no adapter.",
  )
  parser.add_argument("--out", type=Path, required=True, help="folder for the model, new or empty")
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="bfloat16",
    help="of the model's files (default: %(default)s)",
  )
  given = parser.parse_args(argv)
  with sentences(), ExitStack() as locks:
    s, path, adapter = adapter_of(given.run, "merge", best=given.best, model=given.model)
    new_folder(given.out, locks)
    locks.enter_context(written_to(given.out, "Free some space, then merge again."))
    checkpoint = open_checkpoint(path)
    tokenizer = ChatTokenizer.from_model(path, s.chat_template)
    lone = not path.is_dir()  # a GGUF file: configuration and tokenizer are in it
    config = config_to_hf(checkpoint.config) if lone else {}
    # What a merge has left that was killed; no other one writes to --out now.
    for left in given.out.parent.glob(f".{glob.escape(given.out.name)}.partial.*.partial"):
      shutil.rmtree(left)
    with replacing(given.out) as folder:
      lowmem_nn.merge_peft(
        lazily(checkpoint) if lone else path,
        adapter,
        folder,
        dtype=given.dtype,
        tied=checkpoint.config.tie_word_embeddings,
      )
      if lone:
        write_companions(folder, config | {"torch_dtype": given.dtype}, tokenizer)
      else:
        remove_of_run(folder)
        write_ends(folder, tokenizer)
        write_template(folder, tokenizer)
  say(f"The merged model, of {checkpoint.config.parameter_count():,} parameters: {given.out}.")
  return 0


@dataclasses.dataclass(frozen=True)
class Lazy:
  """A float32 array that is read from a checkpoint whenever NumPy asks for it."""

  checkpoint: Checkpoint
  name: str
  dtype = np.dtype(np.float32)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.checkpoint.shapes[self.name]

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return np.asarray(self.checkpoint.read(self.name), self.dtype if dtype is None else dtype)


def lazily(checkpoint: Checkpoint) -> Mapping[str, Lazy]:
  """The weights of a checkpoint by their Hugging Face names, none of them read yet."""
  return {name: Lazy(checkpoint, name) for name in expected_shapes(checkpoint.config)}
