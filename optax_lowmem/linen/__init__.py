"""4-bit weights and LoRA adapters for Flax Linen.

For a model that was not edited:

>>> import jax, jax.numpy as jnp
>>> from flax import linen as flax_linen
>>> from optax_lowmem import linen
>>> model, x = flax_linen.MultiHeadDotProductAttention(num_heads=4), jnp.ones((2, 8, 64))
>>> params = model.init(jax.random.key(0), x)["params"]
>>> layers = linen.find_layers(model, {"params": params}, x)
>>> params = linen.quantize_params(params, layers)
>>> lora = linen.LoRA(model, layers, rank=8, alpha=16, targets="query|value")
>>> adapters = lora.init(jax.random.key(1))
>>> lora.apply({"params": params, "lora": adapters}, x).shape
(2, 8, 64)

`NF4Dense` and `LoRADense` are layers to write a model with.
"""

from optax_lowmem._arguments import flax_extra as flax_extra
from optax_lowmem._state.pickled_names import name_after as _name_after
from optax_lowmem.linen._intercept import apply as apply
from optax_lowmem.linen._intercept import intercept as intercept
from optax_lowmem.linen._layers import Layer as Layer
from optax_lowmem.linen._layers import Layers as Layers
from optax_lowmem.linen._layers import find_layers as find_layers
from optax_lowmem.linen._lora import LoRA as LoRA
from optax_lowmem.linen._lora_dense import LoRADense as LoRADense
from optax_lowmem.linen._nf4_dense import NF4Dense as NF4Dense
from optax_lowmem.linen._peft import load_peft as load_peft
from optax_lowmem.linen._peft import save_peft as save_peft
from optax_lowmem.linen._quantize import pack as pack
from optax_lowmem.linen._quantize import quantize_params as quantize_params

_name_after(__name__, Layer, Layers, LoRA, LoRADense, NF4Dense)

__all__ = [
  "Layer",
  "Layers",
  "LoRA",
  "LoRADense",
  "NF4Dense",
  "apply",
  "find_layers",
  "intercept",
  "load_peft",
  "pack",
  "quantize_params",
  "save_peft",
]
