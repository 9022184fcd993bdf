"""The kernel for TPUs: decode, rule and encode in one launch, by Mosaic.

It differs from the one for GPUs in what a tile is. There it is a flat run of blocks. A TPU computes
on registers of 8 x 128 elements and does not split the 128, so here it is a part of a matrix, with
whole blocks in its rows; see `lane_tiles`. Compiled for a v5e, 8-bit AdamW of 4096 x 4096
float32 has no temporaries, where XLA's operations had 4 B/param.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.extend.core as jec
import jax.numpy as jnp

from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem.kernels._bodies import Body, as_argument, as_constant, traced, unknown

try:
  import jax.experimental.pallas as pl
  import jax.experimental.pallas.tpu as pltpu

  from optax_lowmem.kernels import _tpu_grid as tiles

  _IMPORT_ERROR = None
except ImportError as error:  # a jax without that backend
  pl = pltpu = tiles = cast(Any, None)
  _IMPORT_ERROR = error

_WIDEST = 1024  # columns that are computed at once: 32 registers a value
_DTYPES = frozenset(jnp.dtype(d) for d in (jnp.float32, jnp.bfloat16))
# What Mosaic's lowering knows on jax 0.10.2 and 0.12.0: elementwise primitives, and what decode and
# encode use.
_LOWERED = frozenset(
  """
  abs add and atan2 ceil clamp convert_element_type cos div eq erf erf_inv exp exp2 floor ge gt
  integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow rem round
  rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sqrt square
  stop_gradient sub tan tanh xor
  bitcast_convert_type broadcast_in_dim iota jit pjit reduce_max
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
    fn: if given, traced on a tile to see whether Mosaic knows what it does.
  """
  if _IMPORT_ERROR is not None:
    return f"this jax {jax.__version__} has no TPU backend of Pallas ({_IMPORT_ERROR})"
  arrays = [*reads, *writes, *fresh]
  if not math.prod(arrays[0].shape):
    return "it has no elements"
  quantized = [a for a in arrays if isinstance(a, QuantizedArray)]
  if not quantized:
    return "nothing of it is quantized"
  for q in quantized:
    if reason := _unsupported(q):
      return reason
  if len({q.block for q in quantized}) > 1:
    return "its arrays have blocks of different lengths"
  if (width := tiles.unit_of(quantized)) > _WIDEST:
    return f"whole blocks fill whole registers only every {width} elements, over {_WIDEST}"
  for a in arrays:
    if not isinstance(a, QuantizedArray) and a.dtype not in _DTYPES:
      return f"an array has dtype {a.dtype}"
  if fn is None:
    return None
  grid = tiles.grid_of(reads, writes, fresh)
  closed = _trace(fn, reads, writes, fresh, grid.widths[0])
  return unknown(closed, _LOWERED, "Mosaic")


def _unsupported(q: QuantizedArray) -> str | None:
  if isinstance(q.scales, QuantizedArray) or q.offset is not None:
    return "its scales are quantized, too"
  if q.codebook.needs_table:
    return f"the codebook {q.codebook.name!r} needs a table; 'power8' and the like do not"
  if len(q.block) != 1:
    return f"a block covers several rows, {q.block}"
  if q.extent[0] % q.block[0]:
    return f"rows of {q.extent[0]} elements are not whole blocks of {q.block[0]}"
  for n in (q.extent[0], q.codes.shape[-1]):
    if n % tiles.LANES:
      return f"rows of {n} do not fill {tiles.LANES} lanes, so that XLA lays out columns"
  return None


def map_blocks(
  fn: Body,
  reads: Sequence[Tile],
  writes: Sequence[Tile],
  fresh: Sequence[jax.ShapeDtypeStruct] = (),
  *,
  interpret: bool = False,
) -> list[Any]:
  """`kernels.map_blocks` on a TPU; a tile is a `VectorTile` where it is one of a `QuantizedArray`.

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
  grid = tiles.grid_of(reads, writes, fresh)
  bodies = {width: _trace(fn, reads, writes, fresh, width) for width in grid.widths}
  for closed in bodies.values():
    if reason := unknown(closed, _LOWERED, "Mosaic"):
      raise ValueError(f"the kernel cannot run this rule: {reason}.")
  olds, news = [*reads, *writes], [*writes, *fresh]
  sources = [x for a in olds for x in tiles.view(a, grid)]
  outs = [x for a in news for x in jax.eval_shape(lambda a: tiles.view(a, grid), a)]
  constants = [c for closed in bodies.values() for c in closed.consts]
  replaced = len(jax.tree.leaves(list(writes)))

  def optax_lowmem_update(*refs):
    refs = iter(refs)
    old = [[next(refs) for _ in tiles.view_specs(a, grid)] for a in olds]
    consts = {
      width: [as_constant(next(refs)[0, 0], c) for c in closed.consts]
      for width, closed in bodies.items()
    }
    new = [[next(refs) for _ in tiles.view_specs(a, grid)] for a in news]
    old = [tiles.Refs(a, x, refs, grid) for a, x in zip(olds, old, strict=True)]
    new = [tiles.Refs(a, x, refs, grid) for a, x in zip(news, new, strict=True)]
    for a in old:
      a.open()

    def update(part):
      closed = bodies[part.width]
      body = jec.jaxpr_as_fun(jec.ClosedJaxpr(closed.jaxpr, consts[part.width]))
      results = body(*jax.tree.leaves([a.load(part) for a in old]))
      tree = jax.tree.structure([tiles.form(a, part.width) for a in news])
      for a, value in zip(new, tree.unflatten(results), strict=True):
        a.store(part, value)

    tiles.for_parts(grid, update)
    for a in new:
      a.close()

  # With two axes of its own, a scalar may be one of many under `jax.vmap`.
  scalar = pl.BlockSpec((1, 1), lambda *_: (0, 0), memory_space=pltpu.SMEM)
  quantized = [a for a in [*olds, *news] if isinstance(a, QuantizedArray)]
  scratch = pltpu.VMEM((grid.rows, grid.width // grid.length), jnp.float32)
  results = pl.pallas_call(
    optax_lowmem_update,
    out_shape=outs,
    grid=grid.steps,
    in_specs=[
      *(spec for a in olds for spec in tiles.view_specs(a, grid)),
      *(scalar for _ in constants),
    ],
    out_specs=[spec for a in news for spec in tiles.view_specs(a, grid)],
    scratch_shapes=[] if grid.upright else [scratch for _ in quantized],
    input_output_aliases={len(sources) - replaced + k: k for k in range(replaced)},
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
    interpret=interpret,
    name="optax_lowmem_update",
  )(*sources, *(as_argument(c).reshape(1, 1) for c in constants))
  results = iter(results)
  views = ([next(results) for _ in tiles.view_specs(a, grid)] for a in news)
  return [tiles.restored(x, a, grid) for x, a in zip(views, news, strict=True)]


def _trace(
  fn: Body, reads: Sequence[Tile], writes: Sequence[Tile], fresh: Sequence[Any], width: int
) -> Any:
  """The jaxpr of `fn` on parts of so many columns; what it closes over are its constants."""
  read, write = ([tiles.form(a, width) for a in x] for x in (reads, writes))
  return traced(fn, read, write, [tiles.form(a, width, jnp.uint8) for a in [*writes, *fresh]])
