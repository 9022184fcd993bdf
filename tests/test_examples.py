"""The examples that are to be read: short, of public API only, and they run."""

import ast
import dataclasses
import os
import pathlib
import re
import runpy
import subprocess
import sys
import types

import pytest
from safetensors.numpy import load_file

from optax_lowmem.qlora.loading.weights import open_checkpoint
from optax_lowmem.qlora.run.arguments import parse
from optax_lowmem.qlora.run.checks import check

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
READ = ["tiny_gpt.py", "minimal_qlora.py", "training_loop.py", "several_hosts.py"]
PUBLIC = {"optax_lowmem", "flax", "jax", "numpy", "optax", "orbax", "tiny_gpt"}


def run(name, *arguments):
  """What an example prints, in a process of its own."""
  command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(EXAMPLES.parent)}
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def numbers(pattern, printed):
  return [float(number) for number in re.findall(pattern, printed)]


@pytest.mark.parametrize("name", READ)
def test_they_are_short_and_import_nothing_private(name):
  text = (EXAMPLES / name).read_text()
  assert text.count("\n") <= 150
  for node in ast.walk(ast.parse(text)):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Attribute):
      names = [node.attr]
    for full in names:
      assert not any(re.match("_(?!_)", part) for part in full.split(".")), full
      first = full.split(".")[0]
      if not isinstance(node, ast.Attribute):
        assert first in PUBLIC or first in sys.stdlib_module_names, full
      # Of this library what README shows; `optax_lowmem.qlora` is a program.
      assert not full.startswith("optax_lowmem.qlora"), full


def test_minimal_qlora(tmp_path):
  printed = run("minimal_qlora.py", "--pretrain", 15, "--steps", 15, "--out", tmp_path / "adapter")
  base, packed, adapted, merged = numbers(r"Loss on Python: +([\d.]+)", printed)
  assert abs(packed - base) < 0.02 * base and adapted < 0.95 * packed
  assert merged == pytest.approx(adapted, abs=2e-3)  # printed with three digits
  whole, nf4, adapters, state, usual, after = numbers(r"([\d.]+) MB", printed)
  assert nf4 < whole / 4 and after == whole
  assert usual == pytest.approx(2 * adapters, abs=0.02) and state < 0.3 * usual
  assert (tmp_path / "adapter/adapter_config.json").is_file()
  tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
  assert any(name.endswith("blocks.1.qkv.lora_A.weight") for name in tensors)


def trained(folder, steps, *options):
  """What `training_loop.py` prints, and the held-out loss before and after."""
  printed = run("training_loop.py", "--steps", steps, "--out", folder, *options)
  assert f"the last of step {steps}" in printed and (folder / str(steps)).is_dir()
  return printed, *numbers(r"Held-out loss: ([\d.]+)", printed)


def test_a_loop_goes_on_where_it_stopped(tmp_path):
  printed, first, last = trained(tmp_path / "whole", 12)
  assert last < 0.8 * first
  parameters, state, usual = numbers(r"([\d.]+) MB", printed)
  assert usual == pytest.approx(2 * parameters, abs=0.02) and state < 0.27 * usual

  _, same, halfway = trained(tmp_path / "parts", 5)
  printed, resumed, end = trained(tmp_path / "parts", 12)
  assert "Resumed from" in printed and "after step 5." in printed
  assert (same, halfway, end) == (first, resumed, last)


def test_a_loop_by_another_rule_with_its_state_on_the_host(tmp_path):
  options = ["--optim", "lion_8bit", "--lr", "3e-4", "--offload"]
  _, first, halfway = trained(tmp_path, 8, *options)
  printed, resumed, last = trained(tmp_path, 12, *options)
  assert last < resumed == halfway < 0.9 * first
  (state,) = numbers(r"([\d.]+) MB in host memory", printed)
  (usual,) = numbers(r"With optax.adamw: +([\d.]+) MB", printed)
  assert 0.1 * usual < state < 0.14 * usual


def test_two_processes_are_one_and_go_on_as_one(tmp_path):
  two = run("several_hosts.py", "--steps", 4, "--out", tmp_path / "two")
  one = run("several_hosts.py", "--steps", 4, "--out", tmp_path / "one", "--processes", 1)
  losses = [numbers(r"step 4: loss ([\d.]+)", printed) for printed in (two, one)]
  assert losses[0] == pytest.approx(losses[1], abs=2e-3)
  on = run("several_hosts.py", "--steps", 6, "--out", tmp_path / "two", "--processes", 1)
  assert "after step 4" in on and numbers(r"step 6: loss ([\d.]+)", on)[0] < losses[0][0]


def test_full_finetune_is_made_of_settings():
  names = runpy.run_path(str(EXAMPLES / "full_finetune.py"))
  settings = parse("", names["USUAL"])
  assert settings.full and settings.update_in_backward and not settings.max_grad_norm
  for way in names["WAYS"].values():
    check(dataclasses.replace(settings, **way))
  flags_of = names["flags_of"]
  assert flags_of(["--lr", "1e-5"]) == [*names["USUAL"], "--lr", "1e-5"]
  for other in (["--config=run.yaml"], ["--resume_from_checkpoint", "run"]):
    assert flags_of(other) == ["--full", *other]


@pytest.mark.parametrize(
  ("options", "said"),
  [("--lr 0", "error: --lr must be a positive"), ("--resume nowhere", "error: --resume nowhere")],
)
def test_full_finetune_says_what_is_wrong_in_a_sentence(options, said, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["full_finetune.py", *options.split()])
  with pytest.raises(SystemExit) as ended:
    runpy.run_path(str(EXAMPLES / "full_finetune.py"), run_name="__main__")
  assert ended.value.code == 2 and said in capsys.readouterr().err


def test_full_finetune_measures_no_way_that_is_refused(files, capsys):
  names = runpy.run_path(str(EXAMPLES / "full_finetune.py"))
  settings = parse("", "--full --grad-accum 2 --no-update-in-backward".split())
  config = open_checkpoint(files / "model").config
  for name in [*names["WAYS"]][:2]:  # which would be compiled
    del names["WAYS"][name]
  names["print_memory"](types.SimpleNamespace(settings=settings, config=config))
  assert "in the backward pass  refused: --grad-accum 2" in capsys.readouterr().out


def test_full_finetune(files, tmp_path):
  """Of a tiny model: the table of its memory, and a run."""
  options = f"--model {files}/model --data {files}/rows.json --steps 3 --seq-len 32 --lr 1e-2"
  printed = run("full_finetune.py", *options.split(), "--out", tmp_path / "run")
  rows = re.findall(r"^(.*AdamW.*?) +359.0 KiB +(.+?iB)", printed, re.MULTILINE)
  assert len(rows) == 3 and rows[0][1] == "718.0 KiB"
  before, after = map(float, re.findall(r"Held-out loss ([\d.]+) -> ([\d.]+)", printed)[0])
  assert after < 0.8 * before
  assert (tmp_path / "run/model/model.safetensors").is_file()
