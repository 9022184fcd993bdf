"""What a codebook is.

A codebook maps normalised values in [-1, 1] (or [0, 1] if unsigned) to integer codes and back. It
knows nothing of blocks, scales or packing. Every codebook is a frozen, hashable value, so it can be
a static field of a pytree.
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

# Below the smallest normal number XLA's CPU backend flushes to zero, and a reciprocal overflows.
TINY = float(jnp.finfo(jnp.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Codebook(abc.ABC):
  """A map between normalised values and codes.

  Attributes:
    name: the name under which `get_codebook` knows it.
    bits: bits per code, 8 or 4. Codes are always handed around as uint8.
    signed: whether negative values can be represented.
  """

  name: str
  bits: int
  signed: bool

  @abc.abstractmethod
  def encode(self, r: jax.Array) -> jax.Array:
    """Returns the uint8 codes of finite float32 values with `abs(r) <= 1`."""

  @abc.abstractmethod
  def decode(self, codes: jax.Array) -> jax.Array:
    """Returns the float32 values of uint8 codes below `2**bits`."""

  @property
  def pairs_neighbours(self) -> bool:
    """Of 4-bit codes: whether a byte holds two neighbours, or elements half a block apart."""
    return True

  @property
  def may_vanish(self) -> bool:
    """Whether a second moment may be stored as zero, and updates must not be made of it."""
    return True

  @property
  def smallest_scale(self) -> float:
    """The smallest scale but zero; that of a block is raised to it."""
    return TINY

  def encode_blocks(self, blocks: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns the uint8 codes of finite values, each at most its scale in magnitude.

    Negative values are zero to an unsigned codebook.
    """
    if not self.signed:
      blocks = jnp.maximum(blocks, 0.0)
    return self.encode(jnp.where(scales > 0.0, blocks / scales, 0.0))

  def decode_blocks(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns the float32 values of uint8 codes under `scales`, which broadcast."""
    return self.decode(codes) * scales

  @property
  def values(self) -> np.ndarray:
    """The value of every code, in code order: float32 of shape (2**bits,)."""
    with jax.ensure_compile_time_eval():
      return np.asarray(self.decode(jnp.arange(2**self.bits, dtype=jnp.uint8)))
