"""From an array to a `QuantizedArray`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from optax_lowmem._arguments.checks import check_block_size
from optax_lowmem._meshes.explicit_axes import is_explicit
from optax_lowmem._quantization.array import QuantizedArray, encode
from optax_lowmem._quantization.codebook import Codebook
from optax_lowmem._quantization.codebooks import CodebookName, get_codebook

_SCALE_BLOCK = 256  # double quantization: block of the scales, as in bitsandbytes


def quantize(
  x: jax.Array,
  codebook: CodebookName | Codebook = "dynamic",
  block_size: int = 256,
  double_quantize: bool = False,
) -> QuantizedArray:
  r"""Quantizes an array in blocks along its last axis.

  Each block of `block_size` consecutive elements is divided by its largest magnitude
  :math:`s`, and every quotient is replaced by the nearest value of the codebook (of
  `"log8_unsigned"` and `"log4_unsigned"`, by one of the two next to it, so that the mean is right;
  unsigned power codes store nothing that is positive as zero):

  .. math::
    c_i = \arg\min_c |q_c - x_i / s|, \quad s = \max_i |x_i|, \quad \hat x_i = q_{c_i} s.

  The last block of a row may be shorter. Non-finite elements are stored as zero and do not touch
  their neighbours.

  Args:
    x: floating array of rank 1 or more.
    codebook: a name: `"dynamic"`, `"dynamic_unsigned"` (bitsandbytes' 8-bit maps, code for code),
      `"linear"`, `"power8"`, `"power8_unsigned"`, `"log8"`, `"log8_unsigned"` (8 bits), `"nf4"`,
      `"fp4"`, `"power4"`, `"power4_unsigned"`, `"log4"`, `"log4_unsigned"` (4 bits); or a
      `Codebook`.
    block_size: elements a block; a positive even number.
    double_quantize: also quantize the scales: their mean is subtracted and the rest held in 8-bit
      `dynamic` codes with one float32 scale for 256 of them (Dettmers et al, 2023). The scales are
      taken in row-major order, so that the bits are those of bitsandbytes; of an array on explicit
      axes, each device holds those of all.

  Returns:
    A `QuantizedArray` of `x`'s shape and dtype.

  Raises:
    TypeError: if `x` is not floating.
    ValueError: for an unknown codebook, a bad block size, rank 0, or (if `x` is concrete) negative
      elements under an unsigned codebook.

  Examples:
    >>> import jax.numpy as jnp, optax_lowmem as lowmem
    >>> q = lowmem.quantize(jnp.array([[0.5, -1.0, 0.25, 0.0]]), "linear", block_size=4)
    >>> q.codes
    Array([[192,   1, 160, 128]], dtype=uint8)
    >>> q.scales, q.nbytes
    (Array([[1.]], dtype=float32), 8)

  References:
    Dettmers et al, `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021

    Dettmers et al, `QLoRA: Efficient Finetuning of Quantized LLMs
    <https://arxiv.org/abs/2305.14314>`_, 2023
  """
  book, block_size = get_codebook(codebook), check_block_size(block_size)
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"`x` must be a floating array, got {x.dtype}. Cast it first.")
  if x.ndim == 0:
    raise ValueError("`x` must have at least one axis, got a scalar. Reshape it to (1,).")
  if not book.signed and not isinstance(x, Tracer) and bool((x < 0).any()):
    raise ValueError(
      f"`x` has negative elements, and `codebook` {book.name!r} is unsigned. Use a signed "
      "codebook such as 'dynamic' or 'power8'."
    )
  q = encode(x, book, (block_size,))
  if not double_quantize:
    return q
  scales = _flat(q.scales)
  offset = _mean(scales)
  nested = encode(scales - offset, get_codebook("dynamic"), (_SCALE_BLOCK,))
  return dataclasses.replace(q, scales=dataclasses.replace(nested, offset=offset))


def _flat(scales: jax.Array) -> jax.Array:
  """A vector of scales, whose blocks are cut by no shard: on explicit axes, all on each device."""
  mesh = jax.typeof(scales).sharding.mesh
  whole = NamedSharding(mesh, PartitionSpec(None)) if is_explicit(mesh) else None
  return jax.lax.reshape(scales, (scales.size,), out_sharding=whole)


def _mean(x: jax.Array) -> jax.Array:
  """The mean of a vector, summed in halves: `mean` differs in the last bits under `jax.vmap`."""
  total = x
  while total.size > 1:
    if total.size % 2:
      total = jnp.pad(total, (0, 1))
    half = total.size // 2
    total = total[:half] + total[half:]
  return total.sum() / max(1, x.size)
