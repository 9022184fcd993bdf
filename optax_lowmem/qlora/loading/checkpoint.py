"""A model on disk: a configuration, the shape of every tensor, and a function that reads one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from optax_lowmem.qlora.models.llama_config import LlamaConfig, Shape


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A model on disk.

  Invariants: every name of `expected_shapes(config)` is in `shapes`, with that shape, and
  ``read(name)`` returns a float array of shape ``shapes[name]``. `model_type` is one of `FAMILIES`.
  """

  model_type: str
  config: LlamaConfig
  shapes: dict[str, Shape]
  read: Callable[[str], np.ndarray]
