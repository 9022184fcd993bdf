"""What is trained, and by which rule: adapters, optimizer, learning rate."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx

import optax_lowmem as lowmem
from arguments import Settings
from llama import abstract_llama, load_llama
from llama_config import LlamaConfig
from neftune import with_noise
from optax_lowmem import nn as lowmem_nn


def learning_rate(s: Settings) -> Callable[[int], Any]:
  """Rises in the first steps, then stays, or falls to 0."""
  warmup = s.steps // 20 if s.warmup is None else s.warmup
  rest = max(1, s.steps - warmup)
  after = {
    "constant": optax.constant_schedule(s.lr),
    "linear": optax.linear_schedule(s.lr, 0.0, rest),
    "cosine": optax.cosine_decay_schedule(s.lr, rest),
  }[s.schedule]
  # The first step's rate is lr / (warmup + 1), not 0: a step at 0 would be wasted.
  rise = optax.linear_schedule(s.lr / (warmup + 1), s.lr, max(1, warmup))
  return optax.join_schedules([rise, after], [warmup])


def optimizer(s: Settings) -> tuple[optax.GradientTransformation, Callable[[int], Any]]:
  """Clipping, then the named optimizer, at a learning rate that rises and falls."""
  schedule = learning_rate(s)
  decay = {} if s.weight_decay is None else {"weight_decay": s.weight_decay}
  try:
    rule = lowmem.create(s.optim, schedule, **decay)
  except TypeError as error:
    raise ValueError(f"--weight-decay: {s.optim} has none ({error}).") from error
  clip = optax.clip_by_global_norm(s.max_grad_norm) if s.max_grad_norm else optax.identity()
  return optax.chain(clip, rule), schedule


def adapted(model: Any, s: Settings) -> Any:
  """The model with fresh adapters, which change nothing yet."""
  rngs = nnx.Rngs(params=s.seed, dropout=s.seed + 1)
  if s.neftune_alpha:
    model = with_noise(model, s.neftune_alpha, nnx.Rngs(noise=s.seed + 2))
  return lowmem_nn.add_lora(
    model, s.rank, s.alpha, s.targets, dropout=s.dropout, use_rslora=s.rslora, rngs=rngs
  )


def abstract_model(config: LlamaConfig, s: Settings) -> Any:
  """The adapted model's shapes, without its weights."""
  shapes = abstract_llama(config, quantized(s), jnp.dtype(s.dtype))
  return nnx.eval_shape(partial(adapted, s=s), shapes)


def loaded_model(path: Path, s: Settings) -> Any:
  """The adapted model."""
  return adapted(load_llama(path, quantized(s), dtype=jnp.dtype(s.dtype)), s)


def quantized(s: Settings) -> Any:
  """`load_llama`'s name for how the base is held."""
  return None if s.quantize == "none" else s.quantize
