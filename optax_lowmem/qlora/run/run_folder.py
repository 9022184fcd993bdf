"""The folder that a run writes to: chosen, locked, and cleared of what a killed beginning left."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from optax_lowmem.qlora.files.locks import LOCK, Locked, held
from optax_lowmem.qlora.run.checkpoints import STATE
from optax_lowmem.qlora.run.settings import Settings

# What a run writes before run.json, which makes it one that can be resumed.
_BEFORE = {LOCK, "last", "last.partial", "last.old", "best", "best.partial", "best.old"}
_BEFORE |= {"metrics.jsonl", "metrics.jsonl.partial", "run.json.partial", "tensorboard"}


def output_folder(s: Settings, locks: ExitStack) -> Path:
  """The folder to write to, locked. A run never writes into one that holds something else.

  What a run has left that was killed before it could be resumed is cleared away.

  Args:
    s: the settings.
    locks: ends the locks: that of the folder, and that of the run which is resumed.

  Raises:
    FileExistsError: where `--out` is a file or a folder with something in it.
    Locked: where another process writes to it.
    OSError: where nothing can be written there.
  """
  before, out = Path(s.resume or ""), Path(s.out or "")
  if s.resume and out.resolve() == before.resolve():
    locks.enter_context(_own(before, "--resume"))
    return out
  if s.resume and os.access(before, os.W_OK):  # of a run that is only read, nobody writes either
    locks.enter_context(_own(before, "--resume"))
  if s.out is None:
    for name in ["qlora-out"] + [f"qlora-out-{i}" for i in range(2, 1000)]:
      out = Path(name)
      if _occupied(out):
        continue
      try:
        return _begun(out, locks)
      except (Locked, FileExistsError):  # another process was faster
        continue
    raise FileExistsError("There are 999 folders qlora-out-… here. Choose another with --out.")
  return _begun(out, locks)


def new_folder(out: Path, locks: ExitStack) -> None:
  """Locks `--out`, new or empty.

  Raises:
    FileExistsError, Locked, OSError: as `output_folder`.
  """

  def empty() -> bool:
    return not out.exists() or (out.is_dir() and all(p.name == LOCK for p in out.iterdir()))

  if not empty():
    raise _taken(out)
  locks.enter_context(_own(out, "--out"))
  if not empty():  # another process was faster
    raise _taken(out)


def is_unfinished(folder: Path) -> bool:
  """Whether all that a folder holds was left by a run that was killed before its first save."""
  names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
  last = folder / "last"
  whole = not last.exists() or (last / STATE).exists()
  return bool(names - {LOCK}) and names <= _BEFORE and whole


@contextmanager
def _own(folder: Path, flag: str) -> Iterator[None]:
  """Has a folder to itself; makes it, and where nothing was written takes it away again."""
  made = not folder.exists()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = held(folder)
    lock.__enter__()
  except Locked as error:
    raise Locked(f"{flag} {error}") from error
  except OSError as error:
    raise OSError(
      f"{flag} {folder}: nothing can be written there ({error.strerror}). Choose another folder."
    ) from error
  try:
    yield
  finally:
    lock.__exit__(None, None, None)
    if made:
      try:
        folder.rmdir()
      except OSError:  # there is something in it
        pass


def _begun(out: Path, locks: ExitStack) -> Path:
  """`out`, locked and without leftovers."""
  if _occupied(out) and not (out / LOCK).exists():  # before anything is written there
    raise _taken(out)
  locks.enter_context(_own(out, "--out"))
  if _occupied(out):  # asked after the lock: before, another process may have been at it
    raise _taken(out)
  for path in out.iterdir():
    if path.name != LOCK:
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  return out


def _taken(out: Path) -> FileExistsError:
  hint = f", or continue that run with --resume {out}" if (out / "run.json").exists() else ""
  return FileExistsError(f"--out {out} exists and is not empty. Choose another folder{hint}.")


def _occupied(path: Path) -> bool:
  if not path.exists():
    return False
  empty = path.is_dir() and all(each.name == LOCK for each in path.iterdir())
  return not empty and not is_unfinished(path)
