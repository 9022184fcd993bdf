"""One process at a time: a lock of the operating system, which ends with the process that has it.

A file that merely exists would be left by a process that is killed, and lock everybody out.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"  # in the folder that is locked


class Locked(OSError):
  """Another process has the folder; the message names both."""


@contextmanager
def held(folder: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
  """Has `folder`, which must exist, to itself until the end of the block.

  Args:
    folder: the folder to lock.
    wait: where another process has it, this is called once with who that is, and the lock is
      waited for; without it, `Locked` is raised.

  Raises:
    Locked: where another process has it.
    OSError: where nothing can be written to the folder.
  """
  descriptor = _taken(folder, wait)
  try:
    yield
  finally:
    try:
      (folder / LOCK).unlink(missing_ok=True)
    except OSError:  # Windows deletes no open file; one that is left locks nobody out
      pass
    os.close(descriptor)


def _taken(folder: Path, wait: Callable[[str], None] | None) -> int:
  path = folder / LOCK
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      if not _lock(descriptor, wait=False):
        owner = _owner(folder)
        if wait is None:
          raise Locked(
            f"{folder} is being written to by {owner}. Wait until it ends or stop it, or choose "
            "another folder."
          )
        wait(owner)
        _lock(descriptor, wait=True)
      # Whoever had it may have deleted the file in the meantime: then this one locks nothing.
      if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
        os.truncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        return descriptor
    except BaseException:
      os.close(descriptor)
      raise
    os.close(descriptor)


def _owner(folder: Path) -> str:
  try:
    number = int((folder / LOCK).read_text())
  except (OSError, ValueError):  # it is writing its number just now
    return "another process"
  return f"another process (number {number})"


def _lock(descriptor: int, *, wait: bool) -> bool:
  """Whether the lock was had."""
  try:
    import fcntl
  except ImportError:
    return _lock_on_windows(descriptor, wait)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    return False
  return True


def _lock_on_windows(descriptor: int, wait: bool) -> bool:
  import importlib

  msvcrt = importlib.import_module("msvcrt")
  while True:
    try:
      os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # far from the number, which others read
      msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
      return True
    except OSError:
      if not wait:
        return False
    finally:
      os.lseek(descriptor, 0, os.SEEK_SET)
