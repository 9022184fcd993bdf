"""Which equations of a jaxpr can be run on a few rows of its paged arguments at a time.

An equation that is elementwise, or an update of the engine's (`announced`), makes rows of the same
rows of its operands. Such equations that follow from paged arguments grow to *regions*, each the
update of one parameter. A region is run in a loop, as a whole: so nothing that it needs may be made
of what it makes. What is left between regions (norms, factors, matrix products) is run on whole
arrays.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optax_lowmem._host_memory.pages import Paged
from optax_lowmem._programs.primitives import ELEMENTWISE, is_var

RESULT = -1  # reads a variable, as the equations at 0, 1, … do


@dataclasses.dataclass
class Region:
  """Equations that are run together, a few rows at a time.

  Attributes:
    paged: positions of the paged arguments that it reads.
    equations: indices, in order.
    stores: positions of the paged results that it makes of arguments at the same positions.
    outputs: the variables that are needed besides, on the device.
  """

  paged: list[int]
  equations: list[int]
  stores: list[int] = dataclasses.field(default_factory=list)
  outputs: list[Any] = dataclasses.field(default_factory=list)


def find_regions(
  jaxpr: Any,
  pages: Mapping[int, Paged],
  stored: Sequence[int],
  is_update: Callable[[Any], bool],
  can_be_cut: Callable[[list[int], list[int]], bool],
) -> list[Region]:
  """The regions of a jaxpr that was opened.

  Args:
    jaxpr: the jaxpr.
    pages: its paged arguments, by position.
    stored: positions of the results that are to be paged.
    is_update: whether an equation is an update that was announced.
    can_be_cut: whether the arrays of these paged arguments and equations can be cut alike.
  """
  groups = _Groups(jaxpr, pages)
  for i, eqn in enumerate(jaxpr.eqns):
    groups.add(i, eqn, is_update(eqn))
  users = _users(jaxpr, stored)
  regions: list[Region] = []
  own: list[set[Any]] = []
  for paged, equations in groups.found():
    made = {v for i in equations for v in jaxpr.eqns[i].outvars}
    new = {k: jaxpr.outvars[k] for k in stored if k in paged}
    # A region that would leave one of its pages to be stored whole had better not be one: of codes
    # it might return the values, at four times their bytes.
    old = {k: jaxpr.invars[k] for k in paged}
    whole = any(k not in new or not (new[k] is old[k] or new[k] in made) for k in paged)
    if equations and not whole and can_be_cut(paged, equations):
      region = Region(paged, equations, [k for k in paged if new[k] is not old[k]])
      _peel(jaxpr, region, users, is_update)
      regions.append(region)
      made = {v for i in region.equations for v in jaxpr.eqns[i].outvars}
      own.append(made | set(old.values()))
  _absorb(jaxpr, regions)
  for region, variables in zip(regions, own, strict=True):
    _set_outputs(jaxpr, region, variables, set(stored))
  return regions


class _Groups:
  """Paged arguments that meet in equations that are run on rows.

  Sets of paged arguments are the bits of integers. `_reach` has what a variable is made of,
  `_needs` what a group needs of others, through variables that it does not make.
  """

  def __init__(self, jaxpr: Any, pages: Mapping[int, Paged]):
    self._order = sorted(pages)
    self._bits = {k: 1 << i for i, k in enumerate(self._order)}
    self._member = {jaxpr.invars[k]: self._bits[k] for k in self._order}  # variables in groups
    self._kind = {
      jaxpr.invars[k]: (len(pages[k].lanes), pages[k].axis) for k in self._order
    }  # how they are dealt out
    self._group = {bit: bit for bit in self._bits.values()}  # bit -> the group's bits
    self._needs = {bit: 0 for bit in self._bits.values()}
    self._equations: dict[int, list[int]] = {bit: [] for bit in self._bits.values()}
    self._reach: dict[Any, int] = {}

  def add(self, i: int, eqn: Any, is_update: bool) -> None:
    operands = [v for v in eqn.invars if is_var(v)]
    met = {self._group[self._member[v]] for v in operands if v in self._member}
    outside = [v for v in operands if v not in self._member]
    needs = 0
    for v in outside:
      needs |= self._reach.get(v, 0)
    if not met:
      for v in eqn.outvars:
        self._reach[v] = needs
      return
    kinds = {self._kind[v] for v in operands if v in self._member}
    on_rows = is_update or _is_elementwise(eqn)
    bits = needs_all = 0
    for group in met:
      bits |= group
      needs_all |= self._needs[_lowest(group)]
    loops = (needs | needs_all) and self._closure(needs | needs_all) & bits
    if not on_rows or len(kinds) > 1 or loops:
      reach = needs | self._closure(bits)
      for v in eqn.outvars:
        self._reach[v] = reach
      return
    first, equations = _lowest(bits), [i]
    for group in met:
      equations += self._equations.pop(_lowest(group))
      self._needs.pop(_lowest(group))
    self._equations[first], self._needs[first] = equations, needs | needs_all
    for bit in _bits_of(bits):
      self._group[bit] = bits
    for v in eqn.outvars:
      self._member[v], self._kind[v] = first, next(iter(kinds))

  def found(self) -> list[tuple[list[int], list[int]]]:
    """Positions of each group's paged arguments, and its equations."""
    result = []
    for first, equations in self._equations.items():
      bits = self._group[first]
      result.append(([k for k in self._order if self._bits[k] & bits], sorted(equations)))
    return result

  def _closure(self, bits: int) -> int:
    """With all that the groups among `bits` are made of."""
    while True:
      more = bits
      for first, needs in self._needs.items():
        if needs and self._group[first] & more:
          more |= needs
        if self._group[first] & more:
          more |= self._group[first]
      if more == bits:
        return bits
      bits = more


def _lowest(bits: int) -> int:
  return bits & -bits


def _bits_of(bits: int):
  while bits:
    yield _lowest(bits)
    bits &= bits - 1


def _is_elementwise(eqn: Any) -> bool:
  """Whether each element is made of the same element of the operands, or of scalars."""
  shapes = {v.aval.shape for v in (*eqn.invars, *eqn.outvars)} - {()}
  if len(shapes) > 1 or any(not v.aval.shape for v in eqn.outvars):
    return False
  return eqn.primitive.name in ELEMENTWISE or eqn.primitive.name == "broadcast_in_dim"


def _peel(
  jaxpr: Any,
  region: Region,
  users: Mapping[Any, set[int]],
  is_update: Callable[[Any], bool],
) -> None:
  """Leaves out what only something else needs, and can be made of what is returned anyway.

  A square whose sum is taken would be returned as an array; outside, XLA makes it for the sum.
  """
  own = {v for i in region.equations for v in jaxpr.eqns[i].outvars}
  own |= {jaxpr.invars[k] for k in region.paged}
  fixed = {jaxpr.outvars[k] for k in region.stores}
  kept, fewest = set(region.equations), None
  returned = {v for v in own if users[v] - kept}
  for i in reversed(region.equations):
    made = jaxpr.eqns[i].outvars
    needed = any(v in fixed or users[v] & {*kept, RESULT} for v in made)
    if needed or is_update(jaxpr.eqns[i]):
      continue
    kept.discard(i)
    returned -= set(made)
    returned |= {v for v in jaxpr.eqns[i].invars if is_var(v) and v in own}
    if fewest is None or len(returned) < fewest[0]:
      fewest = len(returned), sorted(kept)
  before = sum(bool(users[v] - set(region.equations)) for v in own)
  if fewest is not None and fewest[0] < before:
    region.equations = fewest[1]


def _users(jaxpr: Any, stored: Sequence[int]) -> dict[Any, set[int]]:
  """The equations that read a variable; `RESULT` if it is a result that is not stored."""
  users: dict[Any, set[int]] = collections.defaultdict(set)
  for i, eqn in enumerate(jaxpr.eqns):
    for v in eqn.invars:
      if is_var(v):
        users[v].add(i)
  for k, v in enumerate(jaxpr.outvars):
    if is_var(v) and k not in stored:
      users[v].add(RESULT)
  return users


def _absorb(jaxpr: Any, regions: list[Region]) -> None:
  """Gives a region what is elementwise and made for it alone: a gradient's square, in float32.

  What is spread from a scalar, and a change of dtype, is made again for each that needs it.
  """
  owner = {i: r for r, region in enumerate(regions) for i in region.equations}
  results = {v for v in jaxpr.outvars if is_var(v)}
  users: dict[Any, set[int]] = {}  # regions that use a variable; -1 for all else
  added: list[list[int]] = [[] for _ in regions]
  for i in reversed(range(len(jaxpr.eqns))):
    eqn = jaxpr.eqns[i]
    into = {owner.get(i, -1)}
    if i not in owner and _is_elementwise(eqn):
      used = set().union(*(users.get(v, set()) for v in eqn.outvars))
      if results & set(eqn.outvars):
        used.add(-1)
      again = eqn.primitive.name in ("broadcast_in_dim", "convert_element_type")
      if used - {-1} and (again or len(used) == 1):
        into = used
        for r in used - {-1}:
          added[r].append(i)
    for v in eqn.invars:
      if is_var(v):
        users.setdefault(v, set()).update(into)
  for region, more in zip(regions, added, strict=True):
    region.equations = sorted({*region.equations, *more})


def _set_outputs(jaxpr: Any, region: Region, own: set[Any], stored: set[int]) -> None:
  """Finds what of a region's `own` variables is needed outside of it, on the device."""
  mine, needed = set(region.equations), {}
  for i, eqn in enumerate(jaxpr.eqns):
    if i not in mine:
      needed.update((v, None) for v in eqn.invars if is_var(v) and v in own)
  stays = {k for k in region.paged if jaxpr.outvars[k] is jaxpr.invars[k] and k in stored}
  for k, v in enumerate(jaxpr.outvars):
    if is_var(v) and v in own and k not in region.stores and k not in stays:
      needed[v] = None
  region.outputs = list(needed)
