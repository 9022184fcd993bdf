"""Runs that are disturbed: by other processes, full disks, signals and damaged files."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import optax_lowmem
from optax_lowmem import nn as lowmem_nn
from optax_lowmem.qlora.commands import training_run
from optax_lowmem.qlora.files import disk, locks
from optax_lowmem.qlora.loading.fingerprints import of_file
from optax_lowmem.qlora.loading.llama import load_llama
from optax_lowmem.qlora.run.run_folder import output_folder
from optax_lowmem.qlora.run.settings import Settings
from optax_lowmem.qlora.run.terminal import CtrlC
from optax_lowmem.qlora.training.report import read_records
from qlora_cases import adapter, arguments, main, records, same, save_model

SHORT = "--steps 2 --targets q_proj --save-every 0".split()


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
  """A whole run, and the same one stopped after its first step."""
  folder = tmp_path_factory.mktemp("runs")
  assert main(arguments(files, folder / "whole", *SHORT)) == 0
  assert main(arguments(files, folder / "stopped", *SHORT, "--stop-after", "1")) == 0
  return folder


@pytest.fixture
def stopped(runs, tmp_path):
  return shutil.copytree(runs / "stopped", tmp_path / "run")


def refused(argv, capsys):
  with pytest.raises(SystemExit) as exit:
    main(argv)
  assert exit.value.code == 2
  said = capsys.readouterr().err
  assert said.startswith("error: ") and said.count("\n") == 1
  return said


# --- two processes --------------------------------------------------------------------------------

HOLD = "import sys; from pathlib import Path; from optax_lowmem.qlora.files import locks\n"
HOLD += "with locks.held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_a_folder_is_written_to_by_one_process_and_the_lock_dies_with_it(
  files, stopped, tmp_path, capsys
):
  with subprocess.Popen(
    [sys.executable, "-c", HOLD, str(stopped)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env=os.environ | {"PYTHONPATH": str(pathlib.Path(optax_lowmem.__file__).parents[1])},
  ) as other:
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    for argv in (["--resume", str(stopped)], ["merge", str(stopped), "--out", str(stopped)]):
      said = refused(argv, capsys)
      assert str(stopped) in said
    said = refused(["--resume", str(stopped)], capsys)
    assert f"{stopped} is being written to by another process (number {other.pid})" in said
    assert "Wait until it ends" in said
    (tmp_path / "new").mkdir()
    with locks.held(tmp_path / "new"):
      assert "is being written to" in refused(arguments(files, tmp_path / "new"), capsys)
      merge = ["merge", str(stopped), "--out", str(tmp_path / "new")]
      assert "is being written to" in refused(merge, capsys)
    other.kill()
  assert (stopped / locks.LOCK).exists()  # a file that stays locks nobody out
  with locks.held(stopped):
    pass
  assert not (stopped / locks.LOCK).exists()


# --- killed before there was anything to resume ---------------------------------------------------


@pytest.mark.parametrize(
  "left",
  [
    ["last.partial/adapter_model.safetensors"],
    [".lock", "last.partial/state.safetensors"],
    ["last/state.safetensors", "metrics.jsonl.partial"],
    ["last/state.safetensors", "metrics.jsonl", "run.json.partial", "tensorboard/events.out.1"],
  ],
)
def test_a_run_killed_in_its_first_save_is_begun_again(tmp_path, left, capsys):
  out = tmp_path / "out"
  for name in left:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("half")
  assert "begin it again with the same --out" in refused(["--resume", str(out)], capsys)
  with ExitStack() as stack:
    assert output_folder(Settings(out=str(out)), stack) == out
    assert [path.name for path in out.iterdir()] == [locks.LOCK]
  assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["last/mine.txt", "last.partial.txt", "run.json", "best.txt"])
def test_what_is_not_a_runs_own_is_not_cleared_away(tmp_path, name):
  file = tmp_path / "out" / name
  file.parent.mkdir(parents=True)
  file.write_text("mine")
  with ExitStack() as stack, pytest.raises(FileExistsError, match="is not empty"):
    output_folder(Settings(out=str(tmp_path / "out")), stack)
  assert file.read_text() == "mine" and len(list((tmp_path / "out").iterdir())) == 1


def test_what_a_killed_merge_has_left_is_cleared_away(files, tmp_path):
  model = save_model(tmp_path / "model", tied=False)
  adapted = lowmem_nn.add_lora(load_llama(model), 2, 4, "q_proj", rngs=nnx.Rngs(0))
  lowmem_nn.save_peft(adapted, tmp_path / "run" / "last")
  (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": {"model": str(model)}}))
  for left in (".merged.partial.0123abcd.partial", "merged.partial", "merged"):
    (tmp_path / left).mkdir()
  (tmp_path / "merged" / locks.LOCK).write_text("7")
  (tmp_path / ".merged.partial.0123abcd.partial" / "model.safetensors").write_text("half")
  merge = ["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]
  assert main(merge) == 0
  assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "model", "run"]
  assert locks.LOCK not in [path.name for path in (tmp_path / "merged").iterdir()]


# --- damage ---------------------------------------------------------------------------------------


def flip(path, at=0.6, bit=1):
  raw = bytearray(path.read_bytes())
  raw[int(at * len(raw))] ^= bit
  path.write_bytes(raw)


@pytest.mark.parametrize("at", [0.001, 0.5, 0.999])
def test_a_flipped_bit_in_a_state_is_refused(stopped, capsys, at):
  flip(stopped / "last" / "state.safetensors", at)
  said = refused(["--resume", str(stopped)], capsys)
  assert f"{stopped}/last/state.safetensors is not a complete training state" in said
  assert "start a new run" in said


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_flipped_bit_in_an_adapter_is_refused_where_it_is_used(stopped, tmp_path, capsys, name):
  flip(stopped / "last" / name)
  for argv in (["merge", str(stopped), "--out", str(tmp_path / "m")], ["chat", str(stopped)]):
    assert f"{stopped}/last/{name} is not as it was written" in refused(argv, capsys)


def test_every_flipped_bit_of_run_json_is_refused(stopped, capsys):
  file = stopped / "run.json"
  whole = file.read_bytes()
  for at in np.linspace(0, len(whole) - 2, 60).astype(int):
    raw = bytearray(whole)
    raw[at] ^= 1
    if raw.isspace() or bytes(raw).split() == whole.split():
      continue
    file.write_bytes(raw)
    try:
      same_as_before = json.loads(raw) == json.loads(whole)
    except ValueError:
      same_as_before = False
    if not same_as_before:
      assert f"{file} is damaged" in refused(["--resume", str(stopped)], capsys)
  for raw in (b"", b"[]", b"[" * 100_000, whole[: len(whole) // 2]):
    file.write_bytes(raw)
    assert f"{file} is damaged" in refused(["--resume", str(stopped)], capsys)
  record = json.loads(whole) | {"settings": {"rank": "many"}}
  del record["sha256"]
  file.write_text(json.dumps(record))
  assert f"{file} is damaged: rank 'many' is not an int" in (
    refused(["--resume", str(stopped)], capsys)
  )


def test_another_base_of_the_same_shapes_is_refused(files, stopped, tmp_path, capsys):
  model = shutil.copytree(files / "model", tmp_path / "model")
  weights = load_file(model / "model.safetensors")
  weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
  save_file(weights, model / "model.safetensors")
  resume = ["--resume", str(stopped), "--model", str(model)]
  said = refused(resume, capsys)
  assert f"{model}/model.safetensors is not the one that the run in {stopped} began with" in said
  shutil.copy(files / "model" / "model.safetensors", model)
  (model / "config.json").write_text((model / "config.json").read_text().replace("1e-05", "2e-05"))
  assert "config.json is not the one" in refused(resume, capsys)


def test_large_files_are_told_apart_by_pieces(tmp_path, monkeypatch):
  monkeypatch.setattr("optax_lowmem.qlora.loading.fingerprints.WHOLE", 1 << 16)
  monkeypatch.setattr("optax_lowmem.qlora.loading.fingerprints.START", 1 << 12)
  monkeypatch.setattr("optax_lowmem.qlora.loading.fingerprints.PIECES", 16)
  monkeypatch.setattr("optax_lowmem.qlora.loading.fingerprints.PIECE", 1 << 10)
  content = np.random.default_rng(0).bytes(1 << 18)
  path, digests = tmp_path / "f", []
  other = np.random.default_rng(1).bytes(1 << 18)
  for whole in (
    content,
    content[:-1] + b"\xff",  # the last piece ends with the file
    b"\xff" + content[1:],
    content + b"\0",
    content[: 1 << 17] + other[1 << 17 :],
  ):
    path.write_bytes(whole)
    digests.append(of_file(path))
  assert len(set(digests)) == len(digests)
  path.write_bytes(content)
  assert of_file(path) == digests[0]


@pytest.mark.parametrize("damage", ["gone", "garbage", "flipped", "binary"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "last/metrics.jsonl"])
def test_metrics_never_decide_whether_a_run_goes_on(runs, stopped, damage, name):
  file = stopped / name
  if damage == "gone":
    file.unlink()
  elif damage == "flipped":
    flip(file, 0.5)
  else:
    file.write_bytes(b"{oops\n[]\n" if damage == "garbage" else b"\xff\0\n" * 9)
  assert main(["--resume", str(stopped)]) == 0
  assert same(adapter(stopped), adapter(runs / "whole"))
  timeless = [
    [{k: v for k, v in r.items() if k != "seconds"} for r in records(run)]
    for run in (stopped, runs / "whole")
  ]
  assert timeless[0] == timeless[1]


def test_a_run_whose_metrics_are_lost_altogether_goes_on(runs, stopped):
  """As of a run from before there was a copy beside the state."""
  for name in ("metrics.jsonl", "last/metrics.jsonl", "last/checksums.json"):
    (stopped / name).unlink()
  assert main(["--resume", str(stopped)]) == 0
  assert same(adapter(stopped), adapter(runs / "whole"))


def test_lines_that_are_no_records_are_passed_over(tmp_path):
  file = tmp_path / "metrics.jsonl"
  good = '{"step": 1, "loss": 2.0}'
  bad = ["", "null", "[1]", '{"loss": 1}', '{"step": "1"}', '{"step": 1, "loss": []}', "{" * 9999]
  file.write_text("\n".join([*bad, good, *bad, '{"step": 2, "loss": 1.0}', '{"step": 3, "lo']))
  assert [r["step"] for r in read_records(file, until=2)] == [1, 2]


# --- disks and signals ----------------------------------------------------------------------------


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
  done = []
  for name in ("fsync", "replace"):
    real = getattr(os, name)
    monkeypatch.setattr(os, name, lambda *a, n=name, real=real: (done.append(n), real(*a))[1])
  disk.write_whole(tmp_path / "a", "text")
  assert done == ["fsync", "replace", "fsync"] and (tmp_path / "a").read_text() == "text"

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="No space left"):
    disk.write_whole(tmp_path / "a", "other")
  assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "text")]


@pytest.mark.parametrize("save", [1, 2])
def test_a_full_disk_is_a_sentence_and_the_run_goes_on(
  files, runs, tmp_path, monkeypatch, capsys, save
):
  out, count, real = tmp_path / "out", 0, training_run.save_state

  def full(*given):
    nonlocal count
    count += 1
    if count == save:
      raise OSError(errno.ENOSPC, "No space left on device")
    return real(*given)

  with monkeypatch.context() as patch:
    patch.setattr(training_run, "save_state", full)
    assert main(arguments(files, out, *SHORT)) == 1
  said = capsys.readouterr().err
  assert said.startswith(f"error: {out}: nothing more can be written there (no space left on")
  assert f"--resume {out}" in said and said.count("\n") == 1
  again = arguments(files, out, *SHORT) if save == 1 else ["--resume", str(out)]
  assert main(again) == 0
  assert same(adapter(out), adapter(runs / "whole"))


def test_sighup_stops_after_the_step_unless_it_is_ignored():
  with CtrlC() as stop:
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.asked
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
  try:
    with CtrlC() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not stop.asked
  finally:
    signal.signal(signal.SIGHUP, before)
