"""A Dense layer of Flax Linen whose weight is quantized."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from optax_lowmem._linear.contraction import Contraction
from optax_lowmem._linear.own_product import own_settings, sets
from optax_lowmem._linear.packed_weight import check_codebook, quantize_stack
from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem.linen._product import packed_product


class NF4Dense(nn.Dense, kw_only=True):
  r"""A `flax.linen.Dense` with a frozen weight in 4 or 8 bits.

  .. math:: y = x \hat W^T + b

  The packed weight is a `QuantizedArray` of logical shape (out, in) named `kernel` in the
  collection `"quantized"`; the bias is where Dense has it, `"params"`. The weight is decoded for
  the product, again in the backward pass, and never kept. It receives no gradient: an optimizer
  over `"params"` does not see it. Its outputs are bit for bit those of `optax_lowmem.nn.NF4Linear`.

  `init` quantizes the kernel that Dense would have with the same key. To take the kernels of a
  checkpoint, use `pack`. Under `nn.scan` or `nn.vmap` give `variable_axes` an entry
  ``"quantized": 0``.

  Invariants: ``variables["quantized"]["kernel"].shape == (features, in)``.

  Args:
    features: as in `flax.linen.Dense`, and so are `use_bias`, `dtype`, `param_dtype`,
      `precision`, `kernel_init` and `bias_init`.
    codebook: `"nf4"`, `"fp4"` or `"int8"`.
    block_size: how many inputs share a scale; None is all inputs of an output.
    double_quantize: store the scales in 8 bits too; None does so for 4-bit codes.

  Raises:
    ValueError: `codebook` or `block_size` is none, or `dot_general`, `dot_general_cls` or
      `promote_dtype` is set: the product here is one of packed weights.

  >>> import jax, jax.numpy as jnp
  >>> from optax_lowmem import linen
  >>> layer = linen.NF4Dense(256)
  >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 512)))
  >>> layer.apply(variables, jnp.ones((3, 512))).shape
  (3, 256)
  >>> round(variables["quantized"]["kernel"].nbytes * 8 / (256 * 512), 3)
  4.127

  References:
    Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, arXiv:2305.14314.
  """

  codebook: Literal["nf4", "fp4", "int8"] = "nf4"
  block_size: int | None = 64
  double_quantize: bool | None = None

  def __post_init__(self):
    check_packable(self)
    super().__post_init__()

  @nn.compact
  def __call__(self, inputs: Any) -> jax.Array:
    """Returns the product of `inputs`, (..., in), with the decoded weight, plus the bias."""
    return packed_dense(self, inputs, self.codebook, self.block_size, self.double_quantize)


def check_packable(module: Any) -> None:
  check_codebook(module.codebook)
  if own := own_settings(module, nn.Dense.promote_dtype):
    raise ValueError(
      f"{sets(f'this {type(module).__name__}', own)} Leave it out, or use `flax.linen.Dense`."
    )


def check_unboxed(name: str, value: Any) -> None:
  if isinstance(value, nn.meta.AxisMetadata):
    raise ValueError(
      f"`{name}` is in a box of partitioning names, which do not name the axes of a packed kernel. "
      "Take it out with `flax.linen.unbox`, or leave out `with_partitioning`."
    )


def packed_dense(
  module: Any, x: Any, codebook: str, block_size: int | None, double_quantize: bool | None
) -> jax.Array:
  """The product of a bound Dense module whose kernel is in the collection `"quantized"`."""
  x = jnp.asarray(x)
  shape = (x.shape[-1], module.features)

  def initial() -> QuantizedArray:
    kernel = module.kernel_init(module.make_rng("params"), shape, module.param_dtype)
    check_unboxed("kernel_init", kernel)
    return quantize_stack(kernel.T, codebook, block_size, double_quantize)

  if module.has_variable("params", "kernel"):
    raise ValueError(
      f"{type(module).__name__} {'.'.join(module.path)!r} found a `kernel` in the collection "
      "'params', where it has none. Pack it with `pack(params, like)`."
    )
  weight: Any = module.variable("quantized", "kernel", initial).value
  if not isinstance(weight, QuantizedArray):
    raise TypeError(
      f"the kernel of {type(module).__name__} {'.'.join(module.path)!r} in the collection "
      f"'quantized' must be a QuantizedArray, got {type(weight).__name__}. Use `pack`."
    )
  bias = None
  if module.use_bias:
    bias = module.param("bias", module.bias_init, (module.features,), module.param_dtype)
  return packed_product(x, weight, Contraction.dense(*shape), bias, module.dtype, module.precision)
