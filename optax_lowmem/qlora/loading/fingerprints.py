"""Which base model a run has learned on: a short name of its files' content, quick to find.

Hashing all of a large model takes minutes. What is hashed here: every file of up to 64 MiB whole;
of a larger one its size, its first 16 MiB, where safetensors and GGUF keep names and shapes, and
1,024 pieces of 16 KiB at even distances up to the end. Another model of the same shapes differs
nearly everywhere. A single changed byte between the pieces of a large file is not seen.
"""

import hashlib
from pathlib import Path

from optax_lowmem.qlora.loading.weights import weight_files

WHOLE, START = 64 << 20, 16 << 20
PIECES, PIECE = 1024, 16 << 10
# What changes a run's result beside the weights.
BESIDE = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
BESIDE += ("chat_template.jinja",)


def of_model(path: Path) -> dict[str, str]:
  """``{file: digest}`` of a model's files; of a lone file, whatever its name, ``{"model": …}``."""
  if not path.is_dir():
    return {"model": of_file(path)}
  beside = [path / name for name in BESIDE if (path / name).is_file()]
  return {file.name: of_file(file) for file in [*weight_files(path), *beside]}


def of_file(path: Path) -> str:
  """A digest of a file's size and content, of large files in pieces."""
  size = path.stat().st_size
  digest = hashlib.sha256(str(size).encode())
  with open(path, "rb") as file:
    if size <= WHOLE:
      digest.update(file.read())
      return digest.hexdigest()
    digest.update(file.read(START))
    for i in range(PIECES):
      file.seek(START + (size - START - PIECE) * i // (PIECES - 1))
      digest.update(file.read(PIECE))
  return digest.hexdigest()


def check_same_base(saved: dict[str, str] | None, path: Path, run: Path) -> None:
  """Raises ValueError where a run that is resumed had another base model."""
  if saved is None:  # a run of before there were fingerprints
    return
  now = of_model(path)
  for name in sorted(saved.keys() | now.keys()):
    if saved.get(name) != now.get(name):
      what = "is not the one" if name in saved and name in now else "is not in both, as it was not"
      raise ValueError(
        f"{path}{'/' * path.is_dir()}{name if path.is_dir() else ''} {what} that the run in {run} "
        "began with. Name the same base model with --model, or start a new run."
      )
