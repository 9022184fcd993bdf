"""What a run trains, and all that follows from it."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optax

from optax_lowmem.qlora.loading.checkpoint import Checkpoint
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.run.checkpoints import found
from optax_lowmem.qlora.run.settings import Settings
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer
from optax_lowmem.qlora.training.devices import Devices, Spread
from optax_lowmem.qlora.training.evaluation import better_than_last
from optax_lowmem.qlora.training.report import Part
from optax_lowmem.qlora.training.step import Method, State


class Source(NamedTuple):
  """Where a run's model comes from, as what it leaves names it, or takes it over."""

  name: str  # as it was given
  path: Path
  tokenizer: ChatTokenizer


class Kind(abc.ABC):
  """A kind of training.

  Attributes:
    noun: what a run leaves; so its folder is called.
    title: of the table of what is trained.
    variables: what is trained, as a filter of NNX.
    whole: whether that is all of the model. Then what is saved is a model, a run that is resumed
      reads its weights there, and devices may divide what is trained.
    usual: what the bytes are compared with.
  """

  noun: str
  title: str
  variables: Any
  whole: bool
  usual: str

  @abc.abstractmethod
  def check(self, s: Settings, base: Checkpoint) -> None:
    """Raises ValueError for settings that this base model cannot have."""

  @abc.abstractmethod
  def abstract(self, config: LlamaConfig, s: Settings) -> Any:
    """The shapes of the model that is trained."""

  @abc.abstractmethod
  def load(self, path: Path, s: Settings) -> Any:
    """The model that is trained, from its base."""

  @abc.abstractmethod
  def optimizer(self, s: Settings) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer, and its learning rate.

    Raises:
      ValueError: for a name that is not known.
    """

  @abc.abstractmethod
  def method(
    self, s: Settings, graph: Any, tx: optax.GradientTransformation, mesh: Devices = None
  ) -> Method:
    """How a step is taken, of a model's graph and what `optimizer` gave."""

  def spread(self, s: Settings, mesh: Devices) -> Spread:
    """How a step is spread over devices."""
    return Spread(mesh, s.fsdp, s.fsdp and self.whole)

  @abc.abstractmethod
  def save(self, model: Any, folder: Path, source: Source) -> None:
    """Writes what was trained to a folder."""

  @abc.abstractmethod
  def use(self, path: Path, s: Settings, saved: Path) -> Any:
    """The model of a run that has ended, not to be trained.

    Args:
      path: of its base.
      s: the run's settings.
      saved: what `save` wrote.
    """

  @abc.abstractmethod
  def parts(self, frozen: Any, trained: Any, opt_state: Any, s: Settings) -> list[Part]:
    """Where the bytes are."""

  def notes(self, s: Settings) -> Sequence[str]:
    """What is to be known before a run begins."""
    del s
    return ()

  @abc.abstractmethod
  def left(self, out: Path, best: str) -> Sequence[str]:
    """What a run has left, and what can be done with it.

    Args:
      out: its folder.
      best: what a command ends with that is to take the best of it: " --best", or "".
    """

  def results(self, out: Path, records: Sequence[dict[str, Any]]) -> Sequence[str]:
    """The same; where it is not the last measurement that was the best, the best is named."""
    best = better_than_last(records) if found(out / "best").exists() else None
    if best is None:
      return self.left(out, "")
    note = f"The held-out loss was lowest, {best.loss:.3f}, at step {best.step}, of which "
    note += f"{out / 'best'} holds the {self.noun}; without --best, commands take the last."
    return (*self.left(out, " --best"), note)

  def kept(self, state: State) -> State:
    """What is saved of a state beside what `save` writes."""
    return state._replace(trained=None) if self.whole else state

  def restored(self, kept: State, state: State) -> State:
    """A state from what was kept of it; `state` has the rest."""
    return kept._replace(trained=state.trained) if self.whole else kept
