"""Parameters of Linen models, quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import traverse_util

from optax_lowmem._linear.head_names import HEAD
from optax_lowmem._linear.own_product import sets
from optax_lowmem._linear.packed_weight import (
  check_codebook,
  check_weight,
  quantize_like,
  quantize_stack,
)
from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem.linen._layers import Layers, copied, weight_at
from optax_lowmem.linen._nf4_dense import check_unboxed
from optax_lowmem.linen._targets import choose, excluded


def quantize_params(
  params: Mapping[str, Any],
  layers: Layers,
  *,
  targets: str | Sequence[str] | None = None,
  exclude: str | Sequence[str] | None = HEAD,
  codebook: Literal["nf4", "fp4", "int8"] = "nf4",
  block_size: int | None = 64,
  double_quantize: bool | None = None,
) -> dict[str, Any]:
  """Packs the kernels of linear layers; everything else stays as it is.

  Each kernel becomes a `QuantizedArray` of its matrix (out, in), with the stack's leading axes:
  inputs and outputs are the products of the axes that are summed over and of the others, and
  each layer of a stack is quantized on its own. Call the model with `apply`, or through `LoRA`.

  Layers that are packed already are left as they are. The others are packed one after another, but
  all of `params` lives as long as the caller holds it: ``params = quantize_params(params, …)``
  frees it.

  Args:
    params: the parameters of the model.
    layers: of `find_layers`.
    targets: a regular expression or a list of them, each matching a layer's whole path, joined
      with `.` or `/`, or its last part. None means every linear layer.
    exclude: the same, for layers to leave alone. None excludes nothing. `"output head"`, which is
      the default and may stand in a list, is the layer that has the name of one (`lm_head`), or,
      where none has, the only one with as many outputs as an embedding has rows.
    codebook: `"nf4"`, `"fp4"` or `"int8"`.
    block_size: how many inputs share a scale; None is all inputs of an output.
    double_quantize: store the scales in 8 bits too; None does so for 4-bit codes.

  Returns:
    The parameters, as nested dicts.

  Raises:
    ValueError: nothing matches (the message lists the layers that could), or all is packed
      already; a layer multiplies in its own way (`dot_general`), or a kernel holds integers, NaN or
      Inf, or is in a box of partitioning names.

  >>> import jax, jax.numpy as jnp
  >>> from flax import linen as flax_linen
  >>> from optax_lowmem import linen
  >>> model, x = flax_linen.DenseGeneral((4, 16)), jnp.ones((3, 64))
  >>> variables = model.init(jax.random.key(0), x)
  >>> layers = linen.find_layers(model, variables, x)
  >>> packed = linen.quantize_params(variables["params"], layers)
  >>> packed["kernel"].shape, packed["bias"].shape
  ((64, 64), (4, 16))
  """
  check_codebook(codebook)
  kept = excluded(exclude, layers)
  params = copied(params)
  possible = [layer for layer in layers.layers if not layer.embedding and layer.name not in kept]
  packed = [
    layer
    for layer in possible
    if isinstance(weight_at(params, layer.path, "kernel"), QuantizedArray)
  ]
  chosen = choose("targets", ".*" if targets is None else targets, layers, possible)
  if chosen and all(layer in packed for layer in chosen):
    raise ValueError(f"`{chosen[0].name}` is packed already, and so is every layer to be packed.")
  chosen = [layer for layer in chosen if layer not in packed]
  for layer in chosen:
    kernel = weight_at(params, layer.path, "kernel")
    if kernel is None:
      raise ValueError(f"`params` has no `{layer.name}.kernel`. Pass the model's own parameters.")
    if layer.own:
      raise ValueError(f"{sets(f'`{layer.name}`', layer.own)} Name it in `exclude`.")
    if kernel.shape != (*layer.stack, *layer.contraction.kernel_shape):
      raise ValueError(
        f"`{layer.name}.kernel` has shape {kernel.shape}, and `layers` was found with "
        f"{(*layer.stack, *layer.contraction.kernel_shape)}. Call `find_layers` again."
      )
    check_weight(f"{layer.name}.kernel", kernel)
    check_unboxed(f"{layer.name}.kernel", holder(params, layer.path)["kernel"])
  for layer in chosen:
    at = holder(params, layer.path)
    matrix = layer.contraction.to_matrix(jnp.asarray(at["kernel"]))
    at["kernel"] = quantize_stack(matrix, codebook, block_size, double_quantize)
  return params


def holder(params: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
  """The dict of a layer's own parameters."""
  for key in path:
    params = params[key]
  return params


def pack(params: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
  """Packs the parameters of a model with Dense layers for one with `NF4Dense` in their places.

  Args:
    params: the parameters of the model with Dense layers.
    like: the collection `"quantized"` of the other, arrays or shapes, which says what to pack and
      how: ``jax.eval_shape(model.init, key, x)["quantized"]``.

  Returns:
    `{"params": …, "quantized": …}`.

  Raises:
    ValueError: `params` lacks a kernel of `like`, or has it in another shape or with NaN or Inf.

  >>> import jax, jax.numpy as jnp
  >>> from flax import linen as flax_linen
  >>> from optax_lowmem import linen
  >>> x, key = jnp.ones((3, 64)), jax.random.key(0)
  >>> params = flax_linen.Dense(32).init(key, x)["params"]
  >>> model = linen.NF4Dense(32)
  >>> variables = linen.pack(params, jax.eval_shape(model.init, key, x)["quantized"])
  >>> {name: sorted(tree) for name, tree in variables.items()}
  {'params': ['bias'], 'quantized': ['kernel']}
  >>> model.apply(variables, x).shape
  (3, 32)
  """
  params = copied(params)
  quantized: dict[tuple[str, ...], Any] = {}
  for path, q in traverse_util.flatten_dict(copied(like)).items():
    name = ".".join(path)
    if not isinstance(q, QuantizedArray):
      raise ValueError(f"`like` must hold QuantizedArrays, got {type(q).__name__} at `{name}`.")
    kernel = weight_at(params, path[:-1], path[-1])
    shape = (*q.shape[:-2], q.shape[-1], q.shape[-2])
    if getattr(kernel, "shape", None) != shape or isinstance(kernel, QuantizedArray):
      raise ValueError(
        f"`params` must have `{name}` of shape {shape}, a float kernel, got "
        f"{'none' if kernel is None else f'{type(kernel).__name__} {kernel.shape}'}."
      )
    check_unboxed(name, holder(params, path[:-1])[path[-1]])
    kernel = jnp.asarray(kernel)
    check_weight(name, kernel)
    quantized[path] = quantize_like(kernel.swapaxes(-1, -2), q)
    del holder(params, path[:-1])[path[-1]]
  return {"params": params, "quantized": traverse_util.unflatten_dict(quantized)}
