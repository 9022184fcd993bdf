"""The scale of a block: its largest magnitude, found in integers; and scales that are damaged."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._quantization.codebook import TINY, Codebook

_single_maximum = contextvars.ContextVar("single_maximum", default=False)


def scales_of(bits: jax.Array, codebook: Codebook) -> jax.Array:
  """The scales of blocks, from the bits of their largest magnitudes."""
  scales = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return jnp.where(scales < TINY, 0.0, jnp.maximum(scales, codebook.smallest_scale))


def largest(parts: Sequence[jax.Array], signed: bool) -> jax.Array:
  """Bits of the largest magnitude of each block of finite float32: (…, length) -> (…, 1).

  `parts` are those of the same blocks. If not `signed`, negative values count as zero.
  """
  # Patterns of magnitudes are in the order of the magnitudes. Maxima of integers vectorize, those
  # of floats do not; halving first leaves XLA a loop over whole vectors: 5 ms, not 39, for 2^24.
  pattern = functools.reduce(jnp.maximum, [magnitudes(x, signed) for x in parts])
  while not _single_maximum.get() and pattern.shape[-1] % 2 == 0 and pattern.shape[-1] > 16:
    half = pattern.shape[-1] // 2
    pattern = jnp.maximum(pattern[..., :half], pattern[..., half:])
  return pattern.max(axis=-1, keepdims=True, initial=0)


def magnitudes(x: jax.Array, signed: bool) -> jax.Array:
  """Integers in the order of the magnitudes of finite float32: their bits without the sign.

  If not `signed`, negative values come out negative.
  """
  pattern = jax.lax.bitcast_convert_type(x, jnp.int32)
  return pattern & 0x7FFFFFFF if signed else pattern


@contextlib.contextmanager
def single_maximum() -> Iterator[None]:
  """What is traced within takes the maximum of a block in one operation; the values are the same.

  For accelerators. In a Triton kernel, the halves of a block lie in other threads (71 barriers,
  not 7). XLA fuses one reduction with what it is made of, and writes a slice of it to memory.
  """
  token = _single_maximum.set(True)
  try:
    yield
  finally:
    _single_maximum.reset(token)


def healed(moments: Sequence[Any]) -> list[Any]:
  """Moments of one parameter, those that have scales as they should be.

  A scale that is not finite came from outside, from a damaged checkpoint. Its block would be NaN
  for ever, since what is not finite is never stored. So it starts again at zero, and with it the
  same block of the other moments: a first moment without its second makes updates explode.
  """

  def scales(x):
    return jax.tree.leaves(getattr(x, "scales", ()))

  def shape(x):
    return tuple(s.shape for s in scales(x))

  finite: dict[Any, list[jax.Array]] = {}
  for x in moments:
    mine = [jnp.isfinite(s) for s in scales(x)]
    others = finite.get(shape(x), mine)
    finite[shape(x)] = [a & b for a, b in zip(mine, others, strict=True)]

  def heal(x):
    flat, treedef = jax.tree.flatten(x.scales)
    # Zeros as an array: under a mesh, jax 0.10 lays a number out anew, which no kernel can.
    pairs = zip(finite[shape(x)], flat, strict=True)
    kept = [jnp.where(f, s, jnp.zeros_like(s)) for f, s in pairs]
    return dataclasses.replace(x, scales=treedef.unflatten(kept))

  return [heal(x) if scales(x) else x for x in moments]
