"""What a run says of itself, and the names it understands."""

import io
import json
import re
import subprocess
import sys
import time
import types
from typing import Any

import numpy as np
import pytest

from optax_lowmem.qlora.data.batches import Batches, Row
from optax_lowmem.qlora.files import hub
from optax_lowmem.qlora.kinds import KINDS
from optax_lowmem.qlora.run import terminal
from optax_lowmem.qlora.run.arguments import parse
from optax_lowmem.qlora.run.settings import HELP, Settings
from optax_lowmem.qlora.run.spellings import ELSEWHERE, SPELLINGS, translated
from qlora_cases import SCRIPT, arguments, main, records
from test_finetune import refused


def test_what_a_run_says(files, tmp_path, capsys):
  out = tmp_path / "out"
  options = ["--eval-every", "4", "--steps", "8", "--rank", "2", "--targets", "q_proj"]
  assert main(arguments(files, out, *options)) == 0
  printed = capsys.readouterr().out
  lines = {int(m[1]): m[0] for m in re.finditer(r"step (\d+)/8 · .*", printed)}
  steps = [r for r in records(out) if "loss" in r]
  assert list(lines) == list(range(1, 9))
  for record in steps:  # the step's own loss
    line = lines[record["step"]]
    assert f"loss {record['loss']:.3f} · lr {record['lr']:.1e} · gradient" in line
    assert f" · epoch {record['step'] * 4 / 57:.2f} · " in line  # 57 rows, 4 a step
  assert " left" in lines[4] and " left" not in lines[8]
  measured = [r for r in records(out) if "held_out_loss" in r and r["step"]]
  for record in measured:
    assert f"step {record['step']}: held-out loss {record['held_out_loss']:.3f}" in printed
  # q_proj of two layers of 64 x 64, at rank 2: what is packed counts as weights, not as codes.
  trained = 2 * 2 * (64 + 64)
  said = re.search(r"Model: model, ([\d,]+) parameters", printed)
  assert said is not None, printed
  whole = int(said[1].replace(",", ""))
  assert f"Trained: {trained:,} parameters, {trained / (trained + whole):.2%} of" in printed
  assert f"chat {out}" in printed and f"merge {out} --out {out}-merged" in printed


def test_something_is_said_before_jax_is_there(tmp_path):
  """By the script itself, before its imports."""
  command = [sys.executable, "-X", "importtime", SCRIPT, "plan", "--steps", "0"]
  begun = time.monotonic()
  with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
    before = []
    assert process.stderr is not None
    for line in process.stderr:
      if line.startswith("Starting"):
        break
      before.append(line)
    seconds = time.monotonic() - begun
    process.kill()
  assert not any(re.search(r"\| *(jax|numpy|flax|optax)\b", line) for line in before)
  assert seconds < 20, seconds  # 0.1 on a machine that has nothing else to do


@pytest.mark.parametrize("form", ["flags", "yaml"])
def test_names_of_other_trainers_are_understood(tmp_path, form):
  given = {
    "learning_rate": 3e-4,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 3,
    "gradient-accumulation-steps": 2,
    "lora_alpha": 8,
    "r": 4,
    "max_seq_length": 64,
    "use_dora": True,
    "target_modules": "q_proj",
  }
  if form == "yaml":
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in given.items()))
    s = parse("", ["--config", str(path)])
  else:
    flags = [f"--{k}" if v is True else f"--{k}={v}" for k, v in given.items()]
    s = parse("", flags)
  want = Settings(
    lr=3e-4, epochs=2, batch_size=3, grad_accum=2, alpha=8, rank=4, seq_len=64, dora=True,
    targets="q_proj", dtype=s.dtype, config=s.config,
  )  # fmt: skip
  assert s == want


def test_every_other_name_leads_to_a_setting_or_to_a_sentence(tmp_path, capsys):
  assert {*SPELLINGS.values()} <= {*HELP} and not {*SPELLINGS} & {*HELP}
  assert not {*ELSEWHERE} & ({*SPELLINGS} | {*HELP})
  for name in ELSEWHERE:
    for spelled in (f"--{name}", f"--{name.replace('_', '-')}=1"):
      with pytest.raises(ValueError, match=f"{spelled.partition('=')[0]}: "):
        translated([spelled], list(HELP))
    (tmp_path / "run.yaml").write_text(f"{name}: 1\n")
    with pytest.raises(ValueError, match=f"run.yaml: {name}: "):
      parse("", ["--config", str(tmp_path / "run.yaml")])
  (tmp_path / "run.yaml").write_text("lr: 1e-3\nlearning_rate: 1e-4\n")
  with pytest.raises(ValueError, match="learning_rate and another name for it, --lr"):
    parse("", ["--config", str(tmp_path / "run.yaml")])
  assert "use --dtype bfloat16" in refused(["--bf16"], capsys)


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"buckets": 3}])
def test_epochs_are_passes_over_the_rows(options):
  rng = np.random.default_rng(0)
  lengths = rng.integers(4, 30, 43)
  rows = [Row(np.full(n + 1, i + 5, np.int32), np.ones(n + 1, bool)) for i, n in enumerate(lengths)]
  batches = Batches(rows, 4, 2, 32, 0, 3, **options)
  steps = batches.steps(1)
  seen = np.unique(np.concatenate([batches.at(i).inputs.ravel() for i in range(steps)]))
  assert {*range(5, 48)} <= {*seen.tolist()}
  if options:
    assert batches.epochs(batches.steps(2)) >= 2 > batches.epochs(batches.steps(2) - 1)
  else:
    assert steps == 6 and batches.steps(2) == 11 and batches.steps(0.01) == 1
    assert np.isclose(batches.epochs(11), 11 * 8 / 43)


def test_a_run_of_epochs_is_one_of_as_many_steps(files, tmp_path, capsys):
  options = ["--epochs", "0.5", "--rank", "2", "--targets", "q_proj", "--batch-size", "8"]
  assert main(arguments(files, tmp_path / "a", *options)) == 0
  steps = [r["step"] for r in records(tmp_path / "a") if "loss" in r]
  assert steps[-1] == 4  # half of 57 rows, 8 a step
  settings = json.loads((tmp_path / "a" / "run.json").read_text())["settings"]
  assert settings["steps"] == 4 and settings["epochs"] == 0
  resumed = ["--resume", str(tmp_path / "a"), "--epochs", "1"]
  assert main(resumed) == 0
  assert [r["step"] for r in records(tmp_path / "a") if "loss" in r][-1] == 8


def test_a_dry_run_reads_the_data(files, tmp_path, capsys):
  (tmp_path / "bad.json").write_text('[{"nonsense": 1}]')
  plan = ["plan", "--model", f"{files}/model", "--seq-len", "32"]
  assert "row 1 (line 1)" in refused([*plan, "--data", str(tmp_path / "bad.json")], capsys)


# A model of the hub -----------------------------------------------------------------------------


def test_a_name_of_the_hub_is_answered(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  said = refused(["--model", "org/tiny"], capsys)
  assert "hf download org/tiny --local-dir tiny" in said and "pip install huggingface_hub" in said
  assert "hub" not in refused(["--model", "a/b/c"], capsys)

  def unreachable(name, **_):
    raise ConnectionError("no network")

  fake: Any = types.ModuleType("huggingface_hub")
  fake.snapshot_download = unreachable
  monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
  said = refused(["--model", "org/tiny"], capsys)
  assert "could not be fetched" in said and "(no network)" in said and "hf download" in said


def test_a_name_of_the_hub_is_fetched(files, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  fake: Any = types.ModuleType("huggingface_hub")
  asked = []
  fake.snapshot_download = lambda name, **more: asked.append((name, more)) or f"{files}/model"
  monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
  options = ["--rank", "2", "--targets", "q_proj", "--steps", "1", "--model", "org/tiny"]
  assert main(arguments(files, tmp_path / "out", *options)) == 0
  assert [name for name, _ in asked] == ["org/tiny"]
  assert asked[0][1] == {"allow_patterns": hub.FILES}
  config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
  assert config["base_model_name_or_path"] == "org/tiny"
  settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
  assert settings["model"] == f"{files}/model"


def test_the_time_that_is_left():
  assert terminal._clock(59.6) == "0:01:00" and terminal._clock(3725) == "1:02:05"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as Python opens it, by locale
def test_a_question_that_is_not_utf8_is_passed_over(errors, files, monkeypatch, capsys):
  questions = io.BytesIO(b"caf\xe9\nsay 7\n")
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(questions, encoding="utf-8", errors=errors))
  talk = ["chat", f"{files}/model", "--max-tokens", "4", "--temperature", "0"]
  assert main(talk) == 0
  said, answer = capsys.readouterr().out.split("\n", 1)
  assert said == (
    r"(The question 'caf\udce9' holds bytes that are not UTF-8. Write it in that encoding; of a "
    "file, `iconv -f LATIN1 -t UTF-8` makes one.)"
  )
  monkeypatch.setattr(sys, "stdin", io.StringIO("say 7\n"))
  assert main(talk) == 0
  assert capsys.readouterr().out == answer and answer.strip()


def test_a_system_message_that_is_not_utf8_is_refused(files, capsys):
  said = refused(["chat", f"{files}/model", "--system", "caf\udce9"], capsys)
  assert r"--system 'caf\udce9' holds bytes that are not UTF-8. Write it in that encoding" in said


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.noun)
@pytest.mark.parametrize(("losses", "best"), [((2.0, 3.0), True), ((3.0, 2.0), False)])
def test_the_best_is_named_where_it_is_not_the_last(kind, losses, best, tmp_path):
  records = [{"step": i, "held_out_loss": loss} for i, loss in enumerate((9.0, *losses))]
  (tmp_path / "best").mkdir()
  said = "\n".join(kind.results(tmp_path, records))
  assert said.count(" --best") == (2 + (kind.noun == "adapter") if best else 0), said
  assert ("The held-out loss was lowest, 2.000, at step 1" in said) == best
