"""Spread over eight devices, the numbers are those of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import finetune
import optax_lowmem as lowmem
from qlora_cases import arguments, records, save_model, save_rows

RUNS = """
import json, sys, jax
import finetune
assert len(jax.devices()) == 8
for argv in json.loads(sys.argv[1]):
  try:
    print("status", finetune.main(argv))
  except SystemExit as exit:
    print("status", exit.code)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The losses of a few steps on one device, on eight, on eight with a base in parts."""
  folder = tmp_path_factory.mktemp("qlora")
  save_model(folder / "model")
  save_rows(folder / "rows.json")
  # min_size of 8-bit state is 4096: rank 64 makes adapters large enough to be held in codes.
  options = "--steps 3 --batch-size 8 --rank 64 --dropout 0.2 --packing --targets q_proj "
  options += "--optim paged_adamw_8bit --save-every 0"
  more = {"one": "--devices 1", "eight": "", "parts": "--fsdp"}
  argv = [arguments(folder, folder / n, *options.split(), *o.split()) for n, o in more.items()]
  argv.append(arguments(folder, folder / "odd", "--batch-size", "12"))
  argv.append(arguments(folder, folder / "many", "--devices", "9"))
  environment = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "PYTHONPATH": os.pathsep.join(
      [str(Path(lowmem.__file__).parents[1]), str(Path(finetune.__file__).parent)]
    ),
  }
  done = subprocess.run(
    [sys.executable, "-c", RUNS, json.dumps(argv)],
    env=os.environ | environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return folder, done


@pytest.mark.parametrize("name", ["eight", "parts"])
def test_the_numbers_of_one_device(runs, name):
  folder, done = runs
  assert done.stdout.count("status 0") == 3, done.stderr[-4000:]
  one, other = records(folder / "one"), records(folder / name)
  for a, b in zip(one, other, strict=True):
    for key in ("loss", "grad_norm", "held_out_loss"):
      if key in a:
        assert b[key] == pytest.approx(a[key], rel=2e-4), (a["step"], key)


def test_rows_that_cannot_be_dealt_out_are_refused(runs):
  _, done = runs
  assert done.stdout.count("status 2") == 2
  assert "--batch-size 12 is not a multiple of the 8 devices" in done.stderr
  assert "--devices 9: there are only 8 here" in done.stderr
