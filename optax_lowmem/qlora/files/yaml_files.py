"""Settings in YAML, of which a small file can stand for a huge one."""

from pathlib import Path
from typing import Any

import yaml

MOST_YAML = 64 << 10  # bytes; the longest settings have some thousand
MOST_DEPTH = 20
MOST_NODES = 10_000  # values, those of aliases counted wherever they stand


class _Loader(yaml.SafeLoader):
  """Refuses a key that is there twice, of which YAML would take the last.

  And a file that is large once its aliases are written out: each may stand for ten others.
  """

  depth = nodes = 0

  def compose_node(self, parent: Any, index: Any) -> Any:
    self.depth += 1
    self.nodes += 1
    if self.nodes > MOST_NODES:
      raise yaml.YAMLError(f"it has more than {MOST_NODES:,} values")
    if self.depth > MOST_DEPTH:
      raise yaml.YAMLError(f"nested too deeply, more than {MOST_DEPTH} levels")
    node = super().compose_node(parent, index)
    self.depth -= 1
    return node

  def construct_object(self, node: Any, deep: bool = False) -> Any:
    try:
      return super().construct_object(node, deep)
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # a date that is none
      raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {error}") from error

  def get_single_node(self) -> Any:
    node = super().get_single_node()
    if node is not None and _size(node, {}) > MOST_NODES:
      raise yaml.YAMLError(f"with its aliases written out it has more than {MOST_NODES:,} values")
    return node

  def construct_mapping(self, node: Any, deep: bool = False) -> Any:
    seen = set()
    for key, _ in node.value:
      if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key.value, str):
        continue
      if key.value in seen:
        line = key.start_mark.line + 1
        raise yaml.YAMLError(f"line {line}: {key.value!r:.100} is there twice")
      seen.add(key.value)
    return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
  """What stands in a YAML file.

  Raises:
    FileNotFoundError: where there is none.
    ValueError: where it is not YAML, too long or too deep; the message begins with its name.
  """
  if not path.is_file():
    raise FileNotFoundError(f"{path}: there is no such file.")
  if (size := path.stat().st_size) > MOST_YAML:
    raise ValueError(f"{path} has {size:,} bytes; at most {MOST_YAML:,} are read.")
  try:
    return yaml.load(path.read_text(encoding="utf-8"), _Loader)
  except RecursionError as error:
    raise ValueError(f"{path} is not YAML: it is nested too deeply.") from error
  except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:
    said = " ".join(str(error).split())
    raise ValueError(f"{path} is not YAML: {said:.500}.") from error


def _size(node: Any, known: dict[int, int]) -> int:
  """How many values a node of YAML has, each alias for as many as it stands for."""
  if id(node) not in known:
    known[id(node)] = MOST_NODES + 1  # of a node that is within itself
    below = node.value if isinstance(node, yaml.CollectionNode) else []
    parts = [part for each in below for part in (each if isinstance(each, tuple) else (each,))]
    known[id(node)] = 1 + sum(_size(part, known) for part in parts)
  return known[id(node)]
