"""In which order regions and the equations between them can be run."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

from optax_lowmem._paging.regions import Region
from optax_lowmem._programs.outputs import inputs_of
from optax_lowmem._programs.primitives import is_var


def ordered(jaxpr: Any, regions: Sequence[Region]) -> list[int | Region]:
  """Regions and the equations that are needed besides, each after what it is made of.

  A callback makes nothing that is needed, and is called all the same.
  """
  maker: dict[Any, Any] = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
  stored = {k for region in regions for k in region.stores}
  for r, region in enumerate(regions):
    maker.update((v, -1 - r) for v in region.outputs)

  def inputs(node):
    if node >= 0:
      return [v for v in jaxpr.eqns[node].invars if is_var(v)]
    return inputs_of([jaxpr.eqns[i] for i in regions[-1 - node].equations])

  roots = [v for k, v in enumerate(jaxpr.outvars) if k not in stored and is_var(v)]
  open_ = [*(maker[v] for v in roots if v in maker), *(-1 - r for r in range(len(regions)))]
  open_ += [i for i, eqn in enumerate(jaxpr.eqns) if eqn.effects]
  before: dict[int, set[int]] = {}
  while open_:
    node = open_.pop()
    if node not in before:
      own = set() if node >= 0 else {jaxpr.invars[k] for k in regions[-1 - node].paged}
      before[node] = {maker[v] for v in inputs(node) if v in maker and v not in own}
      open_ += before[node]
  after: dict[int, list[int]] = {node: [] for node in before}
  for node, needed in before.items():
    for other in needed:
      after[other].append(node)

  def first(node):
    return (node if node >= 0 else max(regions[-1 - node].equations)), node

  missing = {node: len(needed) for node, needed in before.items()}
  ready = [first(node) for node, count in missing.items() if not count]
  heapq.heapify(ready)
  result = []
  while ready:
    _, node = heapq.heappop(ready)
    result.append(node if node >= 0 else regions[-1 - node])
    for other in after[node]:
      missing[other] -= 1
      if not missing[other]:
        heapq.heappush(ready, first(other))
  return result


def gradients(jaxpr: Any, count: int) -> dict[Any, Any]:
  """For each variable one of the first `count` arguments that it is made of, scalars aside."""
  found = {v: v for v in jaxpr.invars[:count] if v.aval.shape}
  for eqn in jaxpr.eqns:
    met = next((found[v] for v in eqn.invars if is_var(v) and v in found), None)
    if met is not None:
      found.update((v, met) for v in eqn.outvars if v.aval.shape)
  return found
