"""One layer's trip through the backward loop, a parameter at a time.

Of a layer's backward pass and update as one program, XLA's GPU backend takes all of the layer's
state out of the stacks before it makes a gradient, and puts all that is new back at the end: when
it plans the order, it does not know that this is done in place, and takes each for a new stack. So
the program is cut: after each gradient its parameter is updated and put back, and what follows
waits for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._backward.stacks import count_of, fetch, put, store, take, take_apart
from optax_lowmem._programs.fences import fence
from optax_lowmem._programs.inlined_calls import opened
from optax_lowmem._programs.outputs import inputs_of, subprogram
from optax_lowmem._programs.primitives import is_var
from optax_lowmem._update.announced import listening

# Parameters of a smaller part of a layer, such as norms, are updated together, after all others.
_SMALL = 64


def trip(
  fn: Callable[..., Any],
  stacks: Sequence[Any],
  on_host: Sequence[bool],
  rest: Any,
  i: Any,
  count: int,
  owners: Sequence[int | None],
) -> tuple[list[Any], Any]:
  """Replaces what a layer has in the stacks: in trip 0 the last layer, in the last trip the first.

  Args:
    fn: ``fn(arrays, rest) -> (grads, new, results)``, with lists of one layer's arrays: `new` takes
      the place of `arrays`, of which the first are parameters.
    stacks: the arrays of all layers; those in host memory are lanes of pages.
    on_host: which of them are.
    rest: the other argument, a tree.
    i: the number of the trip.
    count: the number of parameters.
    owners: for each of the other arrays the parameter that it belongs to, or None.

  Returns:
    The new stacks, and the results.
  """
  pairs = list(zip(stacks, on_host, strict=True))
  arrays = jax.eval_shape(lambda: [fetch(a, 0) if host else take(a, 0) for a, host in pairs])

  def cut(fn, stacks, rest, i):
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(arrays, rest)
    everything = set(range(len(closed.jaxpr.invars)))
    closed = opened(closed, everything, lambda eqn: eqn.primitive.name == "cond")
    grads, outputs = closed.jaxpr.outvars[:count], closed.jaxpr.outvars[count:]
    new, results = outputs[: len(stacks)], outputs[len(stacks) :]
    run = _Run(closed, stacks, on_host, jax.tree.leaves(rest), i, outputs)
    for turn in _turns(grads, run.maker, [*range(count), *owners]):
      run.replace({i: new[i] for i in turn})
    run.finish()
    return run.stacks, jax.tree.unflatten(jax.tree.structure(shapes[2]), run.values(results))

  with listening() as heard:
    jax.eval_shape(fn, arrays, rest)

  def as_a_gpu_computes(arrays, rest):
    with listening():
      return fn(arrays, rest)

  args = list(stacks), rest, i
  plain = functools.partial(cut, fn)
  if not heard.phases:
    return plain(*args)
  # Rules that take norms are computed otherwise on a GPU: of all parameters, as one equation.
  phased = functools.partial(cut, as_a_gpu_computes)
  return jax.lax.platform_dependent(*args, cpu=plain, tpu=plain, default=phased)


def _turns(
  grads: Sequence[Any], maker: dict[Any, int], owners: Sequence[int | None]
) -> list[list[int]]:
  """Positions of what is replaced together: of one parameter after another, as gradients come."""
  sizes = [math.prod(v.aval.shape) for v in grads]
  large = [k for k, n in enumerate(sizes) if n * _SMALL >= sum(sizes)]
  large.sort(key=lambda k: maker.get(grads[k], -1) if is_var(grads[k]) else -1)
  turns = [[i for i, owner in enumerate(owners) if owner == k] for k in large]
  return [*turns, [i for i, owner in enumerate(owners) if owner not in large]]


class _Run:
  """A trip under way.

  Attributes:
    stacks: the arrays of all layers, as they are now.
    maker: by which equation a variable is made.
  """

  def __init__(
    self,
    closed: Any,
    stacks: Sequence[Any],
    on_host: Sequence[bool],
    rest: Sequence[Any],
    trip: Any,
    outputs: Sequence[Any],
  ):
    jaxpr = closed.jaxpr
    self.stacks, self._equations, self._jaxpr = list(stacks), jaxpr.eqns, jaxpr
    self._on_host, self._trip, self._k = on_host, trip, count_of(stacks) - 1 - trip
    self.maker = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    self._of_layer = {v: i for i, v in enumerate(jaxpr.invars[: len(stacks)])}
    self._given = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    self._given.update(zip(jaxpr.invars[len(stacks) :], rest, strict=True))
    self._made: dict[Any, Any] = {}
    self._taken: dict[Any, Any] = {}  # arrays of the layer
    self._outputs = {v for v in outputs if is_var(v)}
    self._left = set(range(len(jaxpr.eqns)))
    effects = {i for i, eqn in enumerate(jaxpr.eqns) if eqn.effects}
    self._left = effects | self._before([*outputs, *(v for i in effects for v in self._reads(i))])

  def replace(self, new: dict[int, Any]) -> None:
    """Puts variables in the place of a layer's arrays; all that follows waits until it is done."""
    values = self.values(new.values())
    old = {v for v, i in self._of_layer.items() if i in new}
    self._use_up(old)
    needed = {v for i in self._left for v in self._reads(i)} | self._outputs
    self._made.update((v, self._read(v)) for v in old & needed)  # before it is replaced
    for (i, v), value in zip(new.items(), values, strict=True):
      if self._of_layer.get(v if is_var(v) else None) != i:
        self._put(i, value)
    self._taken = {}
    live = {v: x for v, x in self._made.items() if v in needed}
    waiting = {v: x for v, x in live.items() if not jnp.issubdtype(x.dtype, jax.dtypes.extended)}
    self._k, written, waited = fence((self._k, [self.stacks[i] for i in new], [*waiting.values()]))
    for i, stack in zip(new, written, strict=True):
      self.stacks[i] = stack
    self._made = live | dict(zip(waiting, waited, strict=True))

  def finish(self) -> None:
    """Computes what is left, callbacks too."""
    self._compute(self._left)

  def values(self, outputs: Iterable[Any]) -> list[Any]:
    """The values of variables, computed as far as they are not there."""
    outputs = list(outputs)
    self._compute(self._before(outputs))
    return [self._read(v) for v in outputs]

  def _use_up(self, arrays: set[Any]) -> None:
    """Computes what else is made of a layer's arrays, so that they need not be kept."""
    views, making = set(arrays), []
    for i in sorted(self._left):
      reads = set(self._reads(i))
      if not reads & views:
        continue
      making.append(i)
      if reads <= views:
        views.update(self._equations[i].outvars)
      elif all(v in self._given or v in self._made for v in reads - views):
        self._compute(self._before([v for v in self._equations[i].outvars]))

  def _before(self, outputs: Iterable[Any]) -> set[int]:
    """The equations that are yet to be done for these variables."""
    found: set[int] = set()
    open_ = list(outputs)
    while open_:
      i = self.maker.get(v) if is_var(v := open_.pop()) else None
      if i is not None and i in self._left and i not in found:
        found.add(i)
        open_ += self._equations[i].invars
    return found

  def _compute(self, equations: Collection[int]) -> None:
    for i in sorted(equations):
      eqn = self._equations[i]
      inputs = inputs_of([eqn])
      values = subprogram(self._jaxpr, [eqn], inputs, eqn.outvars)(*map(self._read, inputs))
      self._made.update(zip(eqn.outvars, values, strict=True))
    self._left = self._left - set(equations)

  def _reads(self, i: int) -> list[Any]:
    return [v for v in self._equations[i].invars if is_var(v)]

  def _read(self, v: Any) -> Any:
    if not is_var(v):
      return jnp.asarray(v.val, v.aval.dtype)
    for known in (self._given, self._made, self._taken):
      if v in known:
        return known[v]
    self._taken[v] = self._take(self._of_layer[v])
    return self._taken[v]

  def _take(self, i: int) -> Any:
    if self._on_host[i]:
      return fetch(self.stacks[i], self._trip)
    return take_apart(self.stacks[i], self._k)

  def _put(self, i: int, new: Any) -> None:
    stack = self.stacks[i]
    if self._on_host[i]:
      self.stacks[i] = store(stack, new, self._trip)  # by a number that has passed no fence
    else:
      self.stacks[i] = put(stack, new, self._k)
