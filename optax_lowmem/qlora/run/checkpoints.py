"""A run on disk, so that it continues bit for bit where it stopped, wherever it was stopped.

``last/`` holds the newest adapter in PEFT's format, or the model where all of it is trained, and in
``state.safetensors`` what else a run needs to go on: the optimizer's state, the random state and
the number of steps done, from which the position in the data follows, and the metrics up to there.
``best/`` holds the adapter, or the model, that had the lowest held-out loss. Each folder has the
checksums of its files: what is damaged is refused.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from optax_lowmem.qlora.files.disk import flush, sha256_of

STATE, METRICS, SUMS = "state.safetensors", "metrics.jsonl", "checksums.json"
T = TypeVar("T")


def _is_key(x: jax.Array) -> bool:
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _named(tree: object) -> list[tuple[str, jax.Array]]:
  return [(jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]]


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
  """A new folder to write to, which takes the place of `folder` once all is written.

  A process may be killed at any moment: either the old content or the new one is whole, under
  this name or beside it, and `found` finds it.
  """
  new, old = _beside(folder, "partial"), _beside(folder, "old")
  for left in (new, old) if folder.exists() else (new,):
    shutil.rmtree(left, ignore_errors=True)
  new.mkdir(parents=True)
  try:
    yield new
  except BaseException:
    shutil.rmtree(new, ignore_errors=True)
    raise
  for path in [*new.iterdir(), new]:
    flush(path)
  if folder.exists():
    os.replace(folder, old)
  os.replace(new, folder)
  flush(folder.parent)
  shutil.rmtree(old, ignore_errors=True)


def found(folder: Path) -> Path:
  """`folder`; or the one before it, where a process was killed while it was being replaced."""
  old = _beside(folder, "old")
  return old if old.exists() and not folder.exists() else folder


def room(sizes: Mapping[Path, int]) -> int:
  """The most bytes that folders take beside what there is, all of them written again and again.

  One at a time has a new one beside the old.

  Args:
    sizes: what a folder holds, once it is written.
  """
  new = sum(size for folder, size in sizes.items() if not found(folder).exists())
  return new + max(sizes.values())


def whole_metrics(folder: Path) -> Path | None:
  """The metrics in a folder, if they are as `seal` saw them."""
  try:
    sums = json.loads((folder / SUMS).read_text("utf-8"))
    return folder / METRICS if sums[METRICS] == sha256_of(folder / METRICS) else None
  except (OSError, ValueError, LookupError, TypeError, RecursionError):
    return None


def _beside(folder: Path, what: str) -> Path:
  return folder.with_name(f"{folder.name}.{what}")


def seal(folder: Path) -> None:
  """Writes the SHA-256 of every file in a folder into one more file."""
  sums = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
  (folder / SUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def check_sealed(folder: Path) -> None:
  """Raises ValueError where a file is not the one that `seal` saw; folders without it pass.

  The metrics may be damaged: a run goes on without them.
  """
  file = folder / SUMS
  if not file.exists():
    return
  remedy = "Copy the folder again from where it is whole, or start a new run."
  try:
    sums = dict(json.loads(file.read_text("utf-8")))
    for name, sum in sums.items():
      if name == METRICS:
        continue
      if not (folder / name).is_file():
        raise ValueError(f"{folder / name} is missing, which {SUMS} names. {remedy}")
      if sha256_of(folder / name) != sum:
        what = "a complete training state" if name == STATE else "as it was written"
        raise ValueError(
          f"{folder / name} is not {what}: its SHA-256 is not the one in {SUMS}. {remedy}"
        )
  except (json.JSONDecodeError, UnicodeDecodeError, TypeError, RecursionError) as error:
    raise ValueError(f"{file} is damaged ({error}). {remedy}") from error


def _before(name: str) -> str:
  """An array's name in runs of before all parameters could be trained."""
  return re.sub(r"^\.trained\b", ".lora", name)


def save_state(path: Path, tree: object, step: int) -> None:
  """Writes every array of a tree, and the number of steps done, to one safetensors file."""
  arrays = {n: np.asarray(jax.random.key_data(x) if _is_key(x) else x) for n, x in _named(tree)}
  path.write_bytes(save(arrays, metadata={"step": str(step)}))


def steps_done(path: Path) -> int | None:
  """The number of steps done, of what `save_state` wrote; None where it cannot be read."""
  try:
    with safe_open(path, framework="np") as file:
      return int((file.metadata() or {})["step"])
  except (OSError, SafetensorError, LookupError, ValueError):
    return None


def load_state(path: Path, like: T) -> tuple[T, int]:
  """Reads what :func:`save_state` wrote into a tree of the same structure, shapes and dtypes.

  Each array is put where the one of `like` lies: on its devices, in its kind of memory.

  Returns:
    ``(tree, steps done)``.

  Raises:
    FileNotFoundError: where there is no such file.
    ValueError: where it is damaged, or belongs to another model, adapter or optimizer.
  """
  if not path.is_file():
    raise FileNotFoundError(
      f"There is no {path.name} in {path.parent}, so that run cannot be continued. It is "
      "written when a run begins, by --save-every, by Ctrl-C and at the end of a run."
    )
  leaves = []
  try:
    with safe_open(path, framework="np") as file:
      step, names = int((file.metadata() or {})["step"]), set(file.keys())
      for name, wanted in _named(like):
        data = jax.random.key_data(wanted) if _is_key(wanted) else wanted
        key = name if name in names else _before(name)
        found = file.get_tensor(key) if key in names else None
        if found is None or found.shape != data.shape or found.dtype != data.dtype:
          has = "is missing" if found is None else f"is {found.dtype}{list(found.shape)}"
          raise ValueError(
            f"{path} does not fit this run: {name} {has}, expected {data.dtype}{list(data.shape)}."
          )
        if _is_key(wanted):
          found = jax.random.wrap_key_data(found, impl=jax.random.key_impl(wanted))
        leaves.append(jax.device_put(found, wanted.sharding))
  except (SafetensorError, KeyError, OverflowError) as error:
    raise ValueError(f"{path} is not a complete training state: {error}") from error
  return jax.tree.unflatten(jax.tree.structure(like), leaves), step
