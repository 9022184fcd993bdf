"""The families of models that can be loaded, one small file each.

A family says what Hugging Face takes where its ``config.json`` lacks a key, and which options of
`LlamaConfig` those keys stand for; which layers and tensors there are follows from the options. To
add one, write a file with a `Family` and name it in `FAMILIES`. What a model does that no option
says is a new field of `LlamaConfig`, and its place in ``llama_model.py`` or ``attention.py``.
"""

from families.family import Family as Family
from families.gemma import GEMMA2, GEMMA3
from families.granite import GRANITE
from families.llama import LLAMA, MISTRAL
from families.olmo import OLMO2
from families.phi import PHI3
from families.qwen import QWEN2, QWEN3
from families.smollm import SMOLLM3

FAMILIES: dict[str, Family] = {
  family.model_type: family
  for family in (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA2,
    GEMMA3,
    PHI3,
    SMOLLM3,
    OLMO2,
    GRANITE,
  )
}
