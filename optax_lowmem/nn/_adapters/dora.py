"""DoRA: LoRA, with the magnitude of each output's weights learned apart."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._linear.packed_product import wait_for
from optax_lowmem._linear.packed_weight import dequantize_stack
from optax_lowmem._variants.variant import Arrays, Part, Variant
from optax_lowmem.nn._adapters.lora import LoRA
from optax_lowmem.nn._layers.base_layer import (
  contraction_at,
  contraction_of,
  dense_variable,
  matrix_of,
  matrix_shape,
  output_bias,
)


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
  r"""Weight-decomposed low-rank adaptation.

  .. math:: y = \frac{m}{\|W + s (AB)^T\|} \left(W x + s\,B^T A^T x\right) + b

  No gradient goes through the norm. It has no `lora_bias`, as in PEFT.

  References:
    Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024, arXiv:2402.09353.
  """

  normed = True
  lora_bias: bool = dataclasses.field(default=False, init=False)

  def parts(self, embedding: bool) -> tuple[Part, ...]:
    end = "lora_magnitude_vector"
    return (*super().parts(embedding), Part("magnitude", ("out",), end, older=f"{end}.weight"))

  def config(self) -> dict[str, Any]:
    return {"use_dora": True}

  @classmethod
  def of(cls, config: Mapping[str, Any]) -> Variant | None:
    return cls() if config.get("peft_type") == cls.peft_type and config.get("use_dora") else None

  def start(
    self, layer: Any, shapes: Mapping[str, Any], init: Any, dtype: Any, rngs: Any
  ) -> Arrays:
    parts = super().start(layer, shapes, init, dtype, rngs)
    scaled = layer.scaled({name: value.astype(dtype) for name, value in parts.items()}, jnp.float32)
    return parts | {"magnitude": weight_norm(layer.base, scaled)}

  def apply(self, layer: Any, x: Any, y: Any, added: Any, dropped: Any, sharding: Any) -> jax.Array:
    norm = weight_norm(layer.base, layer.scaled(layer.values(), jnp.float32), x)
    shape = contraction_at(layer.base, x)
    factor = shape.spread(layer.factor(norm).astype(y.dtype), x.ndim)
    bias = output_bias(layer.base, y, x)
    if dropped is None:
      y = factor * ((y if bias is None else y - bias) + added)
      return y if bias is None else y + bias
    # As PEFT: what the magnitude changes of the base's output is dropped too.
    kept = layer.base(dropped, **sharding)
    kept = kept if bias is None else kept - bias
    return y + (factor - 1) * kept + factor * added

  def factor(self, parts: Arrays, norm: Any) -> Any:
    xp, some = norm.__array_namespace__(), norm > 0
    return xp.where(some, parts["magnitude"] / xp.where(some, norm, 1.0), 0.0).astype("float32")


def weight_norm(base: Any, parts: Arrays, x: jax.Array | None = None) -> jax.Array:
  r"""The norm of each row of W + s (A B)^T, of which no gradient is taken.

  Expanded, so that no product A B of a layer's size is made: :math:`\|w\|^2 + 2 s\,b \cdot
  A^T w + s^2 b \cdot (A^T A) b`.

  Args:
    base: the layer that holds W.
    parts: A and s B, in float32.
    x: the layer's input, before which no packed weight is decoded: otherwise all layers' are, at
      once, and kept (12 dense weights for 12 unrolled layers; tied to the input, 1.5).
  """
  packed = dense_variable(base) is None
  if not packed:
    w = _as_stored(base)
  elif x is None:
    w = base.dequantize()
  else:
    w = dequantize_stack(wait_for(x, base.weight.get_value()))
  w, a, b = jax.lax.stop_gradient((w, parts["lora_a"], parts["lora_b"]))
  dot = functools.partial(jnp.matmul, precision="highest")
  a_t = a.swapaxes(-1, -2)
  if packed:
    squares, product = (w * w).sum(-1), dot(w, a).swapaxes(-1, -2)
  else:
    squares, product = (w * w).sum(-2), dot(a_t, w)
  squared = squares + ((2 * product + dot(dot(a_t, a), b)) * b).sum(-2)
  return jnp.sqrt(jnp.maximum(squared, 0.0))


def _as_stored(base: Any) -> jax.Array:
  """The dense weight (..., in, out) in float32, of most layers without moving an element.

  A transposed copy of each weight of a model would be made at once, and all of them kept.
  """
  contraction = contraction_of(base)
  if contraction.rhs != "".join(contraction.groups()):
    return matrix_of(base).swapaxes(-1, -2)
  *lead, out, inputs = matrix_shape(base)
  return dense_variable(base)[...].astype(jnp.float32).reshape(*lead, inputs, out)
