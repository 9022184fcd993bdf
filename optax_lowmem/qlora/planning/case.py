"""A model and the settings of a run on it, and what they take."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from optax_lowmem._plan.compiler import missing
from optax_lowmem._plan.memory_plan import MemoryPlan, Part
from optax_lowmem._plan.parts import of_gradients
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.planning.estimate import temporaries
from optax_lowmem.qlora.planning.steps import Step, step_of
from optax_lowmem.qlora.run.settings import ONLY, Settings, flag_of, text_of, trained_by, usual_of


@dataclasses.dataclass(frozen=True)
class Case:
  """What is planned for.

  Attributes:
    model: its name, or where it is.
    config: its configuration.
    settings: of the run.
    devices: over how many a batch's rows are spread.
  """

  model: str
  config: LlamaConfig
  settings: Settings
  devices: int = 1

  @property
  def full(self) -> bool:
    """Whether all parameters are trained, or adapters."""
    return self.settings.full

  def but(self, *, devices: int | None = None, **settings: Any) -> Case:
    """The same with other settings; with another kind of training, its own defaults.

    A setting that is not named gives way where no run can have it beside those that are.
    """
    changed = dataclasses.replace(self.settings, **settings)
    for each in dataclasses.fields(Settings) if changed.full != self.full else ():
      if each.name not in settings and getattr(changed, each.name) == usual_of(each, self.full):
        setattr(changed, each.name, usual_of(each, changed.full))
    for name, value in _giving_way(changed).items():
      if name not in settings:
        setattr(changed, name, value)
    count = self.devices if devices is None else devices
    return Case(self.model, self.config, changed, count)

  def step(self) -> Step:
    """The training step, as shapes."""
    return step_of(self.config, self.settings, devices=self.devices)

  def plan(self, card: str | None = None) -> MemoryPlan:
    """What it takes: by the compiler of a card, or with an estimate of the temporaries.

    Where the card's compiler is not installed the estimate stands for it. It is nearer than what
    the CPU's compiler says, which widens bfloat16.
    """
    step, note = self.step(), ""
    if card is not None:
      if (lacks := missing(card)) is None:
        return step.compiled(card)
      note = f"The compiler of {card} would know; it needs {lacks}."
    known = step.shapes()
    gradients = sum(part.device for part in of_gradients(step.at_a_time))
    rest = temporaries(self.config, self.settings, gradients, self.devices)
    parts = (*known.parts, Part("activations, other temporaries", "temporaries", rest))
    return dataclasses.replace(known, parts=parts, method="estimate", note=note)

  def flags(self, before: Case | None = None, *, devices: str = "--mesh") -> str:
    """The settings that are not those of another case, or not the defaults, as flags.

    They are quoted for a shell: a `|` of --targets would be a pipe.

    Args:
      before: the other case; None for the defaults.
      devices: the flag that says how many there are: of `lowmem finetune`, ``--devices``.
    """
    said = []
    if self.devices != (before.devices if before else 1):
      said.append(f"{devices} {self.devices}")
    for each in dataclasses.fields(Settings):
      value = getattr(self.settings, each.name)
      usual = "bfloat16" if each.name == "dtype" else usual_of(each, self.full)  # as on a card
      usual = getattr(before.settings, each.name) if before else usual
      other = ONLY.get(each.name, trained_by(self.settings)) != trained_by(self.settings)
      if value == usual or other or each.name in ("model", "config"):
        continue
      flag = flag_of(each.name)
      if isinstance(value, bool):
        said.append(flag if value else f"--no-{flag[2:]}")
      else:
        said.append(f"{flag} {shlex.quote(text_of(value))}")
    return " ".join(said)


def _giving_way(s: Settings) -> dict[str, Any]:
  """What `check` refuses of these settings, and what it is to be in its place."""
  found: dict[str, Any] = {}
  if s.full and s.grad_accum > 1:
    found["update_in_backward"] = False
  if s.full and s.dtype == "float32":
    found["masters"] = Settings.masters
  if not s.full and s.quantize == "none" and s.init == "loftq":
    found["init"] = Settings.init
  return found
