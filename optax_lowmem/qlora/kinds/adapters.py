"""Adapters on a packed base, which PEFT loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optax
from flax import nnx

from optax_lowmem import nn as lowmem_nn
from optax_lowmem.qlora.kinds.kind import Kind, Source
from optax_lowmem.qlora.loading.checkpoint import Checkpoint
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.models.neftune import without_noise
from optax_lowmem.qlora.run.called import called
from optax_lowmem.qlora.run.checks import check_patterns, check_rank
from optax_lowmem.qlora.run.recipe import abstract_model, loaded_model, optimizer, trained_model
from optax_lowmem.qlora.run.settings import Settings
from optax_lowmem.qlora.training.devices import Devices
from optax_lowmem.qlora.training.report import Part, byte_parts
from optax_lowmem.qlora.training.step import Method, ordinary


class Adapters(Kind):
  """Low-rank corrections of a base that stays as it is."""

  noun = "adapter"
  title = "Adapters"
  variables = nnx.LoRAParam
  whole = False
  usual = "16-bit base,\n32-bit Adam"

  def check(self, s: Settings, base: Checkpoint) -> None:
    check_rank(s, base.config)
    check_patterns(s, base.config)

  def abstract(self, config: LlamaConfig, s: Settings) -> Any:
    return abstract_model(config, s)

  def load(self, path: Path, s: Settings) -> Any:
    return loaded_model(path, s)

  def optimizer(self, s: Settings) -> tuple[optax.GradientTransformation, optax.Schedule]:
    return optimizer(s)

  def method(
    self, s: Settings, graph: Any, tx: optax.GradientTransformation, mesh: Devices = None
  ) -> Method:
    return ordinary(graph, tx, self.spread(s, mesh))

  def save(self, model: Any, folder: Path, source: Source) -> None:
    lowmem_nn.save_peft(without_noise(model), folder, base_model=source.name)

  def use(self, path: Path, s: Settings, saved: Path) -> Any:
    return trained_model(path, s, saved)

  def parts(self, frozen: Any, trained: Any, opt_state: Any, s: Settings) -> list[Part]:
    return byte_parts(frozen, trained, opt_state, s.optim, s.quantize)

  def left(self, out: Path, best: str) -> Sequence[str]:
    return (
      f"The adapter, in PEFT's format: {out / 'adapter'}. The loss curve: {out / 'loss.png'}.",
      f"Talk to it: {called('chat')} {out}{best}",
      f"A model without adapters: {called('merge')} {out} --out {out}-merged{best}",
    )
