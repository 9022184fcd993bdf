"""Explicit axes of a mesh: how an array lies on them is part of its type. JAX has to be told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding


def explicit_names(mesh: Any) -> set[str]:
  """The explicit axes of `mesh`."""
  kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return {name for name, kind in kinds if kind == AxisType.Explicit}


def is_explicit(mesh: Any) -> bool:
  """Whether `mesh` has explicit axes."""
  return AxisType.Explicit in mesh.axis_types


def explicit_sharding(x: Any) -> NamedSharding | None:
  """How `x` lies, if it is on a mesh of explicit axes."""
  sharding = jax.typeof(x).sharding
  return sharding if is_explicit(sharding.mesh) else None


def explicit_mesh(arrays: Iterable[Any]) -> Any:
  """The first mesh of explicit axes that one of `arrays` lies on, if any."""
  return next((s.mesh for s in map(explicit_sharding, arrays) if s is not None), None)
