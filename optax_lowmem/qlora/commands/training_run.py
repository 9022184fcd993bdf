"""One fine-tuning, from the first thing that may be refused to its results."""

import json
import math
import shutil
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import optax_lowmem as lowmem
from optax_lowmem.qlora.commands.inputs import read_inputs
from optax_lowmem.qlora.commands.setup import Setup
from optax_lowmem.qlora.files.disk import check_room, written_to
from optax_lowmem.qlora.kinds.kind import Source
from optax_lowmem.qlora.run.called import called
from optax_lowmem.qlora.run.checkpoints import (
  METRICS,
  STATE,
  check_sealed,
  found,
  load_state,
  replacing,
  room,
  save_state,
  seal,
  steps_done,
  whole_metrics,
)
from optax_lowmem.qlora.run.checks import only_results_left
from optax_lowmem.qlora.run.run_folder import output_folder
from optax_lowmem.qlora.run.runs import save_settings
from optax_lowmem.qlora.run.settings import Settings
from optax_lowmem.qlora.run.terminal import (
  CtrlC,
  StepBar,
  complain,
  conclude,
  print_bytes,
  say,
  say_trained,
)
from optax_lowmem.qlora.training.devices import dealt, everywhere, in_host_memory, in_parts
from optax_lowmem.qlora.training.evaluation import HeldOut, since_best
from optax_lowmem.qlora.training.report import (
  Metrics,
  count,
  loss_picture,
  memory_in_use,
  read_records,
)
from optax_lowmem.qlora.training.samples import Samples
from optax_lowmem.qlora.training.step import Steps, merged, split
from optax_lowmem.qlora.training.tensorboard import Board


class Run:
  """A fine-tuning: made, then `load`, `begin`, `train` and `finish`, in this order.

  Making it chooses and locks its folder and reads its data. Of bad input it and `load` raise, and
  nothing after them.

  Attributes:
    settings: those of the setup, with as many steps as the data make of epochs.
    out: the folder that is written to.
    before: the folder of the run that is resumed, or `out`.
    done: the steps that are done.
    ended: whether none is left: all are done, or patience has ended it.
    graph, state, frozen: the model, as `split` gives it; a step changes the state.
    records: what was measured.
  """

  def __init__(self, setup: Setup, locks: ExitStack):
    s = setup.settings
    self.locks = locks
    self.out = output_folder(s, locks)
    self.before = Path(s.resume or self.out)
    if s.fsdp and setup.mesh is None:
      say("--fsdp: there is only one device, which holds the whole model.")
    if s.resume and not s.epochs:  # of epochs, the data say how many steps they are
      self.check_more_is_left(s)
    self.inputs = read_inputs(s, setup.model_path, setup.config)
    if s.epochs:
      setup = setup.lasting(self.inputs.batches.steps(s.epochs))
    self.setup, self.settings, self.mesh = setup, setup.settings, setup.mesh
    self.kind = setup.kind
    self.source = Source(setup.base_name, setup.model_path, self.inputs.tokenizer)
    self.done, self.ended, self.records = 0, False, []

  def load(self) -> None:
    """Reads the model, and the state of the run that is resumed.

    Raises:
      ValueError, OSError: where one of them is damaged, or nothing is left to do.
    """
    s = self.settings
    last = found(self.before / "last")
    if s.resume:
      check_sealed(last)
    path = last if s.resume and self.kind.whole else self.setup.model_path
    divided = s.fsdp and self.mesh is not None
    with in_host_memory() if divided else nullcontext():
      model = self.kind.load(path, s)
      self.graph, state, frozen = split(model, lambda trained: None, self.kind.variables)
    if divided and self.kind.whole:
      state = state._replace(trained=in_parts(state.trained, self.mesh))
    self.method = self.setup.method(self.graph)
    state = state._replace(opt_state=self.method.init(state.trained))
    self.state = everywhere(state, self.mesh)
    self.frozen = (in_parts if s.fsdp else everywhere)(frozen, self.mesh)
    if s.resume:
      kept, self.done = load_state(last / STATE, self.kind.kept(self.state))
      self.state = self.kind.restored(kept, self.state)
      self.records = self.recorded(last, self.done)
      self.ended = only_results_left(s, self.done, self.before, self.records)
    if self.kind.whole and not self.ended:
      check_room(self.out, room(self.folders()))
    self.board = Board(self.out / "tensorboard", self.done) if s.tensorboard else None

  def check_more_is_left(self, s: Settings) -> None:
    """Raises ValueError where nothing is left to do, before data and model are read."""
    last = found(self.before / "last")
    done = steps_done(last / STATE)
    if done is not None:
      only_results_left(s, done, self.before, self.recorded(last, done))

  def recorded(self, last: Path, done: int) -> list[dict[str, Any]]:
    """What the run that is resumed has measured in so many steps."""
    return read_records(whole_metrics(last) or self.before / METRICS, until=done)

  def folders(self) -> dict[Path, int]:
    """The folders with what is trained that the run writes, and the bytes of each."""
    trees = self.state.trained, self.kind.kept(self.state)
    result, rest = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in trees)
    sizes = {"last": result + rest, self.kind.noun: result}
    sizes |= {"best": result} if self.settings.eval_every else {}
    return {self.out / name: size for name, size in sizes.items()}

  def begin(self) -> None:
    """Measures what there is before the first step, and leaves a run that can be resumed."""
    s = self.settings
    say_trained(count(self.state.trained), count(self.frozen))
    for note in self.kind.notes(s):
      say(note)
    model = merged(self.graph, self.state, self.frozen)
    model.eval()  # no dropout, no noise
    quiet = nnx.graphdef(model)
    batches, held_rows = self.inputs.batches, self.inputs.held_rows
    measured_with = batches.once(held_rows)[: s.eval_batches]
    self.held_out = HeldOut(quiet, self.frozen, measured_with, self.mesh)
    self.samples = Samples(quiet, self.inputs.tokenizer, held_rows, s.samples)

    self.locks.enter_context(written_to(self.out, _go_on(self.out)))
    if self.done and not any("held_out_loss" in record for record in self.records):
      say("The run's metrics are lost; the held-out loss is measured again.")
      self.records = [*self.records, {"step": self.done, **self.measure(), **self.speak()}]
    if self.done == 0:
      say(f"Held-out loss{' and samples' * bool(s.samples)} before training ...")
      self.records = [{"step": 0, **self.measure(), **self.speak()}]
    # run.json comes last: what --resume finds by it has something to go on from.
    if self.done == 0:
      self.save("last", 0)
    elif self.out.resolve() != self.before.resolve():
      for name in ("last", "best"):
        if found(self.before / name).exists():
          with replacing(self.out / name) as folder:
            shutil.copytree(found(self.before / name), folder, dirs_exist_ok=True)
    self.metrics = Metrics(self.out / METRICS, self.records, self.board)
    self.records = self.metrics.records
    save_settings(s, self.out, *self.inputs.identity)
    self.steps = Steps(self.method.step)

  def measure(self) -> dict[str, float]:
    """The held-out loss."""
    return self.held_out(self.state)

  def speak(self) -> dict[str, Any]:
    """What the model says to the held-out prompts."""
    return {"samples": self.samples(self.state.trained, self.state.rngs, self.frozen)}

  def save(self, name: str, step: int | None = None) -> None:
    """Writes what was trained to a folder of the run; with a step, also what --resume needs."""
    with replacing(self.out / name) as folder:
      self.kind.save(merged(self.graph, self.state, self.frozen), folder, self.source)
      if step is not None:
        save_state(folder / STATE, self.kind.kept(self.state), step)
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        (folder / METRICS).write_text(text, encoding="utf-8")
      seal(folder)

  def train(self) -> int:
    """Takes the steps that are left, until it is stopped; returns the process's exit status."""
    s = self.settings
    with CtrlC() as ctrl_c, StepBar(self.done, s.steps) as bar:
      while not self.ended:
        if not self.step(bar):
          return 1
        if self.ended or (s.eval_every and self.done % s.eval_every == 0):
          self.evaluate(bar)
        stopped = self.ended or ctrl_c.asked or self.done == s.stop_after
        if stopped:
          self.save(self.kind.noun)
        if stopped or (s.save_every and self.done % s.save_every == 0):
          self.save("last", self.done)
        if stopped:
          break
    if self.board:
      self.board.close()
    if self.ended:
      return 0
    noun = self.kind.noun
    say(f"Stopped after step {self.done}. The {noun} so far is in {self.out / noun}.")
    say(f"To go on: {called()} --resume {self.out}")
    return 130 if ctrl_c.asked else 0

  def step(self, bar: StepBar) -> bool:
    """Takes one step; whether its loss and gradient are finite, without which none can follow."""
    batch = dealt(self.inputs.batches.at(self.done), self.mesh)
    program = self.steps.ready(self.state, self.frozen, batch)
    clock = time.perf_counter()
    self.state, measured = program(self.state, self.frozen, batch)
    measured = {name: float(value) for name, value in measured.items()}
    seconds = time.perf_counter() - clock
    lr, tokens = float(np.asarray(self.setup.schedule(self.done))), int(batch.lengths.sum())
    self.done += 1
    if not math.isfinite(measured["loss"] + measured["grad_norm"]):
      complain(
        f"Step {self.done} gave a loss of {measured['loss']} and a gradient norm of "
        f"{measured['grad_norm']}; training cannot go on. Try a lower --lr (now "
        f"{self.settings.lr}). What --save-every saved before is in {self.out / 'last'}."
      )
      return False
    self.metrics.add(step=self.done, **measured, lr=lr, tokens=tokens, seconds=seconds)
    bar.advance(self.records[-1], self.inputs.batches.epochs(self.done), memory_in_use())
    self.ended = self.done == self.settings.steps
    return True

  def evaluate(self, bar: StepBar) -> None:
    """Measures the held-out loss, keeps the best, and ends the run at patience's end."""
    patience = self.settings.patience
    now, (best, missed) = self.measure(), since_best(self.records)
    better = now["held_out_loss"] < best
    bar.measured(self.done, **now, best=better)
    self.ended = self.ended or bool(patience and not better and missed + 1 >= patience)
    self.metrics.add(step=self.done, **now, **(self.speak() if self.ended else {}))
    if better:
      self.save("best")

  def finish(self, begun: float) -> None:
    """Draws the loss, prints where the bytes are and what was learned, writes summary.json."""
    s = self.settings
    if self.done < s.steps:
      say(
        f"{s.patience} measurements brought no lower held-out loss; stopped after step {self.done}."
      )
    having = self.metrics.having
    loss_picture(self.out / "loss.png", having("loss"), having("held_out_loss"))
    parts = self.kind.parts(self.frozen, self.state.trained, self.state.opt_state, s)
    print_bytes(parts, self.steps.temporaries(), self.kind.usual, self.setup.devices)
    held = lowmem.memory_report((self.frozen, self.state.trained), self.state.opt_state)
    say(f"Held now: {held.line()}.")
    seconds = time.perf_counter() - begun
    results = self.kind.results(self.out, self.records)
    conclude(self.out, self.metrics, parts, seconds, results)


def _go_on(out: Path) -> str:
  return (
    f"Free some space, then go on from the last save with --resume {out}; where nothing was saved "
    "yet, begin again with the same --out."
  )
