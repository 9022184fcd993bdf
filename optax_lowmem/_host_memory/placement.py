"""Where arrays rest between steps, as a storage says in how many bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Placement:
  """One of the memories that a device can reach.

  Attributes:
    kind: its name in a sharding, and in what `state_bytes` returns.
    space: its name in the type of an array, which is all that is known while tracing. Memories that
      share one (jax 0.10 has `unpinned_host` as `Device`) cannot be told apart there, and a step
      under `jax.jit` would put what rests in one into the other.
  """

  kind: str
  space: Any

  def put(self, x: Any) -> jax.Array:
    """`x`, moved here, sharded as it was."""
    return jax.device_put(x, self.space)

  def holds(self, x: Any) -> bool:
    """Whether an array is here, by its type."""
    return jax.typeof(x).memory_space == self.space

  def is_of(self, sharding: Any) -> bool:
    """Whether a sharding names this memory."""
    return sharding.memory_kind == self.kind


DEVICE = Placement("device", jax.memory.Space.Device)
PINNED_HOST = Placement("pinned_host", jax.memory.Space.Host)
PLACEMENTS = (DEVICE, PINNED_HOST)


def placement_of(x: Any) -> Placement:
  """Where an array is, by its type."""
  return next(placement for placement in PLACEMENTS if placement.holds(x))
