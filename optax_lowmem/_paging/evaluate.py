"""A jaxpr evaluated over pages, which rest in host memory, a few rows at a time.

It is that of a function of a whole tree, as an optimizer's update is. What updates one parameter
row by row becomes one loop, which fetches a few rows of its pages, computes, and stores them. Pages
that something needs whole, a norm say, are fetched by a loop just before, and stored by another.
Nothing is put in order but by what is made of what: so each parameter can be updated as soon as its
gradient is there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._host_memory.pages import Paged, is_paged
from optax_lowmem._meshes.explicit_axes import is_explicit
from optax_lowmem._paging.device_parts import on_parts
from optax_lowmem._paging.order import gradients, ordered
from optax_lowmem._paging.regions import Region, find_regions
from optax_lowmem._paging.row_loops import Rows, over_rows
from optax_lowmem._programs.inlined_calls import opened
from optax_lowmem._programs.outputs import inputs_of, subprogram
from optax_lowmem._programs.primitives import is_var
from optax_lowmem._update.announced import Announced


class Evaluation:
  """One evaluation of a jaxpr over pages."""

  def __init__(
    self,
    closed: Any,
    updates: Mapping[str, Announced],
    flat: Sequence[Any],
    wanted: Sequence[int],
    replaced: int,
    max_bytes: int,
  ):
    self._updates, self._flat, self._max_bytes = updates, flat, max_bytes
    pages = {k: x for k, x in enumerate(flat) if is_paged(x)}
    closed = opened(closed, set(pages), lambda eqn: self._update(eqn) is not None)
    self._jaxpr, self._wanted = closed.jaxpr, set(wanted)
    self._pages = {self._jaxpr.invars[k]: x for k, x in pages.items()}
    self._regions = find_regions(
      self._jaxpr,
      pages,
      wanted,
      lambda eqn: self._update(eqn) is not None,
      lambda paged, equations: self._rows_of(paged, equations) is not None,
    )
    self._env = dict(zip(self._jaxpr.constvars, closed.consts, strict=True))
    variables = zip(self._jaxpr.invars, flat, strict=True)
    self._env.update((v, x) for v, x in variables if not is_paged(x))
    self._gradients = gradients(self._jaxpr, replaced)
    self._kept = set(self._jaxpr.invars[replaced:])
    self._stored: dict[int, Paged] = {}

  def results(self) -> list[Any]:
    for node in ordered(self._jaxpr, self._regions):
      if isinstance(node, Region):
        self._run_region(node)
      else:
        eqn = self._jaxpr.eqns[node]
        inputs = inputs_of([eqn])
        values = subprogram(self._jaxpr, [eqn], inputs, eqn.outvars)(*map(self._read, inputs))
        self._env.update(zip(eqn.outvars, values, strict=True))
    results = []
    for k, v in enumerate(self._jaxpr.outvars):
      if k not in self._wanted:
        results.append(self._read(v))
      elif v is self._jaxpr.invars[k]:
        results.append(self._flat[k])
      else:
        results.append(self._stored.get(k) or self._store(self._read(v), self._flat[k]))
    return results

  def _update(self, eqn: Any) -> Announced | None:
    found = self._updates.get(eqn.params.get("name", ""))
    return found if found is not None and found.fits(eqn) else None

  def _read(self, atom: Any) -> Any:
    if not is_var(atom):
      return jnp.asarray(atom.val, atom.aval.dtype)
    if atom not in self._env:
      self._env[atom] = self._fetch(self._pages[atom])
    return self._env[atom]

  def _fetch(self, page: Paged) -> jax.Array:
    """A page as a whole, by a loop: XLA's GPU backend would begin with all copies at once."""
    near = self._near(page)
    alike = near is not None and near.shape == page.shape
    # A gradient of another shape would have to be gathered from all devices.
    others = [near] if near is not None and not alike and jax.device_count() == 1 else []
    reads = [near] if alike else []
    run = lambda tiles, *_: ([], tiles)  # noqa: E731
    rows = _rows_of_page(page)
    return self._over_rows(run, rows, [page], reads, [None], [page], [], others)[1][0]

  def _near(self, page: Paged) -> jax.Array | None:
    """What has to be there before a page is worth fetching: the gradient that it is for."""
    k = next(k for k, x in enumerate(self._flat) if x is page)
    v = self._gradients.get(self._jaxpr.outvars[k]) if k in self._wanted else None
    return None if v is None else self._env[v]

  def _store(self, x: jax.Array, like: Paged) -> Paged:
    run = lambda _, reads, __: (reads, [])  # noqa: E731
    return self._over_rows(run, _rows_of_page(like), [like], [x], [], [], [0], [])[0][0]

  def _over_rows(
    self,
    fn: Callable[..., Any],
    rows: Rows,
    pages: Sequence[Paged],
    reads: Sequence[Any],
    given: Sequence[Any],
    shapes: Sequence[Any],
    stores: Sequence[int],
    others: Sequence[Any],
    scalars: bool = False,
  ) -> tuple[list[Paged], list[Any]]:
    """`over_rows`, by each device on its part; where none is `given`, a buffer is made.

    With `scalars`, `others` are the first argument of `fn`.
    """
    present = [x for x in given if x is not None]
    whole = pages[0].shape

    def run(pages, arrays, shared):
      cuts = [n // m for n, m in zip(whole, pages[0].shape, strict=True)]
      here, buffers = arrays[: len(reads)], iter(arrays[len(reads) :])
      near = next(iter([*arrays[len(reads) :], *here, *(x for x in shared if x.ndim)]), None)
      given_here = [
        _buffer(like, cuts, near) if x is None else next(buffers)
        for x, like in zip(given, shapes, strict=True)
      ]
      of_rows = functools.partial(fn, shared) if scalars else fn
      return over_rows(of_rows, rows, pages, here, given_here, stores, self._max_bytes)

    return on_parts(run, pages, [*reads, *present], others, stores, shapes)

  def _rows_of(self, paged: Sequence[int], equations: Sequence[int]) -> Rows | None:
    """How the arrays of a region are cut; None if they cannot be cut alike."""
    page = self._flat[paged[0]]
    eqns = [self._jaxpr.eqns[i] for i in equations]
    updates = [found for eqn in eqns if (found := self._update(eqn)) is not None]
    lead = page.axis + 1 if len(page.lanes) > 1 else 0
    shapes = {v.aval.shape for eqn in eqns for v in (*eqn.invars, *eqn.outvars)} - {()}
    if any(update.blocks + lead > len(update.tiles[0].shape) for update in updates):
      return None
    if lead:
      alike = all(shape[:lead] == page.shape[:lead] for shape in shapes)
      return Rows(len(page.lanes), lead) if alike else None
    unit = math.lcm(*(update.unit for update in updates))
    sizes = sorted(map(math.prod, shapes))
    if not unit or any(size % (sizes[-1] // unit) for size in sizes):
      return None
    return Rows(1, 0, unit)

  def _run_region(self, region: Region) -> None:
    eqns = [self._jaxpr.eqns[i] for i in region.equations]
    inputs = inputs_of(eqns)
    paged = [self._jaxpr.invars[k] for k in region.paged]
    scalars = [v for v in inputs if not v.aval.shape]
    arrays = [v for v in inputs if v.aval.shape and v not in set(paged)]
    arrays.sort(key=lambda v: v in self._kept)
    places = self._places(region, arrays)
    reads = [v for v in arrays if v not in places]
    stores = [self._jaxpr.outvars[k] for k in region.stores]

    def run(shared, tiles, here, given):
      env = dict(zip(scalars, shared, strict=True))
      env.update(zip(paged, tiles, strict=True))
      env.update(zip(reads, here, strict=True))
      env.update((v, x) for v, x in zip(places, given, strict=True) if v is not None)
      for eqn in eqns:
        env.update(zip(eqn.outvars, self._on_rows(eqn, env), strict=True))
      like = [tiles[region.paged.index(k)] for k in region.stores]
      return [_full(env[v], x) for v, x in zip(stores, like, strict=True)], [
        _full(env[v], x) for v, x in zip(region.outputs, given, strict=True)
      ]

    rows = self._rows_of(region.paged, region.equations)
    assert rows is not None
    new, made = self._over_rows(
      run,
      rows,
      [self._flat[k] for k in region.paged],
      [self._env[v] for v in reads],
      [None if v is None else self._env[v] for v in places],
      [v.aval for v in region.outputs],
      [region.paged.index(k) for k in region.stores],
      [self._env[v] for v in scalars],
      scalars=True,
    )
    self._stored.update(zip(region.stores, new, strict=True))
    pairs = zip(region.outputs, made, strict=True)
    self._env.update((v, _laid_as(x, v.aval)) for v, x in pairs)

  def _places(self, region: Region, arrays: Sequence[Any]) -> list[Any]:
    """For each output the array whose place it can take: the update the gradient's."""
    free, places = [v for v in arrays if v not in self._kept], []
    for v in region.outputs:
      like = (v.aval.shape, v.aval.dtype)
      place = next((x for x in free if (x.aval.shape, x.aval.dtype) == like), None)
      places.append(place)
      free = [x for x in free if x is not place]
    return places

  def _on_rows(self, eqn: Any, env: Mapping[Any, Any]) -> Sequence[Any]:
    """An equation of a region, on some rows; scalars stand for arrays that they fill."""
    values = [env[v] if is_var(v) else jnp.asarray(v.val, v.aval.dtype) for v in eqn.invars]
    if (update := self._update(eqn)) is not None:
      return update.run(values, len(eqn.outvars))
    if eqn.primitive.name == "broadcast_in_dim":
      return values[:1]
    shape = next((x.shape for x in values if x.shape), ())
    values = [jnp.broadcast_to(x, shape) for x in values]
    params = eqn.params | ({"sharding": None} if "sharding" in eqn.params else {})
    made = eqn.primitive.bind(*values, **params)
    return made if eqn.primitive.multiple_results else [made]


def _buffer(like: Any, cuts: Sequence[int], near: jax.Array | None) -> jax.Array:
  """An array to be filled. It begins as an element of `near`, so as not to be there before that is.

  XLA makes all arrays of zeros of a program in one launch, at its beginning.
  """
  shape = tuple(n // cut for n, cut in zip(like.shape, cuts, strict=True))
  if near is None:
    return jnp.zeros(shape, like.dtype)
  first = jax.lax.slice(near, (0,) * near.ndim, (1,) * near.ndim).reshape(())
  return jnp.full(shape, first.astype(like.dtype), like.dtype)


def _laid_as(x: jax.Array, like: Any) -> jax.Array:
  """`x`, laid as `like` on a mesh of explicit axes; a loop leaves it as its pages lie."""
  where = like.sharding
  alike = not is_explicit(where.mesh) or jax.typeof(x).sharding == where
  return x if alike else jax.sharding.reshard(x, where)


def _full(x: jax.Array, like: jax.Array) -> jax.Array:
  return jnp.broadcast_to(x, like.shape)


def _rows_of_page(page: Paged) -> Rows:
  return Rows(len(page.lanes), page.axis + 1 if len(page.lanes) > 1 else 0)
