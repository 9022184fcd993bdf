"""4-bit linear layers and LoRA adapters for Flax NNX.

>>> import optax
>>> from flax import nnx as flax_nnx
>>> from optax_lowmem import nn
>>> rngs = flax_nnx.Rngs(0)
>>> layers = [flax_nnx.Linear(64, 32, rngs=rngs), flax_nnx.Linear(32, 4, rngs=rngs)]
>>> model = flax_nnx.Sequential(*layers)
>>> model = nn.quantize_model(model, targets=r"layers\\.0")
>>> model = nn.add_lora(model, rank=8, alpha=16, targets=r"layers\\.0", rngs=rngs)
>>> optimizer = flax_nnx.Optimizer(model, optax.adamw(1e-3), wrt=flax_nnx.LoRAParam)
>>> sorted(flax_nnx.state(model, flax_nnx.LoRAParam)["layers"][0])
['lora_a', 'lora_b']
"""

from optax_lowmem._arguments import flax_extra as flax_extra
from optax_lowmem._state.pickled_names import name_after as _name_after
from optax_lowmem._variants.variant import Part as Part
from optax_lowmem._variants.variant import Variant as Variant
from optax_lowmem.nn._adapters.adapter import LoRAScale as LoRAScale
from optax_lowmem.nn._adapters.lora_embed import LoRAEmbed as LoRAEmbed
from optax_lowmem.nn._adapters.lora_init import Init as Init
from optax_lowmem.nn._adapters.lora_init import LoftQ as LoftQ
from optax_lowmem.nn._adapters.lora_init import LoRAStart as LoRAStart
from optax_lowmem.nn._adapters.lora_linear import LoRALinear as LoRALinear
from optax_lowmem.nn._adapters.lora_plus import scale_lora_b as scale_lora_b
from optax_lowmem.nn._layers.nf4_linear import NF4Linear as NF4Linear
from optax_lowmem.nn._layers.packed_layer import QuantizedWeight as QuantizedWeight
from optax_lowmem.nn._layers.quantized_einsum import QuantizedEinsum as QuantizedEinsum
from optax_lowmem.nn._layers.quantized_linear import QuantizedLinear as QuantizedLinear
from optax_lowmem.nn._layers.quantized_module import QuantizedModule as QuantizedModule
from optax_lowmem.nn._merging.merge import merge_lora as merge_lora
from optax_lowmem.nn._merging.save_merged import merge_peft as merge_peft
from optax_lowmem.nn._merging.save_merged import save_merged as save_merged
from optax_lowmem.nn._model.found_layers import Layer as Layer
from optax_lowmem.nn._model.found_layers import Layers as Layers
from optax_lowmem.nn._model.found_layers import find_layers as find_layers
from optax_lowmem.nn._model.surgery import add_lora as add_lora
from optax_lowmem.nn._model.surgery import quantize_model as quantize_model
from optax_lowmem.nn._peft.load import load_peft as load_peft
from optax_lowmem.nn._peft.save import save_peft as save_peft

_name_after(
  __name__,
  Layer,
  Layers,
  LoRAEmbed,
  LoRALinear,
  LoRAScale,
  LoRAStart,
  LoftQ,
  NF4Linear,
  Part,
  QuantizedEinsum,
  QuantizedLinear,
  QuantizedModule,
  QuantizedWeight,
  Variant,
)

__all__ = [
  "Init",
  "LoRAEmbed",
  "LoRALinear",
  "LoRAScale",
  "LoRAStart",
  "Layer",
  "Layers",
  "LoftQ",
  "NF4Linear",
  "Part",
  "QuantizedEinsum",
  "QuantizedLinear",
  "QuantizedModule",
  "QuantizedWeight",
  "Variant",
  "add_lora",
  "find_layers",
  "load_peft",
  "merge_lora",
  "merge_peft",
  "quantize_model",
  "save_merged",
  "save_peft",
  "scale_lora_b",
]
