"""One Pallas kernel for every elementwise rule: decode, rule and encode of a tile, in one launch.

Triton, through `jax.experimental.pallas.triton`, is the one backend that takes this from jax 0.10
to 0.12: asked for by its `CompilerParams`, which jax 0.10 needs (its default is Mosaic GPU) and
later ones accept. From 0.11 on jax calls it deprecated, each time it lowers a kernel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.extend.core as jec
import jax.numpy as jnp

from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem._quantization.positions import Positions
from optax_lowmem._quantization.scales import single_maximum
from optax_lowmem.kernels._bodies import Body, as_argument, as_constant, traced, unknown

try:
  import jax.experimental.pallas as pl
  import jax.experimental.pallas.triton as triton

  _IMPORT_ERROR = None
except ImportError as error:  # a jax without that backend
  pl = triton = cast(Any, None)
  _IMPORT_ERROR = error

# 16 elements a thread: codes are then read and written 16 bytes at a time, bf16 gradients in two
# such loads, and 8-bit AdamW takes 96 registers (Triton 3.6, sm_90), so that 20 of 64 warps fit a
# multiprocessor. 8 elements: 64 registers, 32 warps, 8 bytes of codes at a time; 32: over 128. Read
# off the compiled code, not timed; `benchmarks/gpu.py` times them.
TILE = 2048
WARPS = 4
_LONGEST_BLOCK = 4096  # a block is never cut, so it is the least a tile can be
# Triton's offsets are int32 unless an array has more than 2^32 bytes, and the last tile may reach
# past the end of the array.
_MOST = 2**31 - 1 - _LONGEST_BLOCK

_DTYPES = frozenset(
  jnp.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int16, jnp.int8)
)
# What Triton's lowering knows on jax 0.10.2, 0.11.2 and 0.12.0: of the elementwise primitives all
# but copy, digamma, erf, erfc, lgamma, reduce_precision and round, and what decode and encode use.
_LOWERED = frozenset(
  """
  abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type
  cos cosh div eq erf_inv exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt
  max min mul ne neg nextafter not or pow rem rsqrt select_n shift_left shift_right_arithmetic
  shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
  bitcast_convert_type broadcast_in_dim iota jit pjit reduce_max reshape split squeeze
  """.split()
)

Tile = Any  # a jax.Array, or a QuantizedArray with a single level of scales


def supports(
  reads: Sequence[Tile],
  writes: Sequence[Tile],
  fresh: Sequence[jax.ShapeDtypeStruct] = (),
  fn: Body | None = None,
) -> str | None:
  """Says why `map_blocks` cannot take these arrays, or None if it can.

  Args:
    reads, writes, fresh: those of `map_blocks`.
    fn: if given, traced on a tile to see whether Triton knows what it does.
  """
  if _IMPORT_ERROR is not None:
    return f"this jax {jax.__version__} has no Triton backend of Pallas ({_IMPORT_ERROR})"
  arrays = [*reads, *writes, *fresh]
  size = math.prod(arrays[0].shape)
  if not 0 < size <= _MOST:
    return f"it has {size} elements, and the kernel takes 1 to {_MOST}"
  blocks = [a for a in arrays if isinstance(a, QuantizedArray)]
  if not blocks:
    return "nothing of it is quantized"
  for q in blocks:
    if reason := _unsupported(q):
      return reason
  for a in arrays:
    if not isinstance(a, QuantizedArray | Positions) and a.dtype not in _DTYPES:
      return f"an array has dtype {a.dtype}"
  return None if fn is None else unknown(_trace(fn, reads, writes, fresh), _LOWERED, "Triton")


def _unsupported(q: QuantizedArray) -> str | None:
  n, length = math.prod(q.extent), math.prod(q.block)
  if isinstance(q.scales, QuantizedArray) or q.offset is not None:
    return "its scales are quantized, too"
  if q.codebook.needs_table:
    return f"the codebook {q.codebook.name!r} needs a table; 'power8' and the like do not"
  if length & (length - 1) or not 16 <= length <= _LONGEST_BLOCK:
    return f"blocks have {length} elements, not a power of two from 16 to {_LONGEST_BLOCK}"
  if n % length:
    return f"rows of {n} elements are not whole blocks of {length}"
  return None


def map_blocks(
  fn: Body,
  reads: Sequence[Tile],
  writes: Sequence[Tile],
  fresh: Sequence[jax.ShapeDtypeStruct] = (),
  *,
  interpret: bool = False,
) -> list[Any]:
  """`tile_loop.map_tiles` in one launch: returns `fn(reads, writes)`, computed a tile at a time.

  Args:
    fn: takes a tile of each array and returns the new tiles of `writes`, in the same form, then
      those of `fresh`. Every element of a result may depend on the elements of its block only.
      Scalars of an outer trace that it closes over become arguments of the kernel.
    reads: arrays that are only read; all arrays have one logical shape.
    writes: arrays that are read and replaced, in place.
    fresh: shapes and dtypes of results that take no array's place.
    interpret: run the kernel's body as plain XLA operations, on any platform.

  Returns:
    The replaced `writes`, then `fresh`.

  Raises:
    ValueError: if the arrays are not supported; says why, as `supports` does.
  """
  if reason := supports(reads, writes, fresh):
    raise ValueError(f"the kernel cannot update this array: {reason}.")
  closed = _trace(fn, reads, writes, fresh)
  if reason := unknown(closed, _LOWERED, "Triton"):
    raise ValueError(f"the kernel cannot run this rule: {reason}.")
  size, tile = math.prod(writes[0].shape), _tile([*reads, *writes])
  scalars = [as_argument(c) for c in closed.consts]
  leaves, treedef = jax.tree.flatten([*writes, *fresh])
  replaced = [x.reshape(-1) for x in jax.tree.leaves(writes)]
  arrays = [*(x.reshape(-1) for x in jax.tree.leaves(reads)), *replaced]
  outs = [jax.ShapeDtypeStruct((math.prod(x.shape),), x.dtype) for x in leaves]

  def optax_lowmem_update(*refs):
    sources, constants = refs[: len(arrays)], refs[len(arrays) : len(arrays) + len(scalars)]
    consts = [as_constant(ref[0], c) for ref, c in zip(constants, closed.consts, strict=True)]
    body = jec.jaxpr_as_fun(jec.ClosedJaxpr(closed.jaxpr, consts))
    results = body(*(_load(ref, size, tile) for ref in sources))
    for ref, value in zip(refs[-len(outs) :], results, strict=True):
      triton.store(ref, value, mask=_inside(ref, size, tile))

  def part(x):  # of every array, what holds a tile: fewer codes of 4 bits, and fewer scales
    return pl.BlockSpec((tile * math.prod(x.shape) // size,), lambda i: (i,))

  new = pl.pallas_call(
    optax_lowmem_update,
    out_shape=outs,
    grid=(pl.cdiv(size, tile),),
    in_specs=[*map(part, arrays), *(pl.BlockSpec((1,), lambda i: (0,)) for _ in scalars)],
    out_specs=[*map(part, outs)],
    input_output_aliases={len(arrays) - len(replaced) + k: k for k in range(len(replaced))},
    compiler_params=triton.CompilerParams(num_warps=WARPS),
    interpret=interpret,
    name="optax_lowmem_update",
  )(*arrays, *scalars)
  return treedef.unflatten([x.reshape(like.shape) for x, like in zip(new, leaves, strict=True)])


def _tile(arrays: Sequence[Tile]) -> int:
  """Elements a tile: a power of two, as Triton wants it, of whole blocks."""
  blocks = [math.prod(a.block) for a in arrays if isinstance(a, QuantizedArray)]
  needed = 1 << (math.prod(arrays[0].shape) - 1).bit_length()
  return max(*blocks, min(TILE, needed))


def _trace(fn: Body, reads: Sequence[Tile], writes: Sequence[Tile], fresh: Sequence[Any]) -> Any:
  """The jaxpr of `fn` on flat tiles; what it closes over are its constants."""
  tile = _tile([*reads, *writes])
  tiles = [[_cut(a, tile) for a in x] for x in (reads, writes, [*writes, *fresh])]
  with single_maximum():
    return traced(fn, *tiles)


def _cut(a: Any, tile: int) -> Any:
  """The form of a tile of `a`, seen as one flat run of elements."""
  if not isinstance(a, QuantizedArray | Positions):
    return jax.ShapeDtypeStruct((tile,), a.dtype)
  length = math.prod(a.block)
  if isinstance(a, Positions):
    return Positions(jax.ShapeDtypeStruct((tile // length,), jnp.int32), (length,), (tile,))
  return dataclasses.replace(
    a,
    codes=jax.ShapeDtypeStruct((tile * a.codebook.bits // 8,), jnp.uint8),
    scales=jax.ShapeDtypeStruct((tile // length,), jnp.float32),
    block=(length,),
    extent=(tile,),
  )


def _load(ref: Any, size: int, tile: int) -> jax.Array:
  mask = _inside(ref, size, tile)
  if mask is None:
    return triton.load(ref)
  return triton.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def _inside(ref: Any, size: int, tile: int) -> jax.Array | None:
  """Which elements of a tile's part exist; None for all, where tiles leave no remainder."""
  if size % tile == 0:
    return None
  (part,) = ref.shape
  # Whole blocks exist or do not, which Triton sees: masked loads are as wide as others.
  index = pl.program_id(0) * part + jax.lax.iota(jnp.int32, part)
  return index < size * part // tile
