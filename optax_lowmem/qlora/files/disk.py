"""Files that are on the disk whole or not at all, and what is said where a disk takes no more."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a disk or a file system says of itself; of anything else the program is to blame.
_DISK = {errno.ENOSPC, errno.EIO, errno.EROFS, errno.EFBIG, errno.ENODEV, errno.ESTALE}
_DISK |= {getattr(errno, "EDQUOT", errno.ENOSPC)}


def write_whole(path: Path, content: str | bytes) -> None:
  """Writes a file in one step: after a crash it is the old one or the new one, and whole.

  Written beside, synced, renamed, and the folder synced: a rename alone may reach the disk before
  what is in the file.
  """
  partial = path.with_name(path.name + ".partial")
  data = content.encode() if isinstance(content, str) else content
  try:
    with open(partial, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except BaseException:
    partial.unlink(missing_ok=True)  # on a full disk, half a file is in the way
    raise
  flush(path.parent)


def flush(path: Path) -> None:
  """Waits until a file, or the list of a folder's files, is on the disk."""
  try:
    descriptor = os.open(path, os.O_RDONLY)
  except PermissionError:  # Windows opens no folders
    return
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def sha256_of(path: Path) -> str:
  """The SHA-256 of a file, in hexadecimal."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def check_room(folder: Path, needed: int) -> None:
  """Raises OSError where a folder's disk has less than so many bytes to be written there."""
  there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
  free = shutil.disk_usage(there).free
  if free < needed:
    raise OSError(
      f"{folder}: up to {needed / 1e9:.1f} GB will be written there, and {free / 1e9:.1f} GB are "
      "free. Free some space, or choose another folder."
    )


class DiskError(OSError):
  """A disk that is full or broken; the message names the folder and the remedy."""


@contextmanager
def written_to(folder: Path, remedy: str) -> Iterator[None]:
  """Turns the system's error of a disk into a sentence; writing itself names no file.

  Raises:
    DiskError: where the disk is full, broken or read-only.
  """
  try:
    yield
  except OSError as error:
    if error.errno not in _DISK:
      raise
    reason = (error.strerror or str(error)).lower()
    raise DiskError(f"{folder}: nothing more can be written there ({reason}). {remedy}") from error
