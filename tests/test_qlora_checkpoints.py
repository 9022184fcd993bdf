"""A run that is killed goes on as if it had not been."""

import collections
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file

import optax_lowmem as lowmem
from optax_lowmem.qlora.commands import training_run
from optax_lowmem.qlora.run import checkpoints
from optax_lowmem.qlora.training.step import State
from qlora_cases import SCRIPT, adapter, arguments, main, records, same


class Killed(BaseException):
  """What stands for a process that ends between two instructions."""


@pytest.mark.parametrize("at", range(1, 8))
def test_a_checkpoint_is_whole_wherever_its_writing_is_cut_off(tmp_path, monkeypatch, at):
  folder, calls = tmp_path / "last", -100

  def write(content):
    with checkpoints.replacing(folder) as new:
      (new / "a").write_text(content)
      counted()
      (new / "b").write_text(content)

  def counted():
    nonlocal calls
    calls += 1
    if calls == at:
      raise Killed

  def before(function):
    def wrapper(*args, **kwargs):
      counted()
      return function(*args, **kwargs)

    return wrapper

  write("old")
  calls = 0
  for module, name in ((os, "replace"), (os, "fsync"), (checkpoints.shutil, "rmtree")):
    monkeypatch.setattr(module, name, before(getattr(module, name)))
  try:
    write("new")
  except Killed:
    pass
  calls = 100
  for expected in ({"old", "new"}, {"newer"}):
    found = checkpoints.found(folder)
    content = {path.read_text() for path in found.iterdir()}
    assert len(content) == 1 and content <= expected and len(list(found.iterdir())) == 2
    write("newer")
  assert [path.name for path in tmp_path.iterdir()] == ["last"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_a_random_step_and_resumed_is_bit_for_bit_the_same(files, tmp_path, number):
  # Far more steps than the last after which it is killed: a run that has ended cannot be.
  options = "--steps 80 --dropout 0.2 --grad-accum 2 --batch-size 2 --rank 64 --packing".split()
  options += "--save-every 2 --eval-every 4 --targets q_proj".split()
  assert main(arguments(files, tmp_path / "whole", *options)) == 0
  seed = random.SystemRandom().randrange(1 << 32)
  print("seed", seed)  # shown where the test fails
  after, out = random.Random(seed).randrange(1, 20), tmp_path / "killed"
  script = SCRIPT
  with subprocess.Popen(
    [sys.executable, script, *arguments(files, out, *options)],
    stdout=subprocess.DEVNULL,
    env=os.environ | {"PYTHONPATH": str(Path(lowmem.__file__).parents[1])},
  ) as process:
    deadline = time.monotonic() + 240
    while not (out / "metrics.jsonl").exists() or len(records_so_far(out)) < after:
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.002)
    process.send_signal(number)
  assert process.returncode == (-number if number == signal.SIGKILL else 130)
  assert main(["--resume", str(out)]) == 0
  assert same(adapter(tmp_path / "whole"), adapter(out))
  for name in ("last/state", "last/adapter_model", "best/adapter_model"):
    states = [load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "killed")]
    assert same(*states), name
  timeless = [
    [{k: v for k, v in r.items() if k != "seconds"} for r in records(tmp_path / run)]
    for run in ("whole", "killed")
  ]
  assert timeless[0] == timeless[1]


def records_so_far(folder):
  return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_state_comes_back_to_the_memory_it_was_in(tmp_path, name):
  params = {"w": jnp.linspace(-1, 1, 1 << 20).reshape(1024, 1024), "b": jnp.ones(3)}
  tx = lowmem.create(name, 1e-2)
  _, state = tx.update(params, tx.init(params), params)
  tree = {"state": state, "key": jax.random.key(3), "count": jnp.int32(5)}
  checkpoints.save_state(tmp_path / "s.safetensors", tree, 7)
  fresh = {"state": tx.init(params), "key": jax.random.key(0), "count": jnp.int32(0)}
  got, step = checkpoints.load_state(tmp_path / "s.safetensors", fresh)
  assert step == 7
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
    assert a.sharding == b.sharding and a.dtype == b.dtype and (a == b).all()
  kinds = {x.sharding.memory_kind for x in jax.tree.leaves(got["state"])}
  assert ("pinned_host" in kinds) == (name == "paged_adamw_8bit")


def test_the_state_of_a_run_from_before_all_parameters_could_be_trained(tmp_path):
  """What is trained was called `lora`."""
  before = collections.namedtuple("State", ("lora", "opt_state", "rngs"))
  arrays = {"q": {"lora_a": jnp.arange(6.0)}}, (jnp.int32(3), jnp.ones(4)), {}
  checkpoints.save_state(tmp_path / "s.safetensors", before(*arrays), 7)
  fresh = jax.tree.map(jnp.zeros_like, State(*arrays))
  got, step = checkpoints.load_state(tmp_path / "s.safetensors", fresh)
  assert step == 7 and jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), got, State(*arrays)))
  other = fresh._replace(trained={"lora": jnp.zeros(6)})
  with pytest.raises(ValueError, match=r"\.trained\['lora'\] is missing"):
    checkpoints.load_state(tmp_path / "s.safetensors", other)


def test_the_room_that_folders_take(tmp_path):
  """What is new, and the largest once more; nothing for what is there already."""
  sizes = {tmp_path / "last": 7, tmp_path / "model": 4, tmp_path / "best": 4}
  assert checkpoints.room(sizes) == 22
  (tmp_path / "last.old").mkdir()  # killed while it was being replaced
  (tmp_path / "best").mkdir()
  assert checkpoints.room(sizes) == 11
  (tmp_path / "model").mkdir()
  assert checkpoints.room(sizes) == 7


def test_the_best_adapter_is_kept_and_patience_ends_the_run(files, tmp_path):
  """At a learning rate that ruins the model, the first measurements are the best."""
  options = "--steps 30 --eval-every 2 --patience 2 --lr 2.0 --warmup 0 --schedule constant"
  options += " --targets q_proj"
  assert main(arguments(files, tmp_path / "out", *options.split())) == 0
  measured = [r for r in records(tmp_path / "out") if "held_out_loss" in r and r["step"]]
  losses = [r["held_out_loss"] for r in measured]
  best = losses.index(min(losses))
  assert best == len(losses) - 3 and measured[-1]["step"] < 30
  again = [*options.split(), "--stop-after", str(measured[best]["step"])]
  assert main(arguments(files, tmp_path / "again", *again)) == 0
  kept = load_file(tmp_path / "out/best/adapter_model.safetensors")
  assert same(kept, adapter(tmp_path / "again"))
  assert not same(kept, adapter(tmp_path / "out"))


SHORT = "--steps 2 --targets q_proj --save-every 0".split()


def test_a_run_continued_elsewhere_can_be_killed_at_once(files, tmp_path, monkeypatch):
  whole, first, second = (tmp_path / name for name in "abc")
  assert main(arguments(files, whole, *SHORT)) == 0
  assert main(arguments(files, first, *SHORT, "--stop-after", "1")) == 0
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(training_run.Steps, "ready", lambda *_: (_ for _ in ()).throw(Killed))
    main(["--resume", str(first), "--out", str(second)])
  assert main(["--resume", str(second)]) == 0
  assert same(adapter(whole), adapter(second))


def test_a_run_killed_before_its_results_writes_them_and_no_run_is_done_twice(
  files, tmp_path, capsys
):
  patient = "--steps 4 --eval-every 1 --patience 1 --lr 5.0 --warmup 0 --schedule constant".split()
  for out, more in ((tmp_path / "a", SHORT), (tmp_path / "b", [*SHORT, *patient])):
    assert main(arguments(files, out, *more)) == 0
    before, end = adapter(out), records(out)
    for name in ("summary.json", "loss.png"):
      (out / name).unlink()
    assert main(["--resume", str(out)]) == 0
    assert same(adapter(out), before) and records(out) == end
    assert (out / "summary.json").exists() and (out / "loss.png").exists()
    capsys.readouterr()
    with pytest.raises(SystemExit):
      main(["--resume", str(out)])
    assert ("--patience 1 ended it" if "--patience" in more else "done already") in (
      capsys.readouterr().err
    )
