"""Whether layers multiply by what is stored, or by something that is computed from it.

`nn.map_variables` gives a layer what a function of the user's makes of its kernel. Of a packed
kernel that function gets codes and scales, and of an adapter its factors: what it makes of those is
wrong, without an error. Other transformations pass kernels on, whole or layer by layer, as new
tracers. So what a layer takes is marked while the model is traced, and the program is read: only
calls, loops, moves of axes and the choice of a layer of a stack may lie between the stored array
and the mark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from optax_lowmem._programs.fences import fence
from optax_lowmem._programs.primitives import called, is_var

_MARK = "optax_lowmem.linen:"
# What leaves its operands as they are; `stop_gradient` would leave adapters untrained.
_SAME = frozenset(
  """
  copy copy_p device_put mesh_cast name optimization_barrier pbroadcast pcast pvary reshard
  sharding_constraint
  """.split()
)


class Weight(NamedTuple):
  """The weight of a layer among the arrays that a model is traced with.

  Attributes:
    name: the layer's dotted path.
    places: the positions of its arrays: one, or those of a packed weight.
    stack: how many leading axes they have that the layer does not see; None if it is other axes.
  """

  name: str
  places: tuple[int, ...]
  stack: int | None


class _Stored(NamedTuple):
  """A stored array, or a part of it: its position, and which of its axes each axis is.

  An axis along which it was repeated or cut is -1.
  """

  place: int
  axes: tuple[int, ...]


_Known = _Stored | None  # None is what was computed


class Marks:
  """The weights that layers took while a model was traced, and what the program says of them."""

  def __init__(self):
    self.marked: list[tuple[Weight, int]] = []
    self.ranks: list[int] = []
    self.computed: set[str] = set()

  def on(self, y: Any, weight: Weight, taken: Any) -> Any:
    """`y`, the result of a layer that took these arrays for its weight."""
    arrays, marked = jax.tree.leaves(taken), []
    if len(arrays) != len(weight.places):
      self.computed.add(weight.name)
      return y
    for place, array in zip(weight.places, arrays, strict=True):
      marked.append(checkpoint_name(array, f"{_MARK}{len(self.marked)}"))
      self.marked.append((weight, place))
    return fence((y, marked))[0]  # what nothing needs may be left out of the program

  def read(self, closed: Any) -> set[str]:
    """The names of the layers whose weight is not what is stored.

    Args:
      closed: the jaxpr of the model, whose arguments are the stored arrays.
    """
    self.ranks = [len(v.aval.shape) for v in closed.jaxpr.invars]
    self._follow(closed, [_Stored(i, tuple(range(n))) for i, n in enumerate(self.ranks)])
    return self.computed

  def _follow(self, closed: Any, inputs: Sequence[_Known]) -> list[_Known]:
    """What the results of a jaxpr are."""
    jaxpr = _plain(closed)
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atoms: Sequence[Any]) -> list[_Known]:
      return [known.get(atom) if is_var(atom) else None for atom in atoms]

    for eqn in jaxpr.eqns:
      known |= zip(eqn.outvars, self._apply(eqn, read(eqn.invars)), strict=True)
    return read(jaxpr.outvars)

  def _apply(self, eqn: Any, values: list[_Known]) -> Sequence[_Known]:
    name, params, first = eqn.primitive.name, eqn.params, values[0] if values else None
    if name == "name" and params["name"].startswith(_MARK):
      self._check(*self.marked[int(params["name"].removeprefix(_MARK))], first)
    if name in _SAME:
      return values
    inner = params["jaxpr"] if name == "shard_map" else called(eqn, custom=False)
    if inner is not None:
      return self._follow(inner, values)
    if name == "scan":
      return self._scan(eqn, values)
    if name == "while":
      return self._while(eqn, values)
    if name == "cond":
      branches = [self._follow(branch, values[1:]) for branch in params["branches"]]
      return [_agreed(*results) for results in zip(*branches, strict=True)]
    if first is not None and name in _MOVES:
      return [_Stored(first.place, tuple(_MOVES[name](first.axes, params, eqn)))]
    for jaxpr in _programs(params):  # a function with a derivative of its own, say
      arguments = _plain(jaxpr).invars
      alike = len(arguments) == len(values)
      self._follow(jaxpr, values if alike else [None] * len(arguments))
    return [None] * len(eqn.outvars)

  def _check(self, weight: Weight, place: int, taken: _Known) -> None:
    # `nn.vmap` may put its axis anywhere, and a loop takes one away: the layer's own must all be
    # there, in their order.
    own = range(weight.stack or 0, self.ranks[place])
    axes = [axis for axis in taken.axes if axis in own] if taken else []
    whole = weight.stack is None or len(axes) == len(own)
    if taken is None or taken.place != place or axes != sorted(axes) or not whole:
      self.computed.add(weight.name)

  def _scan(self, eqn: Any, values: list[_Known]) -> Sequence[_Known]:
    # Told by ranks which operands the loop goes through: jax 0.12 has other parameters than 0.10.
    jaxpr = _plain(eqn.params["jaxpr"])
    end = sum(map(_same_rank, eqn.invars, jaxpr.invars))
    start = end - sum(map(_same_rank, eqn.outvars, jaxpr.outvars))
    slices = [None if x is None else _Stored(x.place, x.axes[1:]) for x in values[end:]]

    def body(carry: list[_Known]) -> list[_Known]:
      return self._follow(jaxpr, [*values[:start], *carry, *slices])

    results = _repeated(body, values[start:end])
    whole = dict(zip(slices, values[end:], strict=True))
    n = end - start
    return [*results[:n], *(whole.get(y) if y else None for y in results[n:])]

  def _while(self, eqn: Any, values: list[_Known]) -> Sequence[_Known]:
    test, jaxpr = _plain(eqn.params["cond_jaxpr"]), _plain(eqn.params["body_jaxpr"])
    end = len(values) - len(eqn.outvars)
    start = end - (len(jaxpr.invars) - len(eqn.outvars))

    def body(carry: list[_Known]) -> list[_Known]:
      self._follow(test, [*values[:start], *carry])
      return self._follow(jaxpr, [*values[start:end], *carry])

    return _repeated(body, values[end:])


def _plain(jaxpr: Any) -> Any:
  """A jaxpr without the constants that a closed one has."""
  return getattr(jaxpr, "jaxpr", jaxpr)


def _same_rank(outside: Any, inside: Any) -> bool:
  return len(outside.aval.shape) == len(inside.aval.shape)


def _repeated(body: Callable[[list[_Known]], list[_Known]], carry: list[_Known]) -> list[_Known]:
  """The results of a loop's body, which begin with what it hands on to the next round."""
  while True:
    results = body(carry)
    after = [_agreed(x, y) for x, y in zip(carry, results, strict=False)]
    if after == carry:
      return results
    carry = after


def _agreed(first: _Known, *others: _Known) -> _Known:
  return first if all(other == first for other in others) else None


def _spread(axes: tuple[int, ...], params: Any, eqn: Any) -> list[int]:
  """The axes after `broadcast_in_dim`."""
  before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
  spread = [-1] * len(after)
  for axis, n, at in zip(axes, before, params["broadcast_dimensions"], strict=True):
    spread[at] = axis if n == after[at] else -1
  return spread


def _cut(axes: tuple[int, ...], _: Any, eqn: Any) -> list[int]:
  """The axes after a slice: one that was cut is none any more."""
  before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
  return [axis if n == m else -1 for axis, n, m in zip(axes, before, after, strict=True)]


_MOVES = {
  "slice": _cut,  # one layer of a stack, where `jax.disable_jit` runs loops
  "dynamic_slice": _cut,
  "transpose": lambda axes, params, _: [axes[i] for i in params["permutation"]],
  "squeeze": lambda axes, params, _: [
    axis for i, axis in enumerate(axes) if i not in params["dimensions"]
  ],
  "broadcast_in_dim": _spread,
}


def _programs(params: Any) -> Iterator[Any]:
  """The jaxprs among the parameters of an equation."""
  for value in params.values():
    for one in value if isinstance(value, tuple | list) else (value,):
      if hasattr(_plain(one), "eqns"):
        yield one
