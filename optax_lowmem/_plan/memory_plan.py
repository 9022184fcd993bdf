"""`MemoryPlan`: what a run holds, as numbers and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from optax_lowmem._arguments.sizes import bytes_of
from optax_lowmem._plan.compiler import Program

Kind = Literal["weights", "adapters", "state", "gradients", "batch", "temporaries"]


@dataclasses.dataclass(frozen=True)
class Part:
  """Bytes of one kind; on several devices, those of each.

  Attributes:
    name: for people.
    kind: what it is: weights (frozen, or trained whole), adapters, optimizer state, gradients,
      batch, or temporaries.
    device: bytes of device memory.
    host: bytes of pinned host memory.
    parameters: how many numbers of the model it stands for; 0 where it is none of them.
  """

  name: str
  kind: Kind
  device: int
  host: int = 0
  parameters: int = 0


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
  """What one training step holds on each device at its peak.

  `print` shows a table, `as_dict()` is for JSON.

  Attributes:
    parts: what is held, by kind. Of a compiled step, the temporaries are all that its arguments are
      not, gradients among them, so that the parts add up to what the compiler says.
    method: ``"shapes"``: weights, state and gradients alone, exact, without activations;
      ``"estimate"``: the same, and temporaries by a formula; ``"compiled"``: by a compiler.
    compiler: whose: a card's name, or ``"cpu"``, whose answer is near that of a GPU, no bound.
    devices: over how many the run is spread.
    seconds: to compile.
    note: what is to be known beside the numbers.
  """

  parts: tuple[Part, ...]
  method: Literal["shapes", "estimate", "compiled"] = "shapes"
  compiler: str | None = None
  devices: int = 1
  seconds: float = 0.0
  note: str = ""

  @property
  def device_bytes(self) -> int:
    """Device memory, on each device."""
    return sum(part.device for part in self.parts)

  @property
  def host_bytes(self) -> int:
    """Pinned host memory, of each device."""
    return sum(part.host for part in self.parts)

  @property
  def state_bytes(self) -> dict[str, int]:
    """The optimizer state's bytes by memory, as `lowmem.state_bytes` counts them."""
    state = [part for part in self.parts if part.kind == "state"]
    return {
      "device": sum(part.device for part in state),
      "pinned_host": sum(part.host for part in state),
    }

  def of(self, kind: Kind) -> int:
    """Device bytes of one kind."""
    return sum(part.device for part in self.parts if part.kind == kind)

  def fits(self, memory: int | str) -> bool:
    """Whether the device memory is enough.

    Args:
      memory: of each device that is left to arrays, in bytes or as ``"24GB"``, ``"24GiB"``.
    """
    return self.device_bytes <= bytes_of("memory", memory)

  def compiled(self, program: Program, note: str = "") -> MemoryPlan:
    """The same with a compiled step's figures in the place of gradients and temporaries."""
    kept = [part for part in self.parts if part.kind not in ("gradients", "temporaries")]
    rest = program.device_bytes - sum(part.device for part in kept)
    host = program.host_bytes - sum(part.host for part in kept)
    name = "gradients, activations, other temporaries"
    if program.compiler == "cpu":  # whose compiler knows of no host memory
      rest, host = rest - sum(part.host for part in kept), 0
      note = f"{note} {_BY_CPU}"
    note = f"{note} {program.note}".strip()
    kept.append(Part(name, "temporaries", max(rest, 0), max(host, 0)))
    return dataclasses.replace(
      self, parts=tuple(kept), method="compiled", compiler=program.compiler,
      seconds=program.seconds, note=note,
    )  # fmt: skip

  def as_dict(self) -> dict[str, Any]:
    """The numbers, for JSON."""
    own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    own["parts"] = [dataclasses.asdict(part) for part in self.parts]
    return own | {"device_bytes": self.device_bytes, "host_bytes": self.host_bytes}

  def __str__(self) -> str:
    each = " (each device)" if self.devices > 1 else ""
    said = _SAID[self.method].format(compiler=self.compiler, seconds=self.seconds)
    return "\n".join(
      [table(self.parts, f"device{each}"), said, *([self.note] if self.note else [])]
    )


_BY_CPU = (
  "The card's own compiler is not installed (`pip install 'optax_lowmem[plan]'`), and that of a "
  "GPU gives other temporaries: mostly less, but more where a kernel needs copies."
)
_SAID = {
  "shapes": "Exact, from shapes; activations and other temporaries are not counted.",
  "estimate": "Exact, from shapes, but for temporaries, which a formula estimates.",
  "compiled": "By the compiler of: {compiler}, in {seconds:.0f} s.",
}


def table(parts: Sequence[Part], device: str = "device") -> str:
  """The parts as lines for people, with their sum.

  Args:
    parts: a line each.
    device: heads the column of device memory.
  """
  host = sum(part.host for part in parts)
  rows = [["", "parameters", device, "host"]]
  for part in parts:
    counted = f"{part.parameters:,}" if part.parameters else ""
    rows.append([part.name, counted, human(part.device), human(part.host)])
  rows.append(["in all", "", human(sum(part.device for part in parts)), human(host)])
  return aligned(rows if host else [row[:3] for row in rows])


def aligned(rows: Sequence[Sequence[str]]) -> str:
  """Rows of as many cells as lines, the first cell to the left, all others to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for first, *cells in rows:
    right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
    lines.append("  ".join([first.ljust(widths[0]), *right]).rstrip())
  return "\n".join(lines)


def human(size: float) -> str:
  """Bytes for people, in binary units.

  >>> human(512), human(3 << 20), human(5 << 30)
  ('512 B', '3.0 MiB', '5.00 GiB')
  """
  for unit, power, digits in (("GiB", 30, 2), ("MiB", 20, 1), ("KiB", 10, 1)):
    if size >= 1 << power:
      return f"{size / (1 << power):,.{digits}f} {unit}"
  return f"{size:.0f} B"
