"""Which layer is the output head."""

from __future__ import annotations

from collections.abc import Sequence

from flax import nnx

from optax_lowmem._linear.head_names import HEADS
from optax_lowmem.nn._layers.base_layer import is_linear, matrix_shape
from optax_lowmem.nn._model.places import Place, base_of


def output_heads(everything: Sequence[Place]) -> list[Place]:
  """The output head: what carries the name of one, or else has the sizes of one.

  Those of a head has the only layer with as many outputs as an embedding has rows.
  """
  layers = [p for p in everything if is_linear(base_of(p.module))]
  heads = [p for p in layers if HEADS.fullmatch(p.path)]
  if heads:
    return heads
  rows = {p.module.num_embeddings for p in everything if isinstance(p.module, nnx.Embed)}
  heads = [p for p in layers if matrix_shape(base_of(p.module))[-2] in rows]
  return heads if len({id(base_of(p.module)) for p in heads}) == 1 else []
