"""What a run is to be, from its settings and from shapes; ``--dry-run`` prints it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optax
from jax.sharding import Mesh

from optax_lowmem.qlora.commands.inputs import divided, read_data
from optax_lowmem.qlora.files.fetch import MODEL_NAME, default_model
from optax_lowmem.qlora.files.hub import fetched
from optax_lowmem.qlora.kinds import Kind, kind_of
from optax_lowmem.qlora.loading.weights import open_checkpoint
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.planning.steps import step_of
from optax_lowmem.qlora.run.checks import check, check_attention, check_length
from optax_lowmem.qlora.run.settings import Settings
from optax_lowmem.qlora.run.terminal import print_bytes, print_shapes, say
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer
from optax_lowmem.qlora.training.devices import devices_in_a_row, laid_on
from optax_lowmem.qlora.training.step import Method, compiled, in_its_memory


@dataclass(frozen=True)
class Setup:
  """What settings and a model's config.json decide.

  Attributes:
    settings: with the model's directory in the place of its name on the hub.
    model_path: of the base model.
    base_name: of the base model, as it was given; a saved adapter names it.
    config: the base model's.
    kind: what is trained.
    shapes: of the model that is trained.
    tx: the optimizer.
    schedule: its learning rate.
    mesh: the devices, or None for one.
  """

  settings: Settings
  model_path: Path
  base_name: str
  config: LlamaConfig
  kind: Kind
  shapes: Any
  tx: optax.GradientTransformation
  schedule: Callable[[int], Any]
  mesh: Mesh | None

  @classmethod
  def of(cls, s: Settings) -> "Setup":
    """Holds the settings against the model and the devices.

    Raises:
      ValueError, OSError: for what no run can have.
    """
    kind = kind_of(s)
    tx, schedule = kind.optimizer(s)
    mesh = devices_in_a_row(s.devices, s.batch_size)
    base_name = s.model or MODEL_NAME
    model_path = fetched(s.model) if s.model else default_model(say)
    s = replace(s, model=str(model_path)) if s.model else s
    checkpoint = open_checkpoint(model_path)
    config = checkpoint.config
    check_length(s, config)
    kind.check(s, checkpoint)
    check_attention(s, config)
    shapes = kind.abstract(config, s)
    return cls(s, model_path, base_name, config, kind, shapes, tx, schedule, mesh)

  def lasting(self, steps: int) -> "Setup":
    """The same for a number of steps, in the place of one of epochs."""
    s = replace(self.settings, steps=steps, epochs=0.0)
    check(s)
    tx, schedule = self.kind.optimizer(s)
    return replace(self, settings=s, tx=tx, schedule=schedule)

  @property
  def devices(self) -> int:
    """How many there are."""
    return 1 if self.mesh is None else self.mesh.size

  def method(self, graph: Any) -> Method:
    """How a step of this graph's model is taken."""
    return self.kind.method(self.settings, graph, self.tx, self.mesh)

  def show(self) -> None:
    """Prints the shapes of what would be trained and the memory of a step on each device.

    The data are read if they were named, so that what is wrong with them is found here too.
    """
    s = self.settings
    if s.data:
      data, _ = read_data(s, ChatTokenizer.from_model(self.model_path, s.chat_template))
      divided(s, data)
    step = step_of(self.config, s, devices=self.devices)
    state, frozen, batch = laid_on(self.mesh, (step.state, step.frozen, step.batch))
    state = state._replace(opt_state=in_its_memory(state.opt_state))
    print_shapes(self.kind.title, state.trained)
    say(f"Compiling a step of {s.grad_accum} x {s.batch_size} x {s.seq_len} tokens ...")
    temporaries = compiled(step.fn, state, frozen, batch).memory_analysis().temp_size_in_bytes
    parts = self.kind.parts(frozen, state.trained, state.opt_state, s)
    print_bytes(parts, temporaries, self.kind.usual, self.devices)
