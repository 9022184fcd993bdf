"""The state of stacked layers: one transformation's of each, stacked."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding

from optax_lowmem._backward.stacks import count_of
from optax_lowmem._host_memory.capacity import check_on_host, check_pool, devices_of, shard_bytes
from optax_lowmem._host_memory.pages import (
  as_typed,
  is_paged,
  is_to_page,
  known_on_host,
  store_stack,
)
from optax_lowmem._meshes.explicit_axes import is_explicit
from optax_lowmem._paging.lazy_state import lazy_state, made
from optax_lowmem._paging.stacked import Stack, within
from optax_lowmem._paging.surroundings import in_eval_shape
from optax_lowmem._sharding.state_shardings import state_shardings

T = TypeVar("T")


def stacked_state(tx: optax.GradientTransformation, layers: Any) -> Any:
  """`jax.vmap(tx.init)(layers)`; what is to be paged is in host memory, the last layer first."""
  devices = devices_of(layers)
  with within(Stack(count_of(layers), devices)):
    state = _marked_state(tx, layers)
  leaves, treedef = jax.tree.flatten(state, is_leaf=_is_either)
  if any(map(is_paged, leaves)):
    raise ValueError(
      "`tx` made pages of one layer, and not of all: its `init` was called for something else "
      "before, and JAX kept that. Pass a transformation whose `init` is not within `jax.jit`."
    )
  paged = [x.array for x in leaves if is_to_page(x)]
  if not paged:
    return jax.tree.map(made, state)
  here = sum(d.process_index == jax.process_index() for d in devices)
  check_pool(devices[0].platform, here * sum(map(shard_bytes, paged)), os.environ)
  leaves = [store_stack(made(x.array)) if is_to_page(x) else made(x) for x in leaves]
  return treedef.unflatten(leaves)


def over_pages(loop: Callable[[Any], tuple[Any, T]], state: Any, layers: Any) -> tuple[Any, T]:
  """`loop(state)`, which returns the new state and more, of a state that may have pages."""
  pages = [is_paged(x) for x in jax.tree.leaves(state, is_leaf=is_paged)]
  if not any(pages):
    with within(Stack(count_of(layers), [], paged=False)):
      return loop(state)
  shapes_only = in_eval_shape()
  if not shapes_only:
    check_on_host(state)
  with within(Stack(count_of(layers), [])):
    new, rest = loop(jax.tree.map(_known_on_host, state, is_leaf=is_paged))
  if shapes_only:  # what JAX keeps of it must not abort when it is called with pages elsewhere
    new = jax.tree.map(_typed_as, new, state, is_leaf=is_paged)
  return new, rest


def _is_either(x: Any) -> bool:
  return is_paged(x) or is_to_page(x)


def _known_on_host(x: Any) -> Any:
  return jax.tree.map(known_on_host, x) if is_paged(x) else x


def _typed_as(x: Any, like: Any) -> Any:
  return as_typed(x, like) if is_paged(x) else x


def _marked_state(tx: optax.GradientTransformation, layers: Any) -> Any:
  """The state, on meshes of automatic axes laid out as the parameters are.

  Under `vmap` an array does not say how it lies, so there `init` cannot follow it.
  """
  stacked = optax.GradientTransformation(jax.vmap(tx.init), tx.update)
  leaves = jax.tree.leaves(layers)
  known = [isinstance(a, jax.Array) and not isinstance(a, Tracer) for a in leaves]
  shardings = jax.tree.map(lambda a: getattr(a, "sharding", None), layers)
  if all(known) and all(map(_is_automatic, jax.tree.leaves(shardings))):
    return jax.jit(stacked.init, out_shardings=state_shardings(stacked, layers, shardings))(layers)
  shapes = jax.tree.leaves(jax.eval_shape(stacked.init, layers), is_leaf=is_to_page)
  if any(map(is_to_page, shapes)):
    return lazy_state(stacked.init, layers, 0)  # of all layers, an array may fit alone
  return stacked.init(layers)


def _is_automatic(sharding: Any) -> bool:
  """Whether it is of several devices, on a mesh of automatic axes."""
  several = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
  return several and not is_explicit(sharding.mesh)
