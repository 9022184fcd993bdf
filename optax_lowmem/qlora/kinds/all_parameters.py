"""All parameters, in float32 or in bfloat16 with what that lacks kept in the state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optax_lowmem as lowmem
from optax_lowmem.qlora.kinds.kind import Kind, Source
from optax_lowmem.qlora.kinds.model_folder import check_writable, save_model
from optax_lowmem.qlora.loading.checkpoint import Checkpoint
from optax_lowmem.qlora.loading.llama import abstract_llama, load_llama
from optax_lowmem.qlora.models.attention import AttentionKind
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.models.neftune import with_noise, without_noise
from optax_lowmem.qlora.run.called import called
from optax_lowmem.qlora.run.recipe import clipping, named_rule
from optax_lowmem.qlora.run.settings import Settings
from optax_lowmem.qlora.training.devices import Devices
from optax_lowmem.qlora.training.report import Part, count, nbytes
from optax_lowmem.qlora.training.step import Method, ordinary
from optax_lowmem.qlora.training.within_backward import within_backward


class AllParameters(Kind):
  """The whole model; a run leaves another one like its base."""

  noun = "model"
  title = "Parameters"
  variables = nnx.Param
  whole = True
  usual = "float32 weights,\n32-bit Adam"

  def check(self, s: Settings, base: Checkpoint) -> None:
    check_writable(s.model, base)

  def abstract(self, config: LlamaConfig, s: Settings) -> Any:
    base = abstract_llama(config, None, jnp.dtype(s.dtype), cast(AttentionKind, s.attention))
    return nnx.eval_shape(partial(_noisy, s=s), base)

  def load(self, path: Path, s: Settings) -> Any:
    attention = cast(AttentionKind, s.attention)
    return _noisy(load_llama(path, dtype=jnp.dtype(s.dtype), attention=attention), s)

  def optimizer(self, s: Settings) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The named rule, with what bfloat16 weights lack of their masters around it.

    Of a paged rule the masters are paged too.
    """
    rule, schedule = named_rule(s, s.optim.removeprefix("paged_"))
    if s.dtype == "bfloat16" and s.masters == "stochastic":
      rule = lowmem.stochastic_rounding(rule, s.seed)
    elif s.dtype == "bfloat16" and s.masters != "none":
      rule = lowmem.master_weights(rule, 16 if s.masters == "16" else 8)
    if s.optim.startswith("paged_"):
      rule = lowmem.offloaded(rule)
    return rule if s.update_in_backward else optax.chain(clipping(s), rule), schedule

  def method(
    self, s: Settings, graph: Any, tx: optax.GradientTransformation, mesh: Devices = None
  ) -> Method:
    if s.update_in_backward:
      clip_norm = s.max_grad_norm or None
      return within_backward(graph, tx, clip_norm=clip_norm, spread=self.spread(s, mesh))
    return ordinary(graph, tx, self.spread(s, mesh))

  def save(self, model: Any, folder: Path, source: Source) -> None:
    save_model(without_noise(model), folder, source)

  def use(self, path: Path, s: Settings, saved: Path) -> Any:
    return load_llama(saved, dtype=jnp.dtype(s.dtype))

  def parts(self, frozen: Any, trained: Any, opt_state: Any, s: Settings) -> list[Part]:
    wide = jax.eval_shape(optax.scale_by_adam(mu_dtype=jnp.float32).init, trained)
    state = f"optimizer state ({s.optim}{_masters(s)})"
    return [
      Part("weights", count(trained), nbytes(trained), 4 * count(trained)),
      Part(state, 0, nbytes(opt_state), nbytes(wide)),
    ]

  def notes(self, s: Settings) -> Sequence[str]:
    if not (s.update_in_backward and s.max_grad_norm):
      return ()
    return (
      f"--max-grad-norm {s.max_grad_norm:g} needs the norm of all gradients before the first "
      "update: a second backward pass in each step. --max-grad-norm 0 does without.",
    )

  def left(self, out: Path, best: str) -> Sequence[str]:
    return (
      f"The model: {out / 'model'}. The loss curve: {out / 'loss.png'}.",
      f"Talk to it: {called('chat')} {out}{best}",
    )


def _noisy(model: Any, s: Settings) -> Any:
  if s.neftune_alpha:
    return with_noise(model, s.neftune_alpha, nnx.Rngs(noise=s.seed + 2))
  return model


def _masters(s: Settings) -> str:
  if s.dtype == "float32" or s.masters == "none":
    return ""
  return ", rounded at random" if s.masters == "stochastic" else f", masters of {s.masters} bits"
