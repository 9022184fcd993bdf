"""Spread over eight devices, the numbers are those of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import optax_lowmem as lowmem
from qlora_cases import SCRIPT, arguments

STEPS = """
import json, sys
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from optax_lowmem.qlora.run.settings import Settings
from optax_lowmem.qlora.data.batches import Batches
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer
from optax_lowmem.qlora.data.dataset import load
from optax_lowmem.qlora.training.evaluation import HeldOut
from pathlib import Path
from optax_lowmem.qlora.run.recipe import loaded_model, optimizer
from optax_lowmem.qlora.training.devices import (
  Spread, dealt, devices_in_a_row, everywhere, in_parts
)
from optax_lowmem.qlora.training.step import Steps, merged, split, train_step

folder = Path(sys.argv[1])
# Rank 64 makes the adapters large enough to be held in codes, and those in host memory.
s = Settings(
  dtype="float32", batch_size=8, rank=64, dropout=0.2, targets="q_proj", seq_len=64, packing=True,
  grad_accum=2, optim="paged_adamw_8bit", lr=1e-2, warmup=0, neftune_alpha=5.0,
)
tokenizer = ChatTokenizer.from_model(folder / "model")
rows = load(folder / "rows.json", tokenizer, s.seq_len).rows
batches = Batches(rows, s.batch_size, 2, s.seq_len, tokenizer.pad_id, 0, packing=True)
for count, place in ((1, everywhere), (8, everywhere), (8, in_parts)):
  mesh = devices_in_a_row(count, s.batch_size)
  tx, _ = optimizer(s)
  graph, state, frozen = split(loaded_model(folder / "model", s), tx.init)
  state, frozen = everywhere(state, mesh), place(frozen, mesh)
  spread = [x for x in jax.tree.leaves(frozen) if not x.sharding.is_fully_replicated]
  steps, losses = Steps(partial(train_step, graph, tx, spread=Spread(mesh, place is in_parts))), []
  kinds = [x.sharding.memory_kind for x in jax.tree.leaves(state)]
  for step in range(2):
    state, measured = steps(state, frozen, dealt(batches.at(step), mesh))
    losses += [float(measured["loss"]), float(measured["grad_norm"])]
  assert kinds == [x.sharding.memory_kind for x in jax.tree.leaves(state)]
  model = merged(graph, state, frozen)
  model.eval()
  measure = HeldOut(nnx.graphdef(model), frozen, batches.once(rows[:9]), mesh)
  losses.append(measure(state)["held_out_loss"])
  bytes_ = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(frozen))
  print(json.dumps({"losses": losses, "spread": len(spread), "bytes": bytes_,
                    "host": "pinned_host" in kinds}))
"""


def run(command, *more):
  environment = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "PYTHONPATH": str(Path(lowmem.__file__).parents[1]),
  }
  return subprocess.run(
    [sys.executable, *command, *more], env=os.environ | environment, capture_output=True, text=True
  )


def test_the_numbers_of_one_device(files):
  """With packing, accumulation, dropout, noise, and 8-bit state in host memory."""
  done = run(["-c", STEPS], str(files))
  assert done.returncode == 0, done.stderr[-4000:]
  one, eight, parts = map(json.loads, done.stdout.splitlines())
  for other in (eight, parts):
    assert other["losses"] == pytest.approx(one["losses"], rel=2e-4)
  assert all(case["host"] for case in (one, eight, parts))
  assert one["spread"] == eight["spread"] == 0 < parts["spread"]
  assert parts["bytes"] < 0.3 * eight["bytes"] == 0.3 * one["bytes"]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ("--batch-size 12", "--batch-size 12 is not a multiple of the 8 devices"),
    ("--devices 9", "--devices 9: there are only 8 here"),
  ],
)
def test_rows_that_cannot_be_dealt_out_are_refused(files, tmp_path, options, message):
  argv = arguments(files, tmp_path / "out", *options.split())
  done = run([SCRIPT], *argv)
  said = done.stderr.removeprefix("Starting ...\n")
  assert done.returncode == 2 and message in said and said.count("\n") == 1


@pytest.mark.slow
def test_a_whole_run(files, tmp_path):
  options = "--steps 1 --batch-size 8 --targets q_proj --fsdp"
  done = run([SCRIPT], *arguments(files, tmp_path / "out", *options.split()))
  assert done.returncode == 0, done.stderr[-4000:]
  assert (tmp_path / "out/adapter/adapter_model.safetensors").exists()


ALL_PARAMETERS = """
import json, sys
import jax
from pathlib import Path
from optax_lowmem.qlora.data.batches import Batches
from optax_lowmem.qlora.data.dataset import load
from optax_lowmem.qlora.kinds import kind_of
from optax_lowmem.qlora.run.settings import Settings
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer
from optax_lowmem.qlora.training.devices import dealt, devices_in_a_row, everywhere, in_parts
from optax_lowmem.qlora.training.step import Steps, split

folder = Path(sys.argv[1])
s = Settings(
  full=True, dtype="float32", batch_size=8, seq_len=64, lr=1e-2, warmup=0, max_grad_norm=1.0,
  update_in_backward=bool(int(sys.argv[2])),
)
tokenizer = ChatTokenizer.from_model(folder / "model")
rows = load(folder / "rows.json", tokenizer, s.seq_len).rows
batches = Batches(rows, s.batch_size, 1, s.seq_len, tokenizer.pad_id, 0)
kind = kind_of(s)
for count, place in ((1, everywhere), (2, everywhere), (8, in_parts)):
  s.fsdp = place is in_parts
  mesh = devices_in_a_row(count, s.batch_size)
  graph, state, frozen = split(kind.load(folder / "model", s), lambda _: None, kind.variables)
  state = state._replace(trained=place(state.trained, mesh))
  method = kind.method(s, graph, kind.optimizer(s)[0], mesh)
  state = everywhere(state._replace(opt_state=method.init(state.trained)), mesh)
  steps, losses = Steps(method.step), []
  for step in range(3):
    state, measured = steps(state, frozen, dealt(batches.at(step), mesh))
    losses.append(float(measured["loss"]))
  bytes_ = [
    sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    for tree in (state.trained, state.opt_state)
  ]
  print(json.dumps({"losses": losses, "bytes": bytes_}))
"""


@pytest.mark.parametrize("in_backward", [True, False])
def test_all_parameters_on_several_devices(files, in_backward):
  """Copied, or in parts, of which there are more than heads."""
  done = run(["-c", ALL_PARAMETERS], str(files), str(int(in_backward)))
  assert done.returncode == 0, done.stderr[-4000:]
  one, copied, parts = map(json.loads, done.stdout.splitlines())
  for other in (copied, parts):
    assert other["losses"] == pytest.approx(one["losses"], rel=1e-4)
  assert copied["bytes"] == one["bytes"]
  for part, whole in zip(parts["bytes"], one["bytes"], strict=True):
    assert part < 0.4 * whole  # the table's 279 rows of one block are held by both


DRY_RUNS = """
import json, sys
from optax_lowmem.qlora import cli
from optax_lowmem.qlora.commands import setup

def said(parts, temporaries, usual, devices):
  print(json.dumps([[part.here for part in parts], temporaries, devices]))

setup.print_bytes = said
for more in ("--devices 1", "--devices 2 --fsdp"):
  assert cli.main(["finetune", *sys.argv[1:], *more.split()]) == 0
"""


def test_a_dry_run_says_what_each_device_holds(files, tmp_path):
  """With pages, and rows of which each device has half."""
  options = "--full --dry-run --optim paged_adamw_8bit --no-update-in-backward --batch-size 16"
  done = run(["-c", DRY_RUNS], *arguments(files, tmp_path / "out", *options.split()))
  assert done.returncode == 0, done.stderr[-4000:]
  assert done.stdout.count("57 rows to learn from, 3 to measure with.") == 2
  one, two = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("[["))
  assert one[2] == 1 and two[2] == 2 and two[1] < 0.8 * one[1]
  assert all(half < 0.6 * whole for half, whole in zip(two[0], one[0], strict=True))


@pytest.mark.slow
def test_a_whole_run_of_all_parameters(files, tmp_path):
  """In parts, in the backward pass; stopped and resumed."""
  options = "--full --fsdp --devices 2 --steps 2 --batch-size 2 --stop-after 1".split()
  out = tmp_path / "out"
  for argv in ([*arguments(files, out), *options], ["--resume", str(out)]):
    done = run([SCRIPT], *argv)
    assert done.returncode == 0, done.stderr[-4000:]
  assert (out / "model/model.safetensors").exists()
