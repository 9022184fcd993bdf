"""What a step needs beside weights, gradients and state, estimated where nothing is compiled."""

from __future__ import annotations

import math
import re

import jax.numpy as jnp

from optax_lowmem.qlora.models.llama_config import LlamaConfig, linear_shapes
from optax_lowmem.qlora.run.settings import Settings

# Fitted by least squares to steps compiled for an H100 (jax 0.10.2): 13 of QLoRA, of 135 million to
# 405 billion parameters and of 512 to 16,384 tokens, whose temporaries it finds to 5 %.
_GRADIENTS = 0.03  # of adapters: more than the gradients themselves
_SAVED = 0.77  # of the inputs of all layers, which the backward pass starts from
_LAYER = 31.5  # of a layer's input: what one layer needs while it is computed once more
_UNPACKED = 0.49  # of a layer's matrices in 16 bits, if the base is packed
_LOGITS = 1.4  # of the float32 logits of 128 positions
# The same of training all parameters in the backward pass: 4 steps, of 0.6 to 7 billion parameters.
_TIED, _UNTIED = 1.35, 0.8  # of the table of embeddings, beside its gradient and the head's
# Rules that take norms hold float32 arrays of the largest parameter; others its new values.
_NORMS = re.compile(r"(paged_)?(came|lamb|lars)")


def temporaries(config: LlamaConfig, s: Settings, gradients: int, devices: int = 1) -> int:
  """Bytes of activations and other temporaries of a training step on each device.

  Args:
    config: of the model.
    s: the settings.
    gradients: bytes of those of one pass; neither they nor their sums are counted here.
    devices: over how many the rows are spread.
  """
  width, size = config.hidden_size, jnp.dtype(s.dtype).itemsize
  tokens = s.batch_size // devices * s.seq_len
  layer = tokens * width * size
  matrices = [math.prod(shape) for shape, _ in linear_shapes(config).values()]
  found = _SAVED * config.num_hidden_layers * layer + _LAYER * layer
  found += _LOGITS * 128 * config.vocab_size * 4
  if s.quantize != "none" and not s.full:
    found += _UNPACKED * sum(matrices) * size
  table = config.vocab_size * width
  if s.full and s.update_in_backward:  # sums of what both ends of the model give, as well
    beside = (_TIED if config.tie_word_embeddings else _UNTIED) * table * size
    return int(found + beside / (devices if s.fsdp else 1))
  found += (_GRADIENTS if not s.full else 0) * gradients
  if s.full and s.fsdp and devices > 1:  # the weights of the layer that is computed, of all devices
    found += sum(matrices) * size
  if s.full:  # the update comes after the backward pass, whose memory it takes over
    largest = max(*(n * config.num_hidden_layers for n in matrices), table)
    shard = devices if s.fsdp else 1
    quantized = re.search(r"_[48]bit$|^paged_", s.optim)
    each = 4 if _NORMS.match(s.optim) else size if quantized else 0
    found = max(found, each * largest // shard)
  return int(found)
