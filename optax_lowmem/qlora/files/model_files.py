"""The files of a model that somebody else made: which of them are read, and small JSON among them.

A folder from the internet can name any file of this machine, in an index or by a symbolic link,
and hold what never ends (a pipe) or is far larger in memory than on disk.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# An empty list takes 3 bytes in a file and 64 in memory: values are counted before they are made.
MOST_JSON, MOST_VALUES = 32 << 20, 1 << 21


def member(folder: Path, name: Any) -> Path:
  """The file `name` in `folder`, there or not.

  Raises:
    ValueError: where `name` leads out of the folder, or to what is no regular file. Links within
      the folder, and those of Hugging Face's cache to its own blobs, are followed.
  """
  bare = (
    isinstance(name, str)
    and name not in ("", ".", "..")
    and len(name) < 256
    and not set(name) & set("/\\\0:")
  )
  if not bare:
    raise ValueError(
      f"{folder} names the file {name!r:.200}. Only bare names are read, of files in that folder."
    )
  path = folder / name
  if path.is_symlink():
    root, target = (Path(os.path.realpath(each)) for each in (folder, path))
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if target.parent not in (root, blobs):
      raise ValueError(
        f"{path} is a symbolic link to {target}, out of the model's folder. If that is the file "
        "you want, copy it there."
      )
  if path.exists():
    check_regular(path)
  return path


def check_regular(path: Path) -> None:
  """Raises ValueError for a pipe, a device or a folder, of which reading may never end."""
  if not path.is_file():
    raise ValueError(f"{path} is no regular file.")


def read_text(path: Path, most: int = MOST_JSON) -> str:
  """The text of a small file.

  Raises:
    ValueError: where it is no regular file, too long, or not UTF-8.
  """
  check_regular(path)
  if (size := path.stat().st_size) > most:
    raise ValueError(f"{path} has {size:,} bytes; at most {most:,} are read of such a file.")
  try:
    return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not valid UTF-8: {error}.") from error


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object.

  Raises:
    ValueError: as `read_text`, and where it is not JSON, nested too deeply, or no object.
  """
  text = read_text(path)
  if sum(map(text.count, "[{,")) > MOST_VALUES:
    raise ValueError(f"{path} has more than {MOST_VALUES:,} values.")
  try:
    content = json.loads(text)
  except RecursionError as error:
    raise ValueError(f"{path} is not valid JSON: it is nested too deeply.") from error
  except ValueError as error:
    raise ValueError(f"{path} is not valid JSON: {error}.") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
  return content


@contextmanager
def damage_of(path: Path) -> Iterator[None]:
  """Makes a sentence with the file's name of whatever a damaged file does to its reader.

  A file can be wrong in more ways than there are checks: a text where a number belongs, a list
  where a mapping does.
  """
  try:
    yield
  except MemoryError as error:
    raise ValueError(f"{path} asks for more memory than there is.") from error
  except ValueError as error:
    said = str(error)
    if len(said) > 3000:  # with a value from the file in it that is as long as the file
      said = f"{said[:1000]} … {said[-1000:]}"
    raise ValueError(said if str(path) in said else f"{path}: {said}") from error
  except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
    raise ValueError(
      f"{path} is damaged, or of another kind than it should be "
      f"({type(error).__name__}: {error!s:.200})."
    ) from error
