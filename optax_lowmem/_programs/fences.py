"""What keeps XLA from joining, or exchanging, what is before and what is after."""

from __future__ import annotations

from typing import Any

import jax


@jax.custom_jvp
def fence(values: Any) -> Any:
  """`jax.lax.optimization_barrier`, of which the tangent is the identity.

  jax 0.12 cannot transpose a barrier if some of what passes it is not differentiated.
  """
  return jax.lax.optimization_barrier(values)


@fence.defjvp
def _(primals, tangents):
  return fence(*primals), *tangents
