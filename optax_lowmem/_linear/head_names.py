"""What models call their embedding and their output head.

There is no one list. A name that is looked up must not be guessed too widely: what it stands for
differs from place to place, and so does what goes wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet

# What `exclude` calls the output head, whatever its own name is: no module's, for it has a blank.
HEAD = "output head"
# Modules that are one by their name, of JAX's models too. ("output" may be any layer's.)
HEADS = re.compile(r"(.*\.)?(lm_head|embed_out|unembed(ding)?|output_head|logits?(_dense|_proj)?)")
# Tensors in files of Hugging Face, of which one stands for both where they are tied.
TABLE_TENSORS = re.compile(
  r"(.*\.)?(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings)\.weight"
)
HEAD_TENSORS = re.compile(r"(.*\.)?(lm_head|embed_out|output)\.weight")
# PEFT's own: it saves these base weights beside their adapters, and one array under both names
# where they are tied.
EMBEDDINGS = ("embed_tokens", "lm_head")
TABLE, HEAD_WEIGHT = (f"{name}.weight" for name in EMBEDDINGS)


def output_heads(outputs: Mapping[str, int], rows: AbstractSet[int]) -> list[str]:
  """The output head: what carries the name of one, or else has the sizes of one.

  Those of a head has the only layer with as many outputs as an embedding has rows.

  Args:
    outputs: of linear layers, by path.
    rows: of embeddings.
  """
  heads = [path for path in outputs if HEADS.fullmatch(path)]
  if heads:
    return heads
  heads = [path for path, out in outputs.items() if out in rows]
  return heads if len(heads) == 1 else []
