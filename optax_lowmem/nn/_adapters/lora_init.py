"""How the factors of an adapter start."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem.nn._layers.base_layer import (
  contraction_of,
  dense_variable,
  foreign_of,
  matrix_of,
  matrix_shape,
  set_matrix,
)
from optax_lowmem.nn._layers.nf4_linear import NF4Linear
from optax_lowmem.nn._layers.quantized_einsum import QuantizedEinsum
from optax_lowmem.nn._layers.quantized_linear import QuantizedLinear, check_codebook, over_stack
from optax_lowmem.nn._layers.quantized_module import QuantizedModule


@dataclasses.dataclass(frozen=True)
class LoftQ:
  r"""Quantize a float base, and start the adapter at the best correction of the error.

  .. math:: Q_t = \mathrm{quantize}(W - A_t B_t), \qquad
    A_{t+1} B_{t+1} = \mathrm{SVD}_r(W - Q_t), \qquad A_0 B_0 = 0

  Pass it as `init` to `add_lora` on layers that are not quantized yet; they then are. After one
  iteration the base holds the bits that `quantize_model` gives.

  Args:
    iterations: how often to quantize.
    codebook: as in `quantize_model`.
    block_size: as in `quantize_model`.
    double_quantize: as in `quantize_model`.

  >>> from flax import nnx
  >>> from optax_lowmem import nn
  >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
  >>> init = nn.LoftQ(iterations=2)
  >>> model = nn.add_lora(model, 8, 16, "all-linear", init=init, rngs=nnx.Rngs(1))
  >>> type(model.layers[0].base).__name__
  'NF4Linear'

  References:
    Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, 2023,
    arXiv:2310.08659.
  """

  iterations: int = 1
  codebook: Literal["nf4", "fp4", "int8"] = "nf4"
  block_size: int | None = 64
  double_quantize: bool | None = None

  def __post_init__(self):
    if self.iterations < 1:
      raise ValueError(f"`iterations` must be at least 1, got {self.iterations}.")
    check_codebook(self.codebook)


Init = Literal["default", "gaussian", "pissa", "loftq"] | LoftQ


def check_init(init: Any) -> None:
  if not isinstance(init, LoftQ) and init not in ("default", "gaussian", "pissa", "loftq"):
    raise ValueError(
      f"`init` must be 'default', 'gaussian', 'pissa', 'loftq' or a LoftQ, got {init!r}."
    )


def check_fits(rank: int, shape: tuple[int, ...], of: str = "") -> None:
  """Refuses a rank of which the weight has not as many singular vectors."""
  if rank > min(shape):
    raise ValueError(
      f"`rank` {rank} is larger than a side of the weight {shape}{of}, whose singular vectors "
      "`init` takes. Choose a smaller rank, or `init='default'`."
    )


def quantized(linear: Any, codebook: str, block_size: int | None, double: bool | None) -> Any:
  """A float layer, quantized."""
  options: Any = {"codebook": codebook, "block_size": block_size, "double_quantize": double}
  if foreign_of(linear) is not None:
    return QuantizedModule(linear, **options)
  if contraction_of(linear) is not None:
    return QuantizedEinsum(linear, **options)
  kind = NF4Linear if codebook == "nf4" else QuantizedLinear
  return kind.from_weight(
    linear.kernel[...].swapaxes(-1, -2),
    linear.bias,
    **options,
    dtype=linear.dtype,
    precision=linear.precision,
  )


def initial_factors(
  base: Any, rank: int, ranks: Any, scale: Any, init: Init, param_dtype: Any, rngs: nnx.Rngs
) -> tuple[Any, jax.Array, jax.Array, bool]:
  """The base, A (..., in, r) and B (..., r, out), and whether the base was changed for them.

  A and B are in `param_dtype`; the room made in a base is for them as they are rounded.
  """
  base, a, b, started = _factors(base, rank, ranks, scale, init, param_dtype, rngs)
  return base, a.astype(param_dtype), b.astype(param_dtype), started


def _factors(
  base: Any, rank: int, ranks: Any, scale: Any, init: Init, param_dtype: Any, rngs: nnx.Rngs
) -> tuple[Any, jax.Array, jax.Array, bool]:
  *lead, out, inputs = matrix_shape(base)
  embed = isinstance(base, nnx.Embed)
  if init == "loftq":
    init = LoftQ()
  if isinstance(init, LoftQ) and not embed:
    if dense_variable(base) is None:
      raise ValueError(
        "`init` 'loftq' needs the weights before they are quantized. Call `add_lora` on the "
        "float model, without `quantize_model`; it quantizes the layers that it adapts."
      )
    return (*_loftq(base, rank, ranks, scale, init), True)
  if init == "pissa" and not embed:
    w = matrix_of(base)
    a, b = (x.astype(param_dtype) for x in _svd(w, rank, ranks, scale))
    return set_matrix(base, w - _product(a, b, scale)), a, b, True
  key, a_shape = rngs.params(), (*lead, inputs, rank)
  if embed:  # as PEFT: looking up is cheap in A, so A is the factor that starts at zero
    b = jax.random.normal(key, (*lead, rank, out), jnp.float32)
    return base, jnp.zeros(a_shape, jnp.float32), _mask(b, ranks, -2), False
  if init == "gaussian":
    divide = jnp.asarray(rank if ranks is None else [max(r, 1) for r in ranks], jnp.float32)
    a = jax.random.normal(key, a_shape, jnp.float32)
    a = a / divide.reshape(divide.shape + (1,) * (a.ndim - divide.ndim) if ranks else ())
  else:
    bound = 1 / inputs**0.5
    a = jax.random.uniform(key, a_shape, jnp.float32, -bound, bound)
  return base, _mask(a, ranks, -1), jnp.zeros((*lead, rank, out), jnp.float32), False


def _mask(factor: jax.Array, ranks: Any, axis: int) -> jax.Array:
  """Zero beyond each layer's rank."""
  if ranks is None:
    return factor
  keep = jnp.arange(factor.shape[axis]) < jnp.asarray(ranks)[:, None]  # (layers, rank)
  shape = [1] * factor.ndim
  shape[0], shape[axis] = keep.shape
  return jnp.where(keep.reshape(shape), factor, 0.0)


def _spread(scale: Any, like: jax.Array) -> Any:
  if isinstance(scale, float):
    return scale
  return scale.reshape(scale.shape + (1,) * (like.ndim - scale.ndim))


def _product(a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  product = jnp.einsum("...ir,...ro->...oi", a, b, precision="highest")
  return _spread(scale, product) * product


def _svd(w: jax.Array, rank: int, ranks: Any, scale: Any) -> tuple[jax.Array, jax.Array]:
  """A and B whose scaled product is the best approximation of (..., out, in) of that rank."""
  check_fits(rank, w.shape[-2:])
  u, s, v = over_stack(
    lambda one: jnp.linalg.svd(one, full_matrices=False), w.ndim - 2, jax.lax.map
  )(w)
  root = jnp.sqrt(s[..., :rank])
  scale = _spread(scale, root)
  root = root / jnp.sqrt(jnp.where(scale > 0, scale, 1.0))
  a = v[..., :rank, :].swapaxes(-1, -2) * root[..., None, :]
  b = u[..., :rank].swapaxes(-1, -2) * root[..., :, None]
  return _mask(a, ranks, -1), _mask(b, ranks, -2)


def _loftq(base: Any, rank: int, ranks: Any, scale: Any, init: LoftQ) -> Any:
  w = matrix_of(base)
  options = (init.codebook, init.block_size, init.double_quantize)
  new = quantized(base, *options)
  a, b = _svd(w - new.dequantize(), rank, ranks, scale)
  for _ in range(init.iterations - 1):
    new = new.requantized(w - _product(a, b, scale))
    a, b = _svd(w - new.dequantize(), rank, ranks, scale)
  return new, a, b
