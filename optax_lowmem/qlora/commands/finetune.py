"""Fine-tune a language model in 4 bits: QLoRA with 8-bit AdamW, in plain JAX, Flax and optax.

  lowmem finetune                                      # a small real model and data set
  lowmem finetune --model DIR --data rows.json --out my-adapter
  lowmem finetune --config run.yaml --lr 2e-4          # settings from a file; flags go before it
  lowmem finetune --resume my-adapter                  # go on where it stopped
  lowmem plan --model DIR --seq-len 2048               # would it fit?
  lowmem chat my-adapter                               # talk to the result
  lowmem merge my-adapter --out my-model               # a model without adapters
  lowmem export my-adapter --out my.gguf               # the adapter, for llama.cpp

From a clone, ``python examples/qlora/finetune.py`` stands for ``lowmem finetune``.

The base model is frozen, its linear layers packed in 4 bits (NF4). Beside each stands a trained
low-rank correction (LoRA), and only for these does an optimizer state exist, in 8 bits.
"""

import datetime
import json
import math
import shutil
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowmem import nn as lowmem_nn
from optax_lowmem.qlora.data.batches import Batch, Batches
from optax_lowmem.qlora.data.dataset import Dataset, load
from optax_lowmem.qlora.files.disk import DiskError, sha256_of, written_to
from optax_lowmem.qlora.files.fetch import MODEL_NAME, default_data, default_model
from optax_lowmem.qlora.files.hub import fetched
from optax_lowmem.qlora.loading.fingerprints import check_same_base, of_model
from optax_lowmem.qlora.loading.weights import open_checkpoint
from optax_lowmem.qlora.models.neftune import without_noise
from optax_lowmem.qlora.run.arguments import parse
from optax_lowmem.qlora.run.called import called
from optax_lowmem.qlora.run.checkpoints import (
  METRICS,
  STATE,
  check_sealed,
  found,
  load_state,
  replacing,
  save_state,
  seal,
  whole_metrics,
)
from optax_lowmem.qlora.run.checks import (
  check,
  check_attention,
  check_length,
  check_patterns,
  check_rank,
  check_vocabulary,
  only_results_left,
)
from optax_lowmem.qlora.run.recipe import abstract_model, loaded_model
from optax_lowmem.qlora.run.recipe import adapted as adapted
from optax_lowmem.qlora.run.recipe import optimizer as optimizer
from optax_lowmem.qlora.run.run_folder import output_folder
from optax_lowmem.qlora.run.runs import began, check_same_data, read_run, save_settings
from optax_lowmem.qlora.run.settings import Settings
from optax_lowmem.qlora.run.terminal import (
  CtrlC,
  StepBar,
  complain,
  conclude,
  print_bytes,
  print_shapes,
  say,
  say_trained,
  sentences,
)
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer
from optax_lowmem.qlora.training.devices import (
  dealt,
  devices_in_a_row,
  everywhere,
  in_host_memory,
  in_parts,
)
from optax_lowmem.qlora.training.evaluation import HeldOut, since_best
from optax_lowmem.qlora.training.report import (
  Metrics,
  byte_parts,
  count,
  loss_picture,
  memory_in_use,
  read_records,
)
from optax_lowmem.qlora.training.samples import Samples
from optax_lowmem.qlora.training.step import State, Steps, abstract_state, merged, split
from optax_lowmem.qlora.training.step import compiled as compiled
from optax_lowmem.qlora.training.tensorboard import Board


def finetune(s: Settings) -> int:
  """Runs one fine-tuning; returns the process's exit status."""
  try:
    with ExitStack() as locks:
      return _finetune(s, locks)
  except DiskError as error:
    complain(str(error))
    return 1


def _finetune(s: Settings, locks: ExitStack) -> int:
  begun = time.perf_counter()
  with sentences():  # what can be refused is refused here, before anything slow begins
    tx, schedule = optimizer(s)
    mesh = devices_in_a_row(s.devices, s.batch_size)
    shards = 1 if mesh is None else mesh.size
    base_name = s.model or MODEL_NAME
    model_path = fetched(s.model) if s.model else default_model(say)
    s = replace(s, model=str(model_path)) if s.model else s
    config = open_checkpoint(model_path).config
    check_length(s, config)
    check_rank(s, config)
    check_patterns(s, config)
    check_attention(s, config)
    shapes = abstract_model(config, s)
    if s.dry_run:
      if s.data:
        read_data(s, ChatTokenizer.from_model(model_path, s.chat_template))
      return dry_run(s, tx, *split(shapes, partial(abstract_state, tx)))
    out = output_folder(s, locks)
    in_one = nullcontext()
    if s.fsdp and mesh is None:
      say("--fsdp: there is only one device, which holds the whole base model.")
    elif s.fsdp:
      in_one = in_host_memory()
    base = read_run(Path(s.resume))["base"] if s.resume else of_model(model_path)
    if s.resume:
      check_same_base(base, model_path, Path(s.resume))
    today = (began(Path(s.resume)) if s.resume else None) or datetime.date.today()
    tokenizer = ChatTokenizer.from_model(model_path, s.chat_template, today)
    check_vocabulary(tokenizer, config)
    data, data_sha256 = read_data(s, tokenizer)
    rows, held_rows = data.split()
    if not s.packing:  # what is not measured is learned from
      most = s.eval_batches * s.batch_size
      rows, held_rows = rows + held_rows[most:], held_rows[:most]
    say(f"Model: {model_path.name}, {config.parameter_count():,} parameters.")
    say(f"{len(rows):,} rows to learn from, {len(held_rows):,} to measure with.")
    batches = Batches(
      rows, s.batch_size, s.grad_accum, s.seq_len, tokenizer.pad_id, s.seed,
      packing=s.packing, buckets=s.buckets,
    )  # fmt: skip
    if s.epochs:
      s = replace(s, steps=batches.steps(s.epochs), epochs=0.0)
      check(s)
      tx, schedule = optimizer(s)
    with in_one:
      graph, state, frozen = split(loaded_model(model_path, s), tx.init)
    state, frozen = everywhere(state, mesh), (in_parts if s.fsdp else everywhere)(frozen, mesh)
    start, records, ended, before = 0, [], False, Path(s.resume or out)
    if s.resume:
      last = found(before / "last")
      check_sealed(last)
      state, start = load_state(last / STATE, state)
      records = read_records(whole_metrics(last) or before / METRICS, until=start)
      ended = only_results_left(s, start, before, records)
    board = Board(out / "tensorboard", start) if s.tensorboard else None

  say_trained(count(state.lora), count(frozen))
  model = merged(graph, state, frozen)
  model.eval()  # no dropout, no noise
  quiet = nnx.graphdef(model)
  measure = HeldOut(quiet, frozen, batches.once(held_rows)[: s.eval_batches], mesh)
  samples = Samples(quiet, tokenizer, held_rows, s.samples)

  def speak() -> dict[str, Any]:
    return {"samples": samples(state.lora, state.rngs, frozen)}

  def save(name: str, step: int | None = None) -> None:
    with replacing(out / name) as folder:
      model = without_noise(merged(graph, state, frozen))
      lowmem_nn.save_peft(model, folder, base_model=base_name)
      if step is not None:
        save_state(folder / STATE, state, step)
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / METRICS).write_text(text, encoding="utf-8")
      seal(folder)

  locks.enter_context(written_to(out, _go_on(out)))
  if start and not any("held_out_loss" in record for record in records):
    say("The run's metrics are lost; the held-out loss is measured again.")
    records = [*records, {"step": start, **measure(state), **speak()}]
  if start == 0:
    say(f"Held-out loss{' and samples' * bool(s.samples)} before training ...")
    records = [{"step": 0, **measure(state), **speak()}]
  # run.json comes last: what --resume finds by it has something to go on from.
  if start == 0:
    save("last", 0)
  elif out.resolve() != before.resolve():
    for name in ("last", "best"):
      if found(before / name).exists():
        with replacing(out / name) as folder:
          shutil.copytree(found(before / name), folder, dirs_exist_ok=True)
  metrics = Metrics(out / METRICS, records, board)
  records = metrics.records
  save_settings(s, out, data_sha256, today, base)
  steps, done = Steps(graph, tx, shards=shards), start

  with CtrlC() as ctrl_c, StepBar(start, s.steps) as bar:
    for step in range(start, start if ended else s.steps):
      batch = dealt(batches.at(step), mesh)
      program = steps.ready(state, frozen, batch)
      clock = time.perf_counter()
      state, measured = program(state, frozen, batch)
      measured = {name: float(value) for name, value in measured.items()}
      seconds = time.perf_counter() - clock
      done, tokens = step + 1, int(batch.lengths.sum())
      if not math.isfinite(measured["loss"] + measured["grad_norm"]):
        complain(
          f"Step {done} gave a loss of {measured['loss']} and a gradient norm of "
          f"{measured['grad_norm']}; training cannot go on. Try a lower --lr (now "
          f"{s.lr}). What --save-every saved before is in {out / 'last'}."
        )
        return 1
      metrics.add(step=done, **measured, lr=float(schedule(step)), tokens=tokens, seconds=seconds)
      bar.advance(metrics.records[-1], batches.epochs(done), memory_in_use())
      ended = done == s.steps
      if ended or (s.eval_every and done % s.eval_every == 0):
        now, (best, missed) = measure(state), since_best(metrics.records)
        better = now["held_out_loss"] < best
        bar.measured(done, **now, best=better)
        ended = ended or bool(s.patience and not better and missed + 1 >= s.patience)
        metrics.add(step=done, **now, **(speak() if ended else {}))
        if better:
          save("best")
      stopped = ctrl_c.asked or done == s.stop_after
      if ended or stopped:
        save("adapter")
      if ended or stopped or (s.save_every and done % s.save_every == 0):
        save("last", done)
      if ended or stopped:
        break

  if board:
    board.close()
  if not ended:
    say(f"Stopped after step {done}. The adapter so far is in {out / 'adapter'}.")
    say(f"To go on: {called()} --resume {out}")
    return 130 if ctrl_c.asked else 0
  if done < s.steps:
    say(f"{s.patience} measurements brought no lower held-out loss; stopped after step {done}.")
  loss_picture(out / "loss.png", metrics.having("loss"), metrics.having("held_out_loss"))
  parts = byte_parts(frozen, state.lora, state.opt_state, s.optim, s.quantize)
  print_bytes(parts, steps.temporaries())
  conclude(out, metrics, parts, seconds=time.perf_counter() - begun)
  return 0


def _go_on(out: Path) -> str:
  return (
    f"Free some space, then go on from the last save with --resume {out}; where nothing was saved "
    "yet, begin again with the same --out."
  )


def dry_run(s: Settings, tx: Any, graph: Any, state: State, frozen: Any) -> int:
  """Prints the shapes of what would be trained and the memory of a step; from shapes alone."""
  shape = (s.grad_accum, s.batch_size, s.seq_len)
  ids, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool)
  packed = (ids, ids) if s.packing else ()
  batch = Batch(ids, ids, mask, jax.ShapeDtypeStruct(shape[:2], jnp.int32), *packed)
  print_shapes(state.lora)
  say(f"Compiling a step of {s.grad_accum} x {s.batch_size} x {s.seq_len} tokens ...")
  temporaries = compiled(graph, tx, state, frozen, batch).memory_analysis().temp_size_in_bytes
  print_bytes(byte_parts(frozen, state.lora, state.opt_state, s.optim, s.quantize), temporaries)
  return 0


def read_data(s: Settings, tokenizer: ChatTokenizer) -> tuple[Dataset, str]:
  """The rows, and the SHA-256 of their file; says what they are."""
  path = Path(s.data) if s.data else default_data(say)
  sha256 = sha256_of(path)
  if s.resume:
    check_same_data(Path(s.resume), sha256, path)
  data = load(path, tokenizer, s.seq_len, train_on_prompt=s.train_on_prompt)
  say(f"Data: {path.name}, {data.kind}, {tokenizer.template.name} template.")
  for note in data.notes:
    say(note)
  return data, sha256


def train(argv: list[str]) -> int:
  """``lowmem finetune``."""
  with sentences():
    settings = parse(__doc__ or "", argv, prog=called())
  return finetune(settings)


def plan(argv: list[str]) -> int:
  """``lowmem plan``."""
  return train([*argv, "--dry-run"])
