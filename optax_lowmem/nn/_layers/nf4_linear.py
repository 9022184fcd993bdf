"""A frozen linear layer whose weight is stored in 4-bit NormalFloat."""

from __future__ import annotations

from typing import Any

from optax_lowmem.nn._layers.quantized_linear import QuantizedLinear


class NF4Linear(QuantizedLinear):
  r"""A `QuantizedLinear` in 4-bit NormalFloat, with the bits of bitsandbytes.

  Blocks are of 64 inputs; their scales themselves are 8-bit codes by default, 4.127 bits a
  parameter in all.

  The bits are those of bitsandbytes (row-major (out, in), high nibble first, double
  quantization in blocks of 256) where `in_features` is a multiple of `block_size`. Otherwise
  each row here ends in a shorter block of its own, where bitsandbytes lets blocks run on into
  the next row: the values differ slightly and the packed bytes are laid out differently.

  Args:
    weight: as in `QuantizedLinear`, of codebook `"nf4"`.
    bias: as in `QuantizedLinear`.
    dtype: as in `QuantizedLinear`.
    precision: as in `QuantizedLinear`.

  Raises:
    TypeError: `weight` is not a `QuantizedArray`.
    ValueError: `weight` is not NF4 or not a matrix, or `bias` does not fit it.

  >>> import jax, jax.numpy as jnp
  >>> from optax_lowmem import nn
  >>> layer = nn.NF4Linear.from_weight(jax.random.normal(jax.random.key(0), (256, 512)))
  >>> layer(jnp.ones((3, 512))).shape
  (3, 256)
  >>> round(layer.weight.get_value().nbytes * 8 / (256 * 512), 3)
  4.127

  References:
    Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, arXiv:2305.14314.
  """

  _codebooks: Any = ("nf4",)
