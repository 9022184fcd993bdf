"""Rotary position embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.models.rope_scaling import LongRope, RopeScaling

Rope = tuple[jax.Array, jax.Array]


def ropes_of_layers(config: LlamaConfig) -> jax.Array | None:
  """Which of the tables of `rope_tables` each layer takes, int32; None where there is one."""
  ways = _ways(config)
  kinds = sorted(set(ways))
  return jnp.array([kinds.index(way) for way in ways], jnp.int32) if len(kinds) > 1 else None


def rope_tables(positions: jax.Array, config: LlamaConfig, length: int) -> Rope:
  r"""Cosines and sines of the rotary embedding.

  The angle of pair :math:`i` at position :math:`p` is :math:`p f_i`, where the frequency
  :math:`f_i` is :math:`\theta^{-2i/d}`, changed by the configuration's `rope_scaling`.

  Args:
    positions: integer positions, (..., T).
    config: gives the size d of what is turned of a head, the base and the scaling.
    length: how many positions a row has, or comes to have while it is generated.

  Returns:
    Two float32 arrays (..., T, 1, d / 2); the 1 stands for the heads. Where layers differ, one
    such table for each way has its place on a first axis; see `ropes_of_layers` and `rope_of`.
  """
  main = config.rope_theta, config.rope_scaling
  local = config.rope_local_theta or config.rope_theta, None
  made = {
    "main": lambda: _table(positions, config.rotary_dim, *main, length),
    "local": lambda: _table(positions, config.rotary_dim, *local, length),
    "none": lambda: _unturned(positions, config.rotary_dim),
  }
  tables = [made[way]() for way in sorted(set(_ways(config)))]
  return tables[0] if len(tables) == 1 else jax.tree.map(lambda *each: jnp.stack(each), *tables)


def rope_of(tables: Rope, way: jax.Array | None) -> Rope:
  """The table of one layer, whose number in `ropes_of_layers` is `way`."""
  return tables if way is None else (tables[0][way], tables[1][way])


def apply_rope(x: jax.Array, rope: Rope) -> jax.Array:
  """Turns the pairs (i, i + d/2) of the first d numbers of each head of `x` (B, T, heads, h)."""
  cos, sin = rope
  pairs = cos.shape[-1]
  first, second, rest = jnp.split(x.astype(jnp.float32), (pairs, 2 * pairs), axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin, rest)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _ways(config: LlamaConfig) -> list[str]:
  """How each layer turns: "main", "local" (layers with a window have another base) or "none"."""
  ways = ["main"] * config.num_hidden_layers
  for i, window in enumerate(config.windows):
    if window is not None and config.rope_local_theta is not None:
      ways[i] = "local"
  for i, plain in enumerate(config.unrotated):
    if plain:
      ways[i] = "none"
  return ways


def _table(
  positions: jax.Array, size: int, theta: float, scaling: RopeScaling | None, length: int
) -> Rope:
  frequency = theta ** (-np.arange(0, size, 2) / size)
  magnitude = 1.0
  if isinstance(scaling, LongRope):
    scaling = scaling.at(length)
  if scaling is not None:
    frequency, magnitude = scaling(frequency, theta), scaling.magnitude
  angle = positions.astype(jnp.float32)[..., None, None] * frequency.astype(np.float32)
  return magnitude * jnp.cos(angle), magnitude * jnp.sin(angle)


def _unturned(positions: jax.Array, size: int) -> Rope:
  shape = (*positions.shape, 1, size // 2)
  return jnp.ones(shape), jnp.zeros(shape)
