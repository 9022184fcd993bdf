"""Optimized HLO, read from its text: computations, and what their instructions are made of."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

_BYTES = {"pred": 1, "token": 0, "bf16": 2, "s4": 0.5, "u4": 0.5}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")


def nbytes(shape: str) -> float:
  """Bytes of a shape, of a tuple's members together.

  >>> nbytes("f32[4,8]{1,0}"), nbytes("(u8[16]{0}, bf16[2]{0})")
  (128, 20)
  """
  return sum(
    math.prod(int(n) for n in dims.split(",") if n) * _width(dtype)
    for dtype, dims in _ARRAY.findall(shape)
  )


@functools.cache
def _width(dtype: str) -> float:
  digits = re.match(r"[a-z]+(\d*)", dtype)
  return _BYTES.get(dtype, max(1, int((digits and digits[1]) or 32) // 8))


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name, shape, op: as they stand there.
    operands: names of the instructions it reads.
    arguments: what stands between its parentheses, as text.
    attributes: what follows them.
    is_root: whether it is the computation's result.
  """

  name: str
  shape: str
  op: str
  operands: tuple[str, ...]
  arguments: str
  attributes: str
  is_root: bool

  @property
  def calls(self) -> list[str]:
    """Names of the computations it calls: a fusion's, a loop's body, a branch's."""
    named = re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", self.attributes)
    branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
    return named + (re.findall(r"%?([\w.\-]+)", branches[1]) if branches else [])

  @property
  def trips(self) -> int | None:
    """How often a loop's body runs, if XLA knows."""
    found = re.search(r'known_trip_count":\{"n":"(\d+)"', self.attributes)
    return int(found[1]) if found else None

  @property
  def target(self) -> str:
    """What a custom call calls."""
    found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return found[1] if found else ""


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """The computations of a module by name, and the name of its entry."""
  computations: dict[str, list[Instruction]] = {}
  current, entry = None, ""
  for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
    if head := _HEAD.match(line):
      current = computations.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif current is not None and (found := _LINE.match(line)):
      root, name, shape, op, rest = found.groups()
      end = _closing(rest)
      operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
      current.append(
        Instruction(name, shape, op, operands, rest[:end], rest[end + 1 :], bool(root))
      )
  return computations, entry


def _closing(text: str) -> int:
  """Where the parenthesis closes that was open before `text`."""
  depth = 1
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return i
  return len(text)
