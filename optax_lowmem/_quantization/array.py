"""Block-wise quantized arrays: codes, one scale a block, and the two functions between."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowmem._quantization.codebook import Codebook
from optax_lowmem._quantization.nibbles import pack, pack_halves, unpack, unpack_halves
from optax_lowmem._quantization.scales import largest, scales_of
from optax_lowmem._quantization.tangents import without_tangent

_EXPONENT = 0x7F800000  # the bits of a float32 that are all set if it is not finite


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, repr=False)
class QuantizedArray:
  r"""An array held as codes and one scale a block, a pytree of its arrays.

  The value is ``codebook.decode(code) * scale (+ offset)``. NumPy and JAX functions take it as the
  array that it stands for; functions of pytrees see its codes and scales.

  The key path of the codes names their form: ``.codes_power8_64`` are those of the codebook
  `"power8"` in blocks of 64. What saves arrays by their path, as Orbax does, so saves the form, and
  refuses to restore codes as those of another one.

  A block covers `block[0]` consecutive indices of axis ``-len(block)`` and all of the axes after
  it; axes before it are independent. So blocks are contiguous runs in row-major order, the last one
  of a row may be shorter, and rank is kept: every axis of `scales` is an axis of the array, which
  therefore can be sharded as the array is.

  Invariants, with ``k = len(block)``, the number of axes that blocks lie along:

  - ``extent == shape[-k:]``;
  - ``codes.shape == shape`` for 8-bit codebooks; 4-bit codes lie two a byte, the first in the high
    half: ``codes.shape == (*shape[:-k], bytes, 1, …, 1)``. For `nf4` and `fp4` they are neighbours,
    as in bitsandbytes, and ``bytes == ceil(prod(extent) / 2)``; for this library's own, which are
    for optimizer state, they lie half a block apart, the last block is filled up with zeros, and
    ``bytes == ceil(extent[0] / block[0]) * ceil(prod(block) / 2)``;
  - ``scales.shape == (*shape[:-k], ceil(extent[0] / block[0]), 1, …, 1)``, float32; or, double
    quantized, a `QuantizedArray` over the flattened scales;
  - leading axes may be added or removed by `jax.vmap`, `jax.lax.scan`, stacking or indexing of all
    leaves: no leading size is a static field.

  Attributes:
    codes: uint8.
    scales: largest magnitude of each block: a jax.Array, or a `QuantizedArray` of them.
    offset: `None`, or a scalar added to every value (of doubly quantized scales: their mean).
    codebook: what the codes mean.
    block: extent of a block along the last ``len(block)`` axes; ``block[1:] == extent[1:]``.
    extent: sizes of those axes.
    dtype: dtype of the array that was quantized, and of `dequantize()`.
  """

  codes: jax.Array
  scales: Any
  offset: jax.Array | None
  codebook: Codebook
  block: tuple[int, ...]
  extent: tuple[int, ...]
  dtype: Any

  def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arrays, and what is static."""
    arrays = self.codes, self.scales, self.offset
    return arrays, (self.codebook, self.block, self.extent, self.dtype)

  def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arrays with their keys, and what is static."""
    arrays, static = self.tree_flatten()
    keys = map(jax.tree_util.GetAttrKey, (self.form, "scales", "offset"))
    return tuple(zip(keys, arrays, strict=True)), static

  @classmethod
  def tree_unflatten(cls, static: tuple[Any, ...], arrays: Sequence[Any]) -> QuantizedArray:
    """The inverse of `tree_flatten`."""
    return cls(*arrays, *static)

  @property
  def form(self) -> str:
    """What the codes are, and the key under which they stand in a tree."""
    return f"codes_{self.codebook.name}_{'x'.join(map(str, self.block))}"

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the array that was quantized."""
    return (*self.codes.shape[: -len(self.block)], *self.extent)

  @property
  def ndim(self) -> int:
    """Rank of the array that was quantized."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Number of elements of the array that was quantized."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes held: codes, scales and offset."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

  def dequantize(self, dtype: Any = None) -> jax.Array:
    """Returns the values as an array of `shape`, in `dtype` (default: the original dtype)."""
    return _dequantize(self, jnp.dtype(self.dtype if dtype is None else dtype))

  def __jax_array__(self) -> jax.Array:
    return self.dequantize()

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    if copy is False:
      raise ValueError("a QuantizedArray cannot be converted without a copy. Leave `copy` out.")
    return np.asarray(self.dequantize(), dtype)

  def astype(self, dtype: Any) -> Any:
    """Raises TypeError: its codes cannot be cast. `dequantize(dtype)` gives values in a dtype."""
    raise TypeError(
      f"a QuantizedArray cannot be cast to {dtype}, its codes would be lost. Take its values with "
      "`dequantize(dtype)`, or leave it out, as in `jax.tree.map(..., is_leaf=lambda x: "
      "isinstance(x, QuantizedArray))`."
    )

  def __repr__(self) -> str:
    leaves = jax.tree.leaves(self)
    known = hasattr(self.codes, "dtype") and len(self.codes.shape) >= len(self.block)
    shape = ",".join(map(str, self.shape if known else ("...", *self.extent)))
    block = self.block[0] if len(self.block) == 1 else self.block
    text = f"{jnp.dtype(self.dtype)}[{shape}], codebook={self.codebook.name!r}, block={block}"
    if isinstance(self.scales, QuantizedArray):
      text += ", double_quantize=True"
    if not known:  # a tree of something else, such as shardings
      text += f", leaves={leaves}"
    return f"QuantizedArray({text})"


# Compiled also when called outside `jit`: op by op, the temporaries would be several times `x`.
@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def encode(x: jax.Array, codebook: Codebook, block: tuple[int, ...]) -> QuantizedArray:
  """Quantizes `x` in blocks of extent `block` along its last axes; see `QuantizedArray`."""
  return encode_finite(finite_or(x, 0.0), codebook, block)


def encode_finite(
  x: jax.Array, codebook: Codebook, block: tuple[int, ...], old: jax.Array | None = None
) -> QuantizedArray:
  """`encode` for an `x` that is known to be finite, in the place of `old`, if there was one."""
  lead, n = _merge(x.shape, block)
  ones, count = (1,) * (len(block) - 1), -(-n // math.prod(block))
  if not x.size:
    return _empty(x, codebook, block)

  def split(x):
    return _split(x.astype(jnp.float32).reshape(*lead, n), math.prod(block))

  olds = None if old is None else [split(old)]
  (codes,), scales = _encode_parts([split(x)], codebook, olds)
  if codebook.bits == 8:
    codes = _join(codes, lead, n).reshape(x.shape)
  elif codebook.pairs_neighbours:
    codes = pack(_join(codes, lead, n)).reshape(*lead, -(-n // 2), *ones)
  else:
    codes = pack_halves(codes)
    codes = codes.reshape(*lead, count * codes.shape[-1], *ones)
  return QuantizedArray(
    codes=codes,
    scales=scales.reshape(*lead, count, *ones),
    offset=None,
    codebook=codebook,
    block=block,
    extent=x.shape[len(lead) :],
    dtype=x.dtype,
  )


def _empty(x: jax.Array, codebook: Codebook, block: tuple[int, ...]) -> QuantizedArray:
  """An array without elements: none of its codes and scales either, along the same axes."""
  one = encode_finite(jnp.ones([max(1, n) for n in x.shape], x.dtype), codebook, block)
  lead = x.shape[: x.ndim - len(block)]
  none = (0, *(1,) * (len(block) - 1)) if 0 in x.shape[len(lead) :] else None
  arrays = jax.tree.map(lambda a: jnp.zeros((*lead, *(none or a.shape[len(lead) :])), a.dtype), one)
  return dataclasses.replace(arrays, extent=x.shape[len(lead) :])


def _encode_parts(
  parts: Sequence[jax.Array], codebook: Codebook, olds: Sequence[jax.Array] | None
) -> tuple[list[jax.Array], jax.Array]:
  """Codes of parts of the same blocks, (…, length of the part), and their scales, (…, 1)."""
  parts = [without_tangent(x) for x in parts]
  scales = scales_of(largest(parts, codebook.signed), codebook)
  pairs = zip(parts, olds or [None] * len(parts), strict=True)
  return [_encode_blocks(codebook, x, scales, old) for x, old in pairs], scales


# Traced once for all arrays of one shape: an update takes four fifths of the time to trace.


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _encode_blocks(codebook: Codebook, x: jax.Array, scales: jax.Array, old: Any) -> jax.Array:
  return codebook.encode_blocks(x, scales, old)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _decode_blocks(codebook: Codebook, codes: jax.Array, scales: jax.Array) -> jax.Array:
  return codebook.decode_blocks(codes, scales)


# A row of a tile is a block, and XLA makes slow code of anything that takes a row of 4-bit codes
# apart and joins it (3.7 ms a tile of 2^19 elements, against 0.2). So a tile of codes that lie half
# a block apart is decoded to two arrays, which stay two until they are encoded.


def has_halves(q: QuantizedArray) -> bool:
  """Whether `q` has one block a row, whose 4-bit codes lie half a block apart."""
  packed = q.codebook.bits == 4 and not q.codebook.pairs_neighbours
  return packed and q.block == q.extent and len(q.block) == 1 and q.block[0] % 2 == 0


def decode_halves(q: QuantizedArray) -> tuple[jax.Array, jax.Array]:
  """The two halves of every row of a `q` with one block a row, each (…, length / 2), float32."""
  if not has_halves(q):  # beside one that has
    values, half = q.dequantize(jnp.float32), q.extent[0] // 2
    return values[..., :half], values[..., half:]
  high, low = (_decode_blocks(q.codebook, c, q.scales) for c in (q.codes >> 4, q.codes & 15))
  return high, low


def encode_halves(
  halves: Sequence[jax.Array], like: QuantizedArray, olds: Sequence[jax.Array]
) -> QuantizedArray:
  """The inverse of `decode_halves`, of finite values in the place of `olds`."""
  if not has_halves(like):
    new, old = (jnp.concatenate(x, axis=-1) for x in (halves, olds))
    return encode_finite(new, like.codebook, like.block, old)
  (high, low), scales = _encode_parts(halves, like.codebook, olds)
  return dataclasses.replace(like, codes=(high << 4) | low, scales=scales)


def is_finite(x: jax.Array) -> jax.Array:
  """`jnp.isfinite`, by the bits of a float32: an eighth of the time on a CPU."""
  if x.dtype != jnp.float32:
    return jnp.isfinite(x)
  return (jax.lax.bitcast_convert_type(x, jnp.int32) & _EXPONENT) != _EXPONENT


def finite_or(new: jax.Array, old: jax.Array | float) -> jax.Array:
  """`new` where it is finite, `old` elsewhere."""
  return jnp.where(is_finite(new), new, old)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _dequantize(q: QuantizedArray, dtype: Any) -> jax.Array:
  scales = q.scales
  if isinstance(scales, QuantizedArray):
    scales = scales.dequantize()
  lead, n = _merge(q.shape, q.block)
  length = math.prod(q.block)
  if not q.size:
    return jnp.zeros(q.shape, dtype)
  scales = scales.reshape((*lead, 1) if n <= length else (*lead, -(-n // length), 1))
  if q.codebook.bits == 8:
    blocks = _split(q.codes.reshape(*lead, n), length)
  elif q.codebook.pairs_neighbours:
    blocks = _split(unpack(q.codes.reshape(*lead, -(-n // 2)))[..., :n], length)
  else:
    blocks = unpack_halves(q.codes.reshape(*scales.shape[:-1], -(-length // 2)))[..., :length]
  values = _decode_blocks(q.codebook, blocks, scales)
  values = _join(values, lead, n).reshape(q.shape)
  if q.offset is not None:
    # The product is to be rounded before the sum, as in bitsandbytes. Without something between
    # them XLA contracts the two, and one value in twenty differs by an ulp.
    values = jnp.maximum(values, jnp.finfo(jnp.float32).min) + q.offset[..., None]
  return values.astype(dtype)


def _merge(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
  """The leading axes, and the size of the axes that blocks lie along, merged into one."""
  split = len(shape) - len(block)
  return shape[:split], math.prod(shape[split:])


def _split(x: jax.Array, length: int) -> jax.Array:
  """(…, n) -> (…, ceil(n / length), length), the last block padded with zeros.

  One block a row stays (…, length): XLA would copy an array with an axis of one to lay it out.
  """
  n = x.shape[-1]
  ragged = -n % length
  if ragged:
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, ragged)])
  return x if n <= length else x.reshape(*x.shape[:-1], x.shape[-1] // length, length)


def _join(blocks: jax.Array, lead: tuple[int, ...], n: int) -> jax.Array:
  """Undoes `_split` of an array of leading axes `lead`: (*lead, n), without the padding."""
  return blocks.reshape(*lead, blocks.size // max(1, math.prod(lead)))[..., :n]
