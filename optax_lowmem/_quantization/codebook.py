"""What a codebook is.

A codebook maps normalised values in [-1, 1] (or [0, 1] if unsigned) to integer codes and back. It
knows nothing of blocks, scales or packing. Every codebook is a frozen, hashable value, so it can be
a static field of a pytree.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SIGN = -(2**31)  # sign bit of a float32, as int32
ONE = 0x3F800000  # bits of the float32 1.0
GOLDEN = 0x9E3779B1 - 2**32  # 2^32 / golden ratio, as int32: Fibonacci hashing
# Below the smallest normal number XLA's CPU backend flushes to zero, and a reciprocal overflows.
TINY = float(jnp.finfo(jnp.float32).tiny)
_LARGE = 2.0**120


@dataclasses.dataclass(frozen=True)
class Codebook(abc.ABC):
  """A map between normalised values and codes.

  To write one, derive from it, with `encode` and `decode`, and pass it wherever the name of a
  codebook is taken. It must be a value that can be hashed: if it has fields of its own, make it a
  frozen dataclass too. Its optimizer state is updated by XLA, without a kernel. A positive second
  moment must not be decoded as zero, or the update explodes.

  Its name stands in the key paths of a saved state. A state is restored by a template, as of
  ``jax.eval_shape(tx.init, params)``, which holds the codebook itself, so that one is needed that
  means the same by its name; the names of this library's own are taken.

  Attributes:
    name: of letters, digits, `_` and `-`.
    bits: bits per code, 8 or 4. Codes are always handed around as uint8.
    signed: whether negative values can be represented.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> class Cubes(lowmem.Codebook):
    ...   def encode(self, r):
    ...     return (jnp.round(jnp.cbrt(r) * 127) + 128).astype(jnp.uint8)
    ...   def decode(self, codes):
    ...     return ((codes.astype(jnp.float32) - 128) / 127) ** 3
    >>> cubes = Cubes("cubes", bits=8, signed=True)
    >>> q = lowmem.quantize(jnp.array([[1.0, -0.3, 0.001, 0.0]]), cubes, block_size=4)
    >>> q
    QuantizedArray(float32[1,4], codebook='cubes', block=4)
    >>> q.dequantize().round(3)
    Array([[ 1.   , -0.3  ,  0.001,  0.   ]], dtype=float32)
    >>> tx = lowmem.quantized(optax.adam(1e-3), storage={"mu": lowmem.Blockwise(cubes, 64)})
    >>> tx.init(jnp.zeros((64, 64)))[0].mu
    QuantizedArray(float32[64,64], codebook='cubes', block=64)
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
  def needs_table(self) -> bool:
    """Whether codes are looked up in a table, which kernels cannot."""
    return True

  @property
  def smallest_scale(self) -> float:
    """The smallest scale but zero; that of a block is raised to it."""
    return TINY

  def encode_blocks(
    self, blocks: jax.Array, scales: jax.Array, old: jax.Array | None = None
  ) -> jax.Array:
    """Returns the uint8 codes of finite values, each at most its scale in magnitude.

    Negative values are zero to an unsigned codebook.

    Args:
      blocks: the values.
      scales: those of their blocks, which broadcast.
      old: the values that they replace, where there are some. How a value is rounded may depend on
        how far it has moved.
    """
    if not self.signed:
      blocks = jnp.maximum(blocks, 0.0)
    # XLA multiplies by the inverse, which of the largest floats is flushed to zero.
    part = jnp.where(scales > _LARGE, 2.0**-8, 1.0)
    return self.encode(jnp.where(scales > 0.0, (blocks * part) / (scales * part), 0.0))

  def decode_blocks(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns the float32 values of uint8 codes under `scales`, which broadcast."""
    return self.decode(codes) * scales

  @property
  def values(self) -> np.ndarray:
    """The value of every code, in code order: float32 of shape (2**bits,)."""
    with jax.ensure_compile_time_eval():
      return np.asarray(self.decode(jnp.arange(2**self.bits, dtype=jnp.uint8)))


@dataclasses.dataclass(frozen=True)
class Arithmetic(Codebook):
  """A codebook of moments, signed or positive: arithmetic on the bits of floats, no table.

  It vectorizes everywhere and can be done in a kernel. A code is a magnitude, and, signed, a sign
  before it. What is positive is never stored as zero by an unsigned one.
  """

  @property
  def top(self) -> int:
    """The largest magnitude of a code: that of 1."""
    return 2 ** (self.bits - self.signed) - 1

  @property
  def pairs_neighbours(self) -> bool:
    return False  # runs of bytes that become runs of elements: a third of the time on a CPU

  @property
  def needs_table(self) -> bool:
    return False

  def encode(self, r: jax.Array) -> jax.Array:
    return self.encode_blocks(r, jnp.float32(1.0))

  def decode(self, codes: jax.Array) -> jax.Array:
    return self.decode_blocks(codes, jnp.float32(1.0))

  # Nothing but its bits is asked of a block, for its scale as for its codes, so that XLA does not
  # hold the values of a tile in memory (0.12 B/param): docs/xla_notes.md#twice

  def magnitude_bits(self, blocks: jax.Array) -> jax.Array:
    """The bits of the magnitudes of values; of negative ones, if unsigned, those of zero."""
    bits = jax.lax.bitcast_convert_type(blocks, jnp.int32)
    return bits & ~SIGN if self.signed else jnp.maximum(bits, 0)

  def with_sign(self, magnitudes: jax.Array, blocks: jax.Array) -> jax.Array:
    """Codes of so many bits, from their magnitudes and the values that they are to stand for."""
    if self.signed:  # by the sign bit, so that -0.0 keeps its code
      bits = jax.lax.bitcast_convert_type(blocks, jnp.int32)
      magnitudes = magnitudes | ((bits >> (32 - self.bits)) & (self.top + 1))
    return magnitudes.astype(jnp.uint8)

  # Something must follow the product with a scale, or XLA moves a constant that multiplies it to
  # the scales, and holds these products in memory (0.06 B/param a moment). Of integers, because a
  # maximum of floats takes three instructions to pass NaN on. docs/xla_notes.md#constants

  def signed_product(self, codes: jax.Array, magnitudes: jax.Array, scales: Any) -> jax.Array:
    """Values, from int32 codes, the magnitudes that these stand for, and scales."""
    product = magnitudes * scales
    if not self.signed:
      return fixed(product)
    bits = jax.lax.bitcast_convert_type(product, jnp.int32)
    bits = bits | ((codes << (32 - self.bits)) & SIGN)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def fixed(x: jax.Array) -> jax.Array:
  """`x`, which is not negative, where XLA moves no factor past it."""
  bits = jnp.maximum(jax.lax.bitcast_convert_type(x, jnp.int32), 0)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)
