"""The families of models that can be loaded, one small file each.

A family says what Hugging Face takes where its ``config.json`` lacks a key, and which options of
`LlamaConfig` those keys stand for; which layers and tensors there are follows from the options. To
add one, write a file with a `Family` and name it in `FAMILIES`. What a model does that no option
says is a new field of `LlamaConfig`, and its place in ``llama_model.py`` or ``attention.py``.
"""

from optax_lowmem.qlora.families.family import Family as Family
from optax_lowmem.qlora.families.gemma import GEMMA, GEMMA2, GEMMA3
from optax_lowmem.qlora.families.granite import GRANITE
from optax_lowmem.qlora.families.llama import LLAMA, MISTRAL
from optax_lowmem.qlora.families.olmo import OLMO2
from optax_lowmem.qlora.families.phi import PHI3
from optax_lowmem.qlora.families.qwen import QWEN2, QWEN3
from optax_lowmem.qlora.families.smollm import SMOLLM3

FAMILIES: dict[str, Family] = {
  family.model_type: family
  for family in (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    PHI3,
    SMOLLM3,
    OLMO2,
    GRANITE,
  )
}
