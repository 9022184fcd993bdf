"""Files that somebody else made: which of a folder are read, and small JSON among them.

A folder from the internet can name any file of this machine, in an index or by a symbolic link,
and hold what never ends (a pipe) or is far larger in memory than on disk.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

# An empty list takes 3 bytes in a file and 64 in memory: values are counted before they are made.
MOST_JSON, MOST_VALUES = 32 << 20, 1 << 21
# Names of tensors are compared, and matched with patterns: the longest known have about 150.
MOST_NAME = 1000


def member(folder: pathlib.Path, name: Any) -> pathlib.Path:
  """The file `name` in `folder`, there or not.

  Raises:
    ValueError: `name` leads out of the folder, or to what is no regular file. Links within the
      folder, and those of Hugging Face's cache to its own blobs, are followed.
  """
  bare = (
    isinstance(name, str)
    and name not in ("", ".", "..")
    and len(name) < 256
    and not set(name) & set("/\\\0:")
  )
  if not bare:
    raise ValueError(
      f"{str(folder)!r} names the file {name!r:.200}. Only bare names are read, of files in that "
      "folder."
    )
  path = folder / name
  if path.is_symlink() and leads_out(path):
    raise ValueError(
      f"{str(path)!r} is a symbolic link to {os.path.realpath(path)!r}, out of its folder. If that "
      "is the file you want, copy it there."
    )
  if path.exists():
    check_regular(path)
  return path


def leads_out(link: pathlib.Path) -> bool:
  """Whether a link in a model's folder is to what does not belong to the model."""
  root, target = (pathlib.Path(os.path.realpath(each)) for each in (link.parent, link))
  blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
  return target.parent not in (root, blobs)


def check_regular(path: pathlib.Path) -> None:
  """Refuses a pipe, a device or a folder, of which reading may never end."""
  if not path.is_file():
    raise ValueError(f"{str(path)!r} is no regular file.")


def check_name(path: pathlib.Path, name: str) -> None:
  """Refuses a tensor's name that is longer than any has."""
  if len(name) > MOST_NAME:
    raise ValueError(
      f"{str(path)!r} holds a tensor with a name of {len(name):,} characters, {name[:50]!r}…; at "
      f"most {MOST_NAME:,} are read."
    )


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object.

  Raises:
    ValueError: it is no regular file, too long, not JSON, nested too deeply, or no object.
  """
  check_regular(path)
  if (size := path.stat().st_size) > MOST_JSON:
    raise ValueError(f"{str(path)!r} has {size:,} bytes; at most {MOST_JSON:,} are read of JSON.")
  try:
    text = path.read_text(encoding="utf-8")
    if sum(map(text.count, "[{,")) > MOST_VALUES:
      raise ValueError(f"it has more than {MOST_VALUES:,} values")
    content = json.loads(text)
  except RecursionError as error:
    raise ValueError(f"{str(path)!r} is not a JSON file: it is nested too deeply.") from error
  except ValueError as error:
    raise ValueError(f"{str(path)!r} is not a JSON file: {error}.") from error
  if not isinstance(content, dict):
    raise ValueError(f"{str(path)!r} must hold a JSON object.")
  return content
