"""Replace the linear layers of a model, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
from flax import nnx

from optax_lowmem._arguments.argument_names import knowing
from optax_lowmem._linear.head_names import HEAD
from optax_lowmem._linear.names import excluded
from optax_lowmem._linear.packed_weight import check_codebook
from optax_lowmem._variants.lora_scale import plain_numbers
from optax_lowmem._variants.variant import Variant, check_settings
from optax_lowmem.nn._adapters.adapter import check_lora, check_param_dtype
from optax_lowmem.nn._adapters.lora_embed import LoRAEmbed
from optax_lowmem.nn._adapters.lora_init import Init, check_init
from optax_lowmem.nn._adapters.lora_linear import LoRALinear
from optax_lowmem.nn._adapters.variants import chosen
from optax_lowmem.nn._layers.base_layer import check_dense, dense_variable, is_linear
from optax_lowmem.nn._layers.quantize_layer import check_product, quantized
from optax_lowmem.nn._model.checks import check_model
from optax_lowmem.nn._model.found_layers import Layers, shown
from optax_lowmem.nn._model.model_tree import ModelTree
from optax_lowmem.nn._model.skipped import sentence, skipped, warn
from optax_lowmem.nn._model.targets import Target, find_targets
from optax_lowmem.nn._model.trainable import (
  check_bias,
  check_named,
  check_saved,
  find_saved,
  train_biases,
  train_modules,
)
from optax_lowmem.nn._proofs.flax_layers import is_embed

M = TypeVar("M", bound=nnx.Module)


@knowing(
  {
    "bits": 'Say codebook="nf4", of 4 bits, or codebook="int8".',
    "quant_type": "codebook",
    "compress_statistics": "double_quantize",
    "blocksize": "block_size",
    "target_modules": "targets",
  }
)
def quantize_model(
  model: M,
  *,
  targets: str | Sequence[str] | None = None,
  exclude: str | Sequence[str] | None = HEAD,
  codebook: Literal["nf4", "fp4", "int8"] = "nf4",
  block_size: int | None = 64,
  double_quantize: bool | None = None,
  layers: Layers | None = None,
) -> M:
  """Turns linear layers into quantized ones, in place.

  `nnx.Linear` becomes `NF4Linear`, or `QuantizedLinear` with another codebook;
  `nnx.LinearGeneral` and `nnx.Einsum` become `QuantizedEinsum`. A module of any other class that
  is proved to multiply its input by an `nnx.Param` of its own, and to do no more than to add a
  bias, becomes a `QuantizedModule`.

  Layers are turned one at a time, so no more than one dense weight is held beside the model.
  The base of a `LoRALinear` is quantized under it. Layers that are quantized already, and modules
  that compute something else with their `nnx.Param` (experts in one array, say), are left as they
  are; if `targets` is None, a warning names the latter. Everything is checked before the first
  layer is changed.

  Args:
    model: any NNX module that holds the layers: as attributes, in `nnx.List`, `nnx.Dict`, lists
      or dicts, stacked along leading axes or not.
    targets: a regular expression or a list of them, each matching a module's whole dotted path
      or the last part of it. None means every linear layer.
    exclude: the same, for layers to leave alone. None excludes nothing. `"output head"`, which is
      the default and may stand in a list, is the layer that has the name of one (`lm_head`), or,
      where none has, the only one with as many outputs as an embedding has rows.
    codebook: `"nf4"`, `"fp4"` or `"int8"`.
    block_size: how many inputs share a scale; None is all inputs of an output.
    double_quantize: store the scales in 8 bits too; None does so for 4-bit codes.
    layers: of `find_layers`, by which modules that are not of flax are known to be linear layers.
      None makes up inputs for them.

  Returns:
    `model`.

  Raises:
    ValueError: nothing matches (the message lists the modules that could), or a weight holds
      integers, NaN or Inf, or a layer uses its own `dot_general` or `promote_dtype`.

  >>> from flax import nnx
  >>> from optax_lowmem import nn
  >>> mlp = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
  >>> type(nn.quantize_model(mlp).layers[0]).__name__
  'NF4Linear'
  """
  check_codebook(codebook)
  check_model(model)
  with shown(model, layers):
    tree = ModelTree(model)
    skip = excluded(exclude, tree.paths, tree.heads)
    possible = [
      place
      for place in tree.places
      if not place.norm
      and is_linear(place.module)
      and dense_variable(place.module) is not None
      and place.path not in skip
    ]
    if targets is None and not possible:
      raise ValueError(
        "`model` has no linear layer to quantize but those that `exclude` names."
        + sentence(skipped(tree))
      )
    chosen = tree.choose("targets", ".*" if targets is None else targets, possible)
    for place in chosen:
      check_dense(place.path, place.module)
      check_product(f"`{place.path}`", place.module)
    if targets is None:
      warn("quantize_model", "left weights as they are", tree)
    while chosen:
      place = chosen.pop(0)
      place.replace(quantized(place.module, codebook, block_size, double_quantize))
  return model


@knowing(
  {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "init_lora_weights": "init",
  }
)
def add_lora(
  model: M,
  rank: int,
  alpha: float,
  targets: str | Sequence[str] = "all-linear",
  *,
  dropout: float = 0.0,
  use_rslora: bool = False,
  use_dora: bool = False,
  lora_bias: bool = False,
  variant: Variant | None = None,
  rank_pattern: Mapping[str, int] | None = None,
  alpha_pattern: Mapping[str, float] | None = None,
  modules_to_save: str | Sequence[str] | None = None,
  bias: Literal["none", "all", "lora_only"] = "none",
  init: Init = "default",
  param_dtype: Any = jnp.float32,
  stack: str = "layers",
  layers: Layers | None = None,
  rngs: nnx.Rngs,
) -> M:
  r"""Puts an adapter around the layers that `targets` names, in place.

  Linear layers, quantized or not, get a `LoRALinear`, embeddings a `LoRAEmbed`. All that is to be
  trained is an `nnx.LoRAParam`, and nothing else is. A linear layer is one of flax's, or a module
  of any class that is proved to be one: see `QuantizedModule`. With `"all-linear"`, a warning names
  the weights that no linear layer was found for.

  In a stack of layers, the layers may differ in rank and alpha, and some may have no adapter:
  `targets` and the keys of the patterns match `model.layers.1.self_attn.q_proj` too, where the
  path of the stacked module is `model.layers.self_attn.q_proj`. The factors of a layer of lower
  rank are filled up with zeros, which stay zero in training.

  Args:
    model: any NNX module that holds the layers.
    rank: as in `LoRALinear`.
    alpha: as in `LoRALinear`.
    targets: `"all-linear"`, which is every linear layer but the output head, or a regular
      expression or a list of them, each matching a module's whole dotted path
      (`model.layers.self_attn.q_proj`) or the last part of it (`q_proj|v_proj`).
    dropout: as in `LoRALinear`; of linear layers only, as in PEFT.
    use_rslora: as in `LoRALinear`.
    use_dora: as in `LoRALinear`.
    lora_bias: as in `LoRALinear`.
    variant: as in `LoRALinear`.
    rank_pattern: ranks of some layers, by regular expressions that match the end of a name; the
      first that does counts, as in PEFT.
    alpha_pattern: the same for alpha.
    modules_to_save: a name or names of modules, or last parts of them, that are trained whole.
      They are left out of `targets`.
    bias: `"none"`; `"lora_only"` also trains the biases of adapted layers, `"all"` those of all.
      What is trained by it or by `modules_to_save` must have a name in PEFT's files.
    init: `"default"`, `"gaussian"`, `"pissa"`, `"loftq"` or a `LoftQ`, as in `LoRALinear`.
    param_dtype: as in `LoRALinear`; PEFT with `autocast_adapter_dtype=False` holds adapters in the
      dtype of their base. Modules and biases that are trained whole are held in it, or in their own
      if that is wider; their layers compute in what they did.
    stack: the part of a stacked module's path after which the layer number belongs.
    layers: as in `quantize_model`.
    rngs: as in `LoRALinear`.

  Returns:
    `model`.

  Raises:
    ValueError: nothing matches (the message lists the modules that could), a matching layer has
      an adapter already or holds integers, NaN or Inf, an argument is out of range, or `init` does
      not fit a layer. The model then is as it was.
    TypeError: `rngs` is not an `nnx.Rngs`, or `model` no module of NNX.

  >>> from flax import nnx
  >>> from optax_lowmem import nn
  >>> mlp = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
  >>> nn.add_lora(mlp, rank=2, alpha=4, targets="layer.0", rngs=nnx.Rngs(1))
  Traceback (most recent call last):
    ...
  ValueError: `targets` 'layer.0' matches no module that can be changed. Nearest: layers.0. ...
  """
  check_lora(rank, alpha, dropout, rngs)
  rank, alpha = plain_numbers(rank, alpha)
  check_init(init)
  check_param_dtype(param_dtype)
  check_bias(bias)
  check_model(model)
  variant = chosen(variant, use_dora, lora_bias)
  check_settings(variant, use_rslora, dropout)
  with shown(model, layers):
    tree = ModelTree(model, stack)
    saved = find_saved(tree, modules_to_save or ())
    check_saved(tree, saved)
    found = find_targets(tree, targets, rank, alpha, rank_pattern, alpha_pattern, tree.below(saved))
    for target in found:
      path, base = target.place.path, target.place.module
      _kind(base).check_base(path, base)
      check_lora(target.rank, target.alpha, dropout, rngs)
      variant.check(f"`{path}`", base, target.rank, init)
    check_named(tree, saved, [target.place for target in found], bias)
    if targets == "all-linear":
      warn("add_lora", "put no adapter on some weights", tree)
    while found:
      target = found.pop(0)
      target.place.replace(
        adapter(
          target,
          dropout=dropout,
          use_rslora=use_rslora,
          variant=variant,
          init=init,
          param_dtype=param_dtype,
          rngs=rngs,
        ),
      )
    train_modules(model, saved, param_dtype)
    train_biases(ModelTree(model), bias, param_dtype)
  return model


def _kind(base: Any) -> type[LoRAEmbed] | type[LoRALinear]:
  return LoRAEmbed if is_embed(base) else LoRALinear


def adapter(target: Target, *, dropout: float, **options: Any) -> Any:
  """An adapter for a layer; embeddings have no dropout, as in PEFT."""
  base = target.place.module
  options |= {} if is_embed(base) else {"dropout": dropout}
  return _kind(base)(base, target.rank, target.alpha, **options)
