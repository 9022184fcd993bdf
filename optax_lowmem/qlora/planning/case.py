"""A model and the settings of a run on it, and what they take."""

from __future__ import annotations

import dataclasses
from typing import Any

from optax_lowmem._plan.memory_plan import MemoryPlan, Part
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.planning.estimate import temporaries
from optax_lowmem.qlora.planning.steps import Step, step_of
from optax_lowmem.qlora.run.settings import Settings, default_of, flag_of


@dataclasses.dataclass(frozen=True)
class Case:
  """What is planned for.

  Attributes:
    model: its name, or where it is.
    config: its configuration.
    settings: of the run.
    full: whether all parameters are trained, in the dtype of the model, or adapters.
    devices: over how many a batch's rows are spread.
  """

  model: str
  config: LlamaConfig
  settings: Settings
  full: bool = False
  devices: int = 1

  def but(self, *, full: bool | None = None, devices: int | None = None, **settings: Any) -> Case:
    """The same with other settings."""
    return Case(
      self.model,
      self.config,
      dataclasses.replace(self.settings, **settings),
      self.full if full is None else full,
      self.devices if devices is None else devices,
    )

  def step(self) -> Step:
    """The training step, as shapes."""
    return step_of(self.config, self.settings, full=self.full, devices=self.devices)

  def plan(self, card: str | None = None) -> MemoryPlan:
    """What it takes: by the compiler of a card, or with an estimate of the temporaries."""
    step = self.step()
    if card is not None:
      return step.compiled(card)
    known = step.shapes()
    rest = temporaries(self.config, self.settings, known.of("gradients"), self.full, self.devices)
    parts = (*known.parts, Part("activations, other temporaries", "temporaries", rest))
    return dataclasses.replace(known, parts=parts, method="estimate")

  def flags(self, before: Case | None = None) -> str:
    """The settings that are not those of another case, or not the defaults, as flags."""
    said = []
    if self.full != (before is not None and before.full):
      said.append("--full" if self.full else "--qlora")
    if self.devices != (before.devices if before else 1):
      said.append(f"--mesh {self.devices}")
    for each in dataclasses.fields(Settings):
      value = getattr(self.settings, each.name)
      usual = "bfloat16" if each.name == "dtype" else default_of(each)  # as on a card
      usual = getattr(before.settings, each.name) if before else usual
      if value == usual or each.name in ("model", "config"):
        continue
      flag = flag_of(each.name)
      if isinstance(value, bool):
        said.append(flag if value else f"--no-{flag[2:]}")
      elif isinstance(value, dict):
        said.append(f"{flag} {','.join(f'{k}={v}' for k, v in value.items())}")
      else:
        said.append(f"{flag} {','.join(value) if isinstance(value, list) else value}")
    return " ".join(said)
