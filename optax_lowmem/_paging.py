"""A function evaluated over pages, which rest in host memory, piece by piece.

A function of a whole tree, as an optimizer's update is, is traced once. Equations that reach one
paged argument through arrays tie the pieces that must be on the device together: for Adam the two
moments of one parameter. Such *components* are fetched, computed and stored one after another,
and a component is fetched only when enough earlier ones are finished that all in flight stay below
a bound. The order is kept by `jax.lax.optimization_barrier`, which XLA's GPU backend dissolves only
after it has scheduled the program.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jec
import jax.numpy as jnp

from optax_lowmem._one_by_one import inputs_of, subprogram
from optax_lowmem._opening import opened
from optax_lowmem._pages import Paged, fetch, is_paged, nbytes, store


@dataclasses.dataclass
class Component:
  """What is on the device together.

  Attributes:
    fetches: positions of the paged arguments.
    equations: indices of the equations run once they are there.
    stores: positions of the paged results they make.
    made: the variables that later components or the results need.
    after: this one is fetched when all components before this index are finished.
  """

  fetches: list[int]
  equations: list[int] = dataclasses.field(default_factory=list)
  stores: list[int] = dataclasses.field(default_factory=list)
  made: list[Any] = dataclasses.field(default_factory=list)
  after: int = 0


def stream(
  fn: Callable[..., Any],
  args: Any,
  paged_args: Iterable[int],
  paged_results: Callable[[Any], Iterable[int]],
  max_bytes: int,
) -> tuple[list[Any], Any]:
  """Evaluates `fn(*args)` with some of its flat arguments and results in host memory.

  Args:
    fn: a traceable function.
    args: its arguments; at `paged_args` of the flattened tuple there are `Paged`.
    paged_args: positions.
    paged_results: given the shapes of the result, the flat positions that are to be `Paged`.
    max_bytes: most bytes of pages, old and new, on the device at a time; a component that is larger
      is there alone.

  Returns:
    The flat results and the structure of the result.
  """
  flat, treedef = jax.tree.flatten(args, is_leaf=is_paged)
  shapes = [jax.eval_shape(fetch, x) if is_paged(x) else x for x in flat]
  closed, out_shape = jax.make_jaxpr(lambda *xs: fn(*treedef.unflatten(xs)), return_shape=True)(
    *shapes
  )
  at, wanted = set(paged_args), list(paged_results(out_shape))
  results = _run(opened(closed, at, _tied), flat, at, wanted, max_bytes)
  return results, jax.tree.structure(out_shape)


def plan(
  jaxpr: Any, paged_args: set[int], paged_results: Sequence[int], max_bytes: int
) -> list[Component]:
  """The components in order; the first has no fetches: what needs no page."""
  inputs = {var: k for k, var in enumerate(jaxpr.invars)}
  groups = _tied(jaxpr, paged_args)
  components = [Component([])] + [Component(sorted(group)) for group in groups]
  _schedule(jaxpr, inputs, paged_args, components)
  maker = {var: c for c in components for i in c.equations for var in jaxpr.eqns[i].outvars}
  maker |= {jaxpr.invars[k]: c for c in components for k in c.fetches}
  used_by: dict[int, set[Any]] = {}
  for k, component in enumerate(components):
    used_by[k] = {v for i in component.equations for v in jaxpr.eqns[i].invars if _is_var(v)}
  index = {id(c): k for k, c in enumerate(components)}
  rest = set(range(len(jaxpr.outvars))).difference(paged_results)
  results = {jaxpr.outvars[k] for k in rest if _is_var(jaxpr.outvars[k])}
  for var, component in maker.items():
    k = index[id(component)]
    if var in results or any(var in used_by[later] for later in range(k + 1, len(components))):
      component.made.append(var)
  for position in paged_results:
    var = jaxpr.outvars[position]
    (maker[var] if _is_var(var) and var in maker else components[0]).stores.append(position)
  _set_window(jaxpr, components, max_bytes)
  return components


def _is_var(atom: Any) -> bool:
  return not isinstance(atom, jec.Literal)


def _tied(jaxpr: Any, paged_args: set[int]) -> list[set[int]]:
  """Paged arguments that meet in an array; scalars (norms, counts) tie nothing together."""
  parent = {k: k for k in paged_args}

  def root(k):
    while parent[k] != k:
      k = parent[k]
    return k

  touched = {jaxpr.invars[k]: k for k in paged_args}
  for eqn in jaxpr.eqns:
    met = [touched[v] for v in eqn.invars if _is_var(v) and v in touched]
    if not met:
      continue
    first = root(met[0])
    for other in met[1:]:
      parent[root(other)] = first
    touched.update((v, first) for v in eqn.outvars if v.aval.shape)
  groups: dict[int, set[int]] = {}
  for k in sorted(paged_args):
    groups.setdefault(root(k), set()).add(k)
  return list(groups.values())


def _schedule(
  jaxpr: Any, inputs: dict[Any, int], paged_args: set[int], components: list[Component]
) -> None:
  """Gives each equation to the first component after which it can be run."""
  readers: dict[Any, list[int]] = {}
  missing = []
  for i, eqn in enumerate(jaxpr.eqns):
    operands = {v for v in eqn.invars if _is_var(v)}
    missing.append(len(operands))
    for v in operands:
      readers.setdefault(v, []).append(i)
  ready = [i for i, count in enumerate(missing) if not count]

  def arrive(var):
    for i in readers.get(var, ()):
      missing[i] -= 1
      if not missing[i]:
        heapq.heappush(ready, i)

  for var in (*jaxpr.constvars, *(v for v, k in inputs.items() if k not in paged_args)):
    arrive(var)
  for component in components:
    for k in component.fetches:
      arrive(jaxpr.invars[k])
    while ready:
      i = heapq.heappop(ready)
      component.equations.append(i)
      for var in jaxpr.eqns[i].outvars:
        arrive(var)


def _set_window(jaxpr: Any, components: list[Component], max_bytes: int) -> None:
  """Lets each component wait for so many that those in flight stay below the bound."""
  costs = [
    sum(nbytes(jaxpr.invars[k].aval) for k in c.fetches)
    + sum(nbytes(jaxpr.outvars[k].aval) for k in c.stores)
    for c in components
  ]
  first = 0
  for k, component in enumerate(components):
    while first < k and sum(costs[first : k + 1]) > max_bytes:
      first += 1
    component.after = first


def _run(
  closed: Any, flat: Sequence[Any], paged_args: set[int], paged_results: list[int], max_bytes: int
) -> list[Any]:
  jaxpr = closed.jaxpr
  components = plan(jaxpr, paged_args, paged_results, max_bytes)
  env = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  env.update(
    (v, jnp.asarray(x)) for v, x in zip(jaxpr.invars, flat, strict=True) if not is_paged(x)
  )
  stored: dict[int, Paged] = {}
  token, finished = jnp.zeros((), jnp.int32), 0
  for component in components:
    # All that a component made has to be there before its pages are gone from the device, the
    # updates too: they are made of the same moments, and XLA could put them off.
    waited = components[finished : component.after]
    finished = max(finished, component.after)
    pages = [flat[k].pages for k in component.fetches]
    if waited and pages:
      made = [v for c in waited for v in c.made if v in env and v.aval.shape]
      rests = [k for c in waited for k in c.stores]
      token, pages, news, rest = _barrier(
        (token, pages, [env[v] for v in made], [stored[k] for k in rests])
      )
      env.update(zip(made, news, strict=True))
      stored.update(zip(rests, rest, strict=True))
    elif pages:
      token, pages = _barrier((token, pages))
    for k, page in zip(component.fetches, pages, strict=True):
      env[jaxpr.invars[k]] = fetch(Paged(page))
    _evaluate(jaxpr, component, env)
    results = {k: jaxpr.outvars[k] for k in component.stores}
    stored.update((k, store(_read(env, v))) for k, v in results.items())
    # A page's old and new values are needed no more once it is stored, unless by another.
    keep = set(component.made)
    gone = [v for i in component.equations for v in jaxpr.eqns[i].outvars if v not in keep]
    for var in (*gone, *(jaxpr.invars[k] for k in component.fetches)):
      if var not in keep:
        env.pop(var, None)
  return [stored[k] if k in stored else _read(env, v) for k, v in enumerate(jaxpr.outvars)]


def _barrier(values: Any) -> Any:
  """`values`, none of which is there before all are. On a CPU nothing is kept in order.

  Host and device are one memory there, and a barrier between an update and the parameter it is
  added to would change the last bit of the sum (jax 0.12, which multiplies and adds in one step).
  """
  leaves, treedef = jax.tree.flatten(values)
  new = jax.lax.platform_dependent(
    *leaves,
    cpu=lambda *xs: xs,
    default=lambda *xs: jax.lax.optimization_barrier(xs),
  )
  return treedef.unflatten(new)


def _read(env: dict[Any, Any], atom: Any) -> Any:
  return env[atom] if _is_var(atom) else jnp.asarray(atom.val, atom.aval.dtype)


def _evaluate(jaxpr: Any, component: Component, env: dict[Any, Any]) -> None:
  """Runs a component's equations; their results go into `env`."""
  eqns = [jaxpr.eqns[i] for i in component.equations]
  if not eqns:
    return
  outvars = {jaxpr.outvars[k] for k in component.stores if _is_var(jaxpr.outvars[k])}
  made = {v for eqn in eqns for v in eqn.outvars}
  inputs, outputs = inputs_of(eqns), [v for v in made if v in outvars or v in set(component.made)]
  values = subprogram(jaxpr, eqns, inputs, outputs)(*(env[v] for v in inputs))
  env.update(zip(outputs, values, strict=True))
