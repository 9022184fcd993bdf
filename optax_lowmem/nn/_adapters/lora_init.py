"""How the factors of an adapter start."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem._linear.packed_weight import check_codebook, over_stack
from optax_lowmem._variants.lora_scale import masked, spread
from optax_lowmem._variants.variant import matrix
from optax_lowmem.nn._layers.base_layer import dense_variable, matrix_of, matrix_shape, set_matrix
from optax_lowmem.nn._layers.quantize_layer import check_product, quantized
from optax_lowmem.nn._proofs.flax_layers import is_embed


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


class LoRAStart(nnx.Variable[jax.Array]):
  """A factor as it was before training, where the base was changed to make room for it."""


Init = Literal["default", "gaussian", "pissa", "loftq"] | LoftQ


def check_init(init: Any) -> None:
  if not isinstance(init, LoftQ) and init not in ("default", "gaussian", "pissa", "loftq"):
    raise ValueError(
      f"`init` must be 'default', 'gaussian', 'pissa', 'loftq' or a LoftQ, got {init!r}."
    )


def check_start(name: str, base: Any, rank: Any, init: Init) -> None:
  """Refuses a layer whose adapter cannot start as `init` says."""
  loftq = init == "loftq" or isinstance(init, LoftQ)
  if is_embed(base) or not (loftq or init == "pissa"):
    return
  if loftq:
    if dense_variable(base) is None:
      raise ValueError(
        f"{name} is quantized, and `init` 'loftq' needs the weights before they are quantized. "
        "Call `add_lora` on the float model, without `quantize_model`; it quantizes the layers "
        "that it adapts."
      )
    check_product(name, base)
  largest, shape = max(rank) if isinstance(rank, Sequence) else rank, matrix_shape(base)[-2:]
  if largest > min(shape):
    raise ValueError(
      f"`rank` {largest} is larger than a side of the weight {shape} of {name}, whose singular "
      "vectors `init` takes. Choose a smaller rank, or `init='default'`."
    )


def starting_factors(
  layer: Any, shapes: Mapping[str, Any], init: Init, param_dtype: Any, rngs: nnx.Rngs
) -> dict[str, jax.Array] | None:
  """A (..., in, r) and B (..., r, out) where `init` is a way of its own; of embeddings none is.

  Where they are taken out of the base, `layer` gets another, with room for them as they are
  rounded to `param_dtype`, and remembers them.
  """
  if layer.is_embed or init == "default":
    return None
  if init == "gaussian":
    ranks = layer.rank if layer.ranks is None else [max(r, 1) for r in layer.ranks]
    a = jax.random.normal(rngs.params(), shapes["lora_a"], jnp.float32)
    return {"lora_a": a / spread(jnp.asarray(ranks, jnp.float32), a.ndim)}
  if init == "pissa":
    w = matrix_of(layer.base)
    a, b = (x.astype(param_dtype) for x in _svd(w, layer))
    layer.base = set_matrix(layer.base, w - _product(a, b, layer.scale))
  else:
    layer.base, a, b = _loftq(layer, LoftQ() if init == "loftq" else init)
    a, b = a.astype(param_dtype), b.astype(param_dtype)
  layer.start_a, layer.start_b = LoRAStart(jnp.copy(a)), LoRAStart(jnp.copy(b))
  return {"lora_a": a, "lora_b": b}


def _product(a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
  product = matrix(a, b)
  return spread(scale, product.ndim) * product


def _svd(w: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
  """A and B whose scaled product is the best approximation of (..., out, in) of that rank."""
  rank = layer.rank
  u, s, v = over_stack(
    lambda one: jnp.linalg.svd(one, full_matrices=False), w.ndim - 2, jax.lax.map
  )(w)
  root = jnp.sqrt(s[..., :rank])
  scale = spread(layer.scale, root.ndim)
  root = root / jnp.sqrt(jnp.where(scale > 0, scale, 1.0))
  a = v[..., :rank, :].swapaxes(-1, -2) * root[..., None, :]
  b = u[..., :rank].swapaxes(-1, -2) * root[..., :, None]
  return masked(a, -1, layer.ranks), masked(b, -2, layer.ranks)


def _loftq(layer: Any, init: LoftQ) -> Any:
  w = matrix_of(layer.base)
  new = quantized(layer.base, init.codebook, init.block_size, init.double_quantize)
  a, b = _svd(w - new.dequantize(), layer)
  for _ in range(init.iterations - 1):
    new = new.requantized(w - _product(a, b, layer.scale))
    a, b = _svd(w - new.dequantize(), layer)
  return new, a, b
