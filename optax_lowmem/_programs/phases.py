"""A function of large arrays in as few passes over them as its reductions need.

Compiled as written, a rule that takes a norm, a mean or the maxima of blocks leaves it to XLA what
is kept in between: on an H100, float32 arrays of the parameter's size (CAME: 8 B/param of
temporaries), or all gradients at once. Here nothing of that size is kept. The function is evaluated
in *phases*: each computes the reductions that can be known by then, and the last one the results,
all of them from the function's own arguments. XLA makes one launch of a phase. What two phases both
need is computed twice, which costs less than to write and read it;
`fence` keeps XLA from finding that out.
"""

from __future__ import annotations

import collections
import contextvars
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._programs.fences import fence
from optax_lowmem._programs.flat_jaxpr import Flat, Operation, Value, flattened
from optax_lowmem._programs.primitives import ELEMENTWISE

# What is computed again rather than kept: an element of it is made of few others.
_CHEAP = ELEMENTWISE - {"digamma", "erf", "erf_inv", "erfc", "lgamma"} | {
    "bitcast_convert_type", "broadcast_in_dim", "concatenate", "expand_dims", "iota", "pad",
    "reshape", "slice", "split", "squeeze", "transpose",
}  # fmt: skip
_REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_and reduce_or reduce_prod".split())
# A value is small if it has at most this part of the elements of the parameter it belongs to.
_SMALL = 1 / 16
# Sums over a last axis are first taken over so many: with the maxima of blocks, in one launch.
_BLOCK = 64
# Sums over another axis are first taken of at most so many parts of it, or XLA would write what is
# summed to memory: 13 B an element instead of 5.3 for CAME's. docs/xla_notes.md#parts
_PARTS = 32
_in_a_phase = contextvars.ContextVar("in_a_phase", default=False)


def in_a_phase() -> bool:
  """Whether what is traced now will be computed in phases: whole arrays are then to be updated."""
  return _in_a_phase.get()


def in_phases(fn: Callable[..., Any], *args: Any) -> Any:
  """`fn(*args)`, computed phase by phase.

  Args:
    fn: a traceable function. What in it is neither elementwise nor a reduction, such as a matrix
      product, is computed once and kept.
    *args: pytrees of arrays.

  Returns:
    What `fn` returns, but for the order in which sums are taken.

  >>> x = jnp.full(4096, 2.0)
  >>> in_phases(lambda x: x / jnp.linalg.norm(x), x)[0]
  Array(0.015625, dtype=float32)
  """
  flat, treedef = jax.tree.flatten(args)

  def on_flat(*flat):
    token = _in_a_phase.set(True)
    try:
      return fn(*treedef.unflatten(flat))
    finally:
      _in_a_phase.reset(token)

  closed, shape = jax.make_jaxpr(on_flat, return_shape=True)(*flat)
  if closed.effects:  # a callback, say: computed once, in its place, and not where it is needed
    return fn(*args)
  results = _Evaluation(flattened(closed), flat).results()
  return jax.tree.structure(shape).unflatten(results)


class _Evaluation:
  """A program and what is known of it so far.

  A value is *large* if it is about as large as the parameter it belongs to. Large values are made
  again whenever they are asked for, from those that are known: arguments, and what was kept.
  """

  def __init__(self, flat: Flat, args: Sequence[Any]):
    self._flat = flat
    self._known: dict[Value, Any] = dict(flat.constants)
    self._known |= dict(zip(flat.inputs, map(jnp.asarray, args), strict=True))
    self._maker = {v: k for k, op in enumerate(flat.operations) for v in op.outputs}
    self._parameter = _parameters(flat)
    self._groups = self._grouped()

  def results(self) -> list[Any]:
    """The program's results."""
    for operations in self._groups:
      self._run_phase(operations)
    last = collections.defaultdict(list)
    for value in self._flat.outputs:
      if value not in self._known:
        # Codes of 4 bits, of which there are half as many, are no launch with an update: apart, or
        # XLA would keep what both are made of.
        large = self._is_large(value)
        last[(self._parameter[value], value.size) if large else (value, 0)].append(value)
    made: dict[Value, Any] = {}
    for values in last.values():
      made |= dict(zip(values, self._make(values), strict=True))
    return [self._known[v] if v in self._known else made[v] for v in self._flat.outputs]

  def _is_large(self, value: Value) -> bool:
    largest = self._parameter.get(value)
    return largest is not None and value.size > _SMALL * largest.size

  def _grouped(self) -> list[list[Operation]]:
    """The operations that end phases, those of one phase together, in order."""
    levels: dict[Value, int] = collections.defaultdict(int)  # how many phases come before
    behind: dict[Value, frozenset[int]] = collections.defaultdict(frozenset)  # what ends the last
    ending: list[tuple[Operation, Hashable, int, frozenset[int]]] = []
    for op in self._flat.operations:
      level = max((levels[v] for v in op.inputs), default=0)
      needs = frozenset().union(*(behind[v] for v in op.inputs))
      kind = self._ends_phase(op)
      if kind is not None:
        level, needs = level + 1, frozenset([len(ending)])
        before = frozenset().union(*(behind[v] for v in op.inputs))
        ending.append((op, kind, level, before))
      levels.update((v, level) for v in op.outputs)
      behind.update((v, needs) for v in op.outputs)
    # As late as it may come, each joins the first phase of its kind that there is.
    latest = [max((e[2] for e in ending), default=0)] * len(ending)
    chosen: dict[tuple[Hashable, int], list[Operation]] = collections.defaultdict(list)
    at = {(kind, level) for _, kind, level, _ in ending}
    for k in reversed(range(len(ending))):
      op, kind, level, before = ending[k]
      level = next(n for n in range(latest[k], level - 1, -1) if n == level or (kind, n) in at)
      chosen[kind, level].append(op)
      for j in before:
        latest[j] = min(latest[j], level - 1)
    return [chosen[key][::-1] for key in sorted(chosen, key=lambda key: key[1])]

  def _ends_phase(self, op: Operation) -> Hashable | None:
    """Says which operations can end a phase together with `op`; None if it ends none."""
    large = [v for v in op.inputs if self._is_large(v)]
    small = not any(map(self._is_large, op.outputs))
    name = op.primitive.name
    cheap = name in _CHEAP or (name == "gather" and not self._is_large(op.inputs[0]))
    if not large or (cheap and not small):
      return None
    if name not in _REDUCTIONS or not small:
      return id(op)
    # All that a phase computes, it computes of arrays of one shape, or XLA would write some of it.
    shape, axes = op.inputs[0].aval.shape, tuple(op.params["axes"])
    blocks = len(shape) - 1 in axes and shape[-1] % _BLOCK == 0
    return self._parameter[large[0]], "blocks" if blocks else (shape, axes)

  def _run_phase(self, operations: list[Operation]) -> None:
    """Computes what ends a phase; it is known from then on."""
    inputs = list(dict.fromkeys(v for op in operations for v in op.inputs))
    values = dict(zip(inputs, self._make(inputs), strict=True))
    made: list[Any] = []
    for op in operations:
      made += _reduced(op, [values[v] for v in op.inputs])
    outputs = [v for op in operations for v in op.outputs]
    # Else XLA would join a sum of blocks and the sum of these to one.
    partial = fence([first for first, _ in made])
    self._known |= {v: finish(x) for v, x, (_, finish) in zip(outputs, partial, made, strict=True)}

  def _make(self, values: Iterable[Value]) -> list[Any]:
    """Some values, made of what is known."""
    needed, start, open_ = set(), {}, list(values)
    wanted = list(open_)
    while open_:
      value = open_.pop()
      if value in self._known:
        start[value] = self._known[value]
      elif (k := self._maker[value]) not in needed:
        needed.add(k)
        open_ += self._flat.operations[k].inputs
    arrays = [v for v in start if v not in self._flat.constants]
    env = dict(start)
    if any(map(self._is_large, wanted)):
      fenced = fence([start[v] for v in arrays])
      env |= dict(zip(arrays, fenced, strict=True))
    for k in sorted(needed):
      op = self._flat.operations[k]
      env.update(zip(op.outputs, op.run(*(env[v] for v in op.inputs)), strict=True))
      if not any(map(self._is_large, (*op.inputs, *op.outputs))):
        self._known.update((v, env[v]) for v in op.outputs)
    return [env[v] for v in wanted]


def _parameters(flat: Flat) -> dict[Value, Value]:
  """For each array, the largest argument of those that it has to do with."""
  parent: dict[Value, Value] = {}

  def root(v):
    while parent.setdefault(v, v) is not v:
      v = parent[v]
    return v

  for op in flat.operations:
    arrays = [v for v in (*op.inputs, *op.outputs) if v.size > 1 and v not in flat.constants]
    for v in arrays[1:]:
      parent[root(v)] = root(arrays[0])
  largest: dict[Value, Value] = {}
  for v in flat.inputs:
    if v.size > 1 and v.size > getattr(largest.get(root(v)), "size", 0):
      largest[root(v)] = v
  return {v: largest[root(v)] for v in list(parent) if root(v) in largest}


def _reduced(op: Operation, operands: Sequence[Any]) -> list[tuple[Any, Callable[[Any], Any]]]:
  """For each result, what is computed of the large operands, and what remains to be done to it."""
  (x, *_), name = operands, op.primitive.name
  axes = op.params.get("axes", ())
  if name == "reduce_sum" and x.ndim - 1 in axes and x.shape[-1] % _BLOCK == 0:
    if x.shape[-1] > _BLOCK:
      blocks = x.reshape(*x.shape[:-1], x.shape[-1] // _BLOCK, _BLOCK).sum(-1)
      return [(blocks, lambda y: y.sum(axes))]
    if len(axes) > 1:
      rest = tuple(a for a in axes if a != x.ndim - 1)
      return [(x.sum(-1), lambda y: y.sum(rest))]
  if name == "reduce_sum" and axes and x.ndim - 1 not in axes:
    axis, size = axes[-1], x.shape[axes[-1]]
    parts = max(n for n in range(1, _PARTS + 1) if size % n == 0)
    if 1 < parts < size:
      cut = x.reshape(*x.shape[:axis], parts, size // parts, *x.shape[axis + 1 :])
      return [(cut.sum(axis), lambda y: y.sum(axes))]
  return [(made, lambda y: y) for made in op.run(*operands)]
