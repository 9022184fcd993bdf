"""LoRA+: a learning rate of its own for B."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax


def scale_lora_b(ratio: float = 16.0) -> optax.GradientTransformation:
  """Multiplies the updates of every `lora_b` by `ratio`: LoRA+.

  Put it last, after the learning rate: ``optax.chain(lowmem.adamw(1e-4), nn.scale_lora_b(16.0))``
  trains A at 1e-4 and B at 1.6e-3. Decoupled weight decay is part of an update of `adamw`, so
  that of B is scaled too, as it is by a parameter group of PyTorch with its own learning rate.

  Args:
    ratio: the learning rate of B over that of A.

  Returns:
    A stateless `optax.GradientTransformation` over trees with leaves called `lora_b`, such as
    ``nnx.state(model, nnx.LoRAParam)``; other leaves pass as they are.

  Raises:
    ValueError: `ratio` is not positive; or, in `init`, the tree has no `lora_b`.

  >>> import jax.numpy as jnp, optax
  >>> from optax_lowmem import nn
  >>> tx = optax.chain(optax.sgd(0.5), nn.scale_lora_b(16.0))
  >>> params = {"q_proj": {"lora_a": jnp.ones(2), "lora_b": jnp.ones(2)}}
  >>> updates, _ = tx.update(params, tx.init(params))
  >>> [float(updates["q_proj"][name][0]) for name in ("lora_a", "lora_b")]
  [-0.5, -8.0]

  References:
    Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, 2024, arXiv:2402.12354.
  """
  if not (math.isfinite(ratio) and ratio > 0):
    raise ValueError(f"`ratio` must be a positive number, got {ratio!r}. 16 is usual.")

  def init(params: Any) -> optax.EmptyState:
    if not any(_is_b(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]):
      raise ValueError("`scale_lora_b` found no leaf called `lora_b` among the parameters.")
    return optax.EmptyState()

  def update(updates: Any, state: Any, params: Any = None):
    del params
    scaled = jax.tree_util.tree_map_with_path(
      lambda path, u: u * ratio if _is_b(path) else u, updates
    )
    return scaled, state

  return optax.GradientTransformation(init, update)


def _is_b(path: Any) -> bool:
  return any(getattr(key, "key", getattr(key, "name", None)) == "lora_b" for key in path)
