"""What a compiled program launches and moves, counted from its HLO.

A kernel reads its operands and writes its results: of an operand that it slices, the slice; of one
that it updates in place, the update. In loops times the trips. `optax.adamw` in float32 comes out
at 28.00 bytes a parameter in one launch, which is what the algorithm moves.
"""

from __future__ import annotations

import dataclasses
import re

from .hlo import Instruction, nbytes, parse

# No launch, or one of no bytes.
_FREE = frozenset(
  """
  parameter constant get-tuple-element tuple bitcast after-all opt-barrier iota partition-id
  copy-done fusion-done slice-done async-done async-update all-gather-done all-reduce-done
  collective-permute-done
  """.split()
)
_COLLECTIVES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
  "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip
_HOST = "S(5)"  # XLA's memory space of pinned host memory
_ON_CHIP = ("S(1)", "S(2)", "S(6)")  # a TPU's vector memory, semaphores and scalar memory


@dataclasses.dataclass
class Traffic:
  """What a program does in one run.

  Attributes:
    kernels: launches, of library calls and copies too.
    hbm: bytes read from and written to device memory.
    to_device, to_host: bytes over the link.
    collectives: how often each kind is called.
    host_compute: instructions that XLA has the host run.
    unknown_loops: loops of which XLA does not know the trips; counted once.
  """

  kernels: int = 0
  hbm: float = 0.0
  to_device: float = 0.0
  to_host: float = 0.0
  collectives: dict[str, int] = dataclasses.field(default_factory=dict)
  host_compute: list[str] = dataclasses.field(default_factory=list)
  unknown_loops: int = 0


def traffic(text: str) -> Traffic:
  """Counts what the module of this text launches and moves."""
  computations, entry = parse(text)
  found = Traffic()
  _count(computations, entry, found, 1)
  return found


def _count(
  computations: dict[str, list[Instruction]], name: str, found: Traffic, times: int
) -> None:
  shapes = {i.name: i.shape for i in computations[name]}
  for i in computations[name]:
    if i.op in _FREE:
      continue
    if '"_xla_compute_type":"host"' in i.attributes.replace(" ", "").replace("=", ":"):
      found.host_compute.append(i.name)
    if i.op == "while":
      found.unknown_loops += i.trips is None
      for body in i.calls:
        _count(computations, body, found, times * (i.trips or 1))
    elif i.op in ("call", "conditional", "async-start"):
      for body in i.calls:
        _count(computations, body, found, times)
    else:
      _add(computations, i, shapes, found, times)


def _add(
  computations: dict[str, list[Instruction]],
  i: Instruction,
  shapes: dict[str, str],
  found: Traffic,
  times: int,
) -> None:
  found.kernels += times
  kind = next((c for c in _COLLECTIVES if i.op.startswith(c)), None)
  if kind:
    found.collectives[kind] = found.collectives.get(kind, 0) + times
  operands = [shapes.get(o, "") for o in i.operands]
  if i.op == "copy-start":  # (destination, source, context)
    moved = nbytes(operands[0]) * times
    destination = i.shape.lstrip("(").split("}")[0]
    if _HOST in operands[0]:
      found.to_device += moved
    elif _HOST in destination:
      found.to_host += moved
    elif not _on_chip(destination):
      found.hbm += moved
    found.hbm += moved * (not _on_chip(operands[0]))
    return
  if i.op == "slice-start":  # ((operands), result, context)
    sliced = i.shape.split("), ")[1].split("}")[0]
    found.hbm += nbytes(sliced) * times * (2 - _on_chip(sliced))
    return
  if i.op in ("fusion", "fusion-start") and i.calls:
    reads, written = _of_fusion(computations[i.calls[0]])
    parts = [reads.get(k, 0.0) for k in range(len(operands))]
    results = written
  else:
    parts = [nbytes(shape) for shape in operands]
    results = [(shape, nbytes(shape)) for shape in _results(i)]
  for shape, size in zip(operands, parts, strict=True):
    if _HOST in shape:
      found.to_device += size * times
    elif not _on_chip(shape):
      found.hbm += size * times
  places = _results(i)
  for k, (_, size) in enumerate(results):
    place = places[k if len(places) == len(results) else 0]
    if _HOST in place:
      found.to_host += size * times
    elif not _on_chip(place):
      found.hbm += size * times


def _on_chip(shape: str) -> bool:
  return any(space in shape for space in _ON_CHIP)


def _results(i: Instruction) -> list[str]:
  """The shapes of an instruction's results, which say in what memory they lie."""
  shape = i.shape
  if i.op == "fusion-start":  # ((operands), results, context)
    shape = shape[shape.index(")") + 1 :] if ")" in shape else shape
  return [part for part in re.split(r"(?<=\})", shape) if "[" in part] or [""]


def _of_fusion(body: list[Instruction]) -> tuple[dict[int, float], list[tuple[str, float]]]:
  """Bytes that a fused computation reads of each operand, and shape and bytes of each result."""
  by_name = {i.name: i for i in body}
  number = {i.name: int(i.arguments) for i in body if i.op == "parameter"}
  same = {}  # bitcasts of a parameter
  for i in body:
    if i.op in ("bitcast", "reshape") and i.operands and i.operands[0] in number | same:
      same[i.name] = same.get(i.operands[0], i.operands[0])
  reads = {}
  for parameter, k in number.items():
    names = {parameter} | {a for a, b in same.items() if b == parameter}
    part, whole = 0.0, False
    for use in (i for i in body if set(i.operands) & names and i.name not in same):
      if use.op in ("dynamic-slice", "slice", "gather") and use.operands[0] in names:
        part += nbytes(use.shape)
      elif use.op == "dynamic-update-slice" and use.operands[1] not in names:
        pass  # what lies beside the update is left as it is
      else:
        whole = True
    full = nbytes(by_name[parameter].shape)
    reads[k] = full if whole else min(part, full)

  def written(name: str) -> list[tuple[str, float]]:
    i = by_name[name]
    if i.op == "tuple":
      return [w for operand in i.operands for w in written(operand)]
    if i.op == "bitcast" and i.operands[0] in by_name:
      return written(i.operands[0])
    if i.op == "dynamic-update-slice":
      return [(i.shape, nbytes(by_name[i.operands[1]].shape))]
    return [(i.shape, nbytes(i.shape))]

  return reads, written(next(i.name for i in body if i.is_root))
