"""Storages: how one moment is held between steps.

A storage is a frozen value with two methods, ``store(x) -> stored`` and ``load(stored) -> x``. It
keeps no state of its own, so it can be named in a configuration, compared and hashed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from optax_lowmem._arguments.checks import check_block_size, check_min_size
from optax_lowmem._quantization.array import QuantizedArray, encode
from optax_lowmem._quantization.codebook import Codebook
from optax_lowmem._quantization.codebooks import CodebookName, get_codebook


class Storage(Protocol):
  """What `quantized` asks of a storage: the form of a moment, which may depend on its shape.

  A form is a dtype, or a codebook and blocks. `store` returns an array or a `QuantizedArray`, and
  updates decode and encode it by that form alone, a tile at a time. Arithmetic of one's own belongs
  in a `Codebook`; around a form it is refused.
  """

  def store(self, x: jax.Array) -> Any:
    """Returns the stored form of a floating array."""
    ...

  def load(self, stored: Any) -> jax.Array:
    """Returns the float32 array that `stored` stands for."""
    ...


@dataclasses.dataclass(frozen=True)
class Dense:
  """An array held as it is, in `dtype`.

  Attributes:
    dtype: dtype it is held in.

  Examples:
    >>> import jax.numpy as jnp, optax_lowmem as lowmem
    >>> lowmem.Dense(jnp.bfloat16).store(jnp.ones(2)).dtype
    dtype(bfloat16)
  """

  dtype: Any = jnp.float32

  def store(self, x: jax.Array) -> jax.Array:
    """Returns `x` in `dtype`."""
    return x.astype(self.dtype)

  def load(self, stored: jax.Array) -> jax.Array:
    """Returns `stored` in float32."""
    return stored.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, repr=False)
class Blockwise:
  r"""Codes of a codebook and one float32 scale a block.

  Blocks lie along the last axis. Where that axis does not divide, a block grows, to about
  twice `block_size` at most; where it is shorter than a block, as in the factors of LoRA, a block
  covers several rows. So there is never more than one scale for `block_size` elements, whatever
  the shape.

  Storing is idempotent for every codebook but the signed `"dynamic"`:
  ``store(load(s)) == s``, bit for bit.

  Attributes:
    codebook: a name known to `quantize`, or a `Codebook`, which it becomes.
    block_size: elements a block at least; a positive even number.
    min_size: arrays of fewer elements are held in float32.

  Examples:
    >>> import jax.numpy as jnp, optax_lowmem as lowmem
    >>> stored = lowmem.Blockwise("power8", block_size=64).store(jnp.ones((4096, 16)))
    >>> stored.codes.shape, stored.scales.shape, stored.block
    ((4096, 16), (1024, 1), (4, 16))
  """

  codebook: CodebookName | Codebook = "power8"
  block_size: int = 64
  min_size: int = 4096

  def __post_init__(self):
    object.__setattr__(self, "codebook", get_codebook(self.codebook))
    object.__setattr__(self, "block_size", check_block_size(self.block_size))
    check_min_size(self.min_size)

  def __repr__(self) -> str:
    name = get_codebook(self.codebook).name
    return f"Blockwise({name!r}, block_size={self.block_size}, min_size={self.min_size})"

  def store(self, x: jax.Array) -> QuantizedArray | jax.Array:
    """Returns `x` quantized, or in float32 if it has fewer than `min_size` elements."""
    if x.ndim == 0 or x.size < self.min_size or x.size == 0:
      return x.astype(jnp.float32)
    assert isinstance(self.codebook, Codebook)
    return encode(x.astype(jnp.float32), self.codebook, block_shape(x.shape, self.block_size))

  def load(self, stored: QuantizedArray | jax.Array) -> jax.Array:
    """Returns the float32 array that `stored` stands for."""
    if isinstance(stored, QuantizedArray):
      return stored.dequantize(jnp.float32)
    return stored.astype(jnp.float32)


def by_field(
  storage: Mapping[str, Storage | Codebook | str] | None, block_size: int, min_size: int
) -> dict[str, Storage]:
  """Storages by the field they are for; the name of a codebook stands for a `Blockwise`.

  Raises:
    TypeError: if `storage` is no mapping, or holds what is no storage.
  """
  if storage is not None and not isinstance(storage, Mapping):
    raise TypeError(
      f"`storage` must map fields to storages, got {storage!r}: "
      '`{"mu": Blockwise("power8")}`, say.'
    )
  return {k: _storage(k, s, block_size, min_size) for k, s in (storage or {}).items()}


def _storage(field: str, value: Any, block_size: int, min_size: int) -> Storage:
  if isinstance(value, str | Codebook):
    return Blockwise(get_codebook(value), block_size, min_size)
  methods = getattr(value, "store", None), getattr(value, "load", None)
  if isinstance(value, type) or not all(map(callable, methods)):
    raise TypeError(
      f"`storage` of {field!r} must be a storage, got {value!r}. `Dense(jnp.bfloat16)` holds a "
      'dtype, `Blockwise("power8")` or just "power8" holds codes.'
    )
  if type(value) not in (Blockwise, Dense):
    _check_own(field, value)
  return value


def _check_own(field: str, storage: Storage) -> None:
  """Refuses a user's storage that does more than to choose a form, by what it does to an array."""
  with jax.ensure_compile_time_eval():
    x = jnp.linspace(2.0**-10, 1, 4096).reshape(64, 64)
    stored = storage.store(x)
    if not isinstance(stored, QuantizedArray | jax.Array):
      raise TypeError(
        f"`storage` of {field!r} must store an array or a `QuantizedArray`, got a "
        f"{type(stored).__name__} from {storage!r}."
      )
    if isinstance(stored, QuantizedArray):
      again, value = encode(x, stored.codebook, stored.block), stored.dequantize(jnp.float32)
    else:
      again, value = x.astype(stored.dtype), stored.astype(jnp.float32)
    by_form, own = map(jax.tree.leaves, ((again, value), (stored, storage.load(stored))))
    if not all(map(jnp.array_equal, by_form, own)):
      raise ValueError(
        f"`storage` of {field!r}, {storage!r}, stores or loads otherwise than the form of what it "
        "stores says, and updates read and write that by its form alone. Put the arithmetic in a "
        "`Codebook`, and return what `Blockwise` stores with it."
      )


def block_shape(shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
  """The extent of a block along the last axes of an array of `shape`; see `Blockwise`.

  >>> block_shape((4096, 4096), 64), block_shape((10, 1000), 64), block_shape((512, 3, 3), 64)
  ((64,), (100,), (8, 3, 3))
  """
  block: tuple[int, ...] = ()
  for axis in reversed(range(len(shape))):
    n = shape[axis]
    if n >= block_size or axis == 0:
      most = max(1, n // block_size)
      # A count that divides leaves no short block, which the engine can walk in one flat run.
      even = (p for p in range(most, 0, -1) if n % p == 0 and n // p < 2 * block_size)
      return (math.ceil(n / next(even, most)), *block)
    block = (n, *block)
    block_size = math.ceil(block_size / n)
  return block
