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
from optax_lowmem.qlora.training.devices import dealt, devices_in_a_row, everywhere, in_parts
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
  steps, losses = Steps(partial(train_step, graph, tx, shards=count)), []
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
