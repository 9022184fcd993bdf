"""The state of stacked layers: one transformation's of each, stacked."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding

from optax_lowmem._sharding.state_shardings import state_shardings


def stacked_state(tx: optax.GradientTransformation, layers: Any) -> Any:
  """`jax.vmap(tx.init)(layers)`, on meshes of automatic axes laid out as the parameters are.

  Under `vmap` an array does not say how it lies, so there `init` cannot follow it.
  """
  stacked = optax.GradientTransformation(jax.vmap(tx.init), tx.update)
  leaves = jax.tree.leaves(layers)
  known = [isinstance(a, jax.Array) and not isinstance(a, Tracer) for a in leaves]
  shardings = jax.tree.map(lambda a: getattr(a, "sharding", None), layers)
  if not all(known) or not all(map(_is_automatic, jax.tree.leaves(shardings))):
    return stacked.init(layers)
  return jax.jit(stacked.init, out_shardings=state_shardings(stacked, layers, shardings))(layers)


def _is_automatic(sharding: Any) -> bool:
  """Whether it is of several devices, on a mesh of automatic axes."""
  several = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
  return several and AxisType.Explicit not in sharding.mesh.axis_types
