"""Every option of the script, in a run of a tiny model that shows what it does."""

import json
import struct
from dataclasses import fields

import numpy as np
import pytest
from safetensors.numpy import load_file

from optax_lowmem.qlora.run.settings import Settings, flag_of
from qlora_cases import LAYERS, adapter, arguments, main, records, same, save_model


@pytest.fixture(scope="module")
def files(files):
  save_model(files / "untied", tied=False)
  (files / "run.yaml").write_text("rank: 4\nsteps: 2\ntargets: q_proj\n")
  return files


def config(out):
  return json.loads((out / "adapter/adapter_config.json").read_text())


def plain(out, files, printed):
  """The table's first case: what was asked for is what the adapter says."""
  assert config(out)["r"] == 4 and config(out)["lora_alpha"] == 8
  assert config(out)["target_modules"] == ["q_proj"] and config(out)["lora_dropout"] == 0.25
  assert [r["lr"] for r in records(out) if "lr" in r] == pytest.approx([0.005, 0.01])
  assert "Sample 1" in printed and "Sample 2" not in printed


def variants(out, files, printed):
  c = config(out)
  assert c["use_dora"] and c["use_rslora"] and c["modules_to_save"] == ["lm_head"]
  assert "FP4" in printed
  assert "in 2 steps; this process took" in printed  # 0.14 of 57 rows, 4 a step
  assert sorted({*c["rank_pattern"].values()}) == [2] and {*c["alpha_pattern"].values()} == {3}
  tensors = adapter(out)
  ranks = {k.split(".")[-3]: v.shape[0] for k, v in tensors.items() if k.endswith("lora_A.weight")}
  assert ranks["down_proj"] == 2 and ranks["q_proj"] == 16 and len(ranks) == 7
  assert sum("lora_magnitude_vector" in name for name in tensors) == 7 * LAYERS
  base = load_file(files / "untied/model.safetensors")["lm_head.weight"]
  head = next(v for k, v in tensors.items() if "lm_head" in k)
  assert head.shape == base.shape and 0 < np.abs(head - base).max() < 0.1


def tensorboard(out, files, printed):
  curves = {}
  for path in (out / "tensorboard").glob("*tfevents*"):
    for name, step, value in events(path):
      curves.setdefault(name, {})[step] = value
  for name in ("loss", "grad_norm", "lr", "held_out_loss", "perplexity", "tokens", "seconds"):
    want = {r["step"]: r[name] for r in records(out) if name in r}
    assert curves[name] == pytest.approx(want, rel=1e-6), name
  measured = [r for r in records(out) if "perplexity" in r]
  assert all(r["perplexity"] == pytest.approx(np.exp(r["held_out_loss"])) for r in measured)
  assert [r["step"] for r in measured] == [0, 1, 2]


def events(path):
  """(name, step, value) of each scalar in an event file."""
  from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

  raw, at = path.read_bytes(), 0
  while at < len(raw):
    (length,) = struct.unpack_from("<Q", raw, at)
    event = Event.FromString(raw[at + 12 : at + 12 + length])
    at += 16 + length
    for value in event.summary.value:
      yield value.tag, event.step, value.simple_value


def paged(out, files, printed):
  """Two steps in one go are two steps with the state on disk in between, bit for bit."""
  again = [
    "--eval-every",
    "1",
    "--optim",
    "paged_adamw_8bit",
    "--rank",
    "64",
    "--targets",
    "q_proj",
    "--adapter-dtype",
    "bfloat16",
  ]
  halves = out.parent / "halves"
  argv = arguments(files, halves, "--steps", "2", *again, "--stop-after", "1")
  assert main(argv) == 0 and main(["--resume", str(halves)]) == 0
  assert same(adapter(out), adapter(halves))
  assert {value.dtype.name for value in adapter(out).values()} == {"bfloat16"}
  states = [load_file(folder / "last/state.safetensors") for folder in (out, halves)]
  assert same(*states) and any(x.dtype == np.uint8 for x in states[0].values())


def packed(out, files, printed):
  plain_tokens = 24 * 4  # a row has about 24 tokens, and 32 fit
  tokens = [r["tokens"] for r in records(out) if "tokens" in r]
  assert min(tokens) > 4 * 80 and min(tokens) > 2 * plain_tokens
  assert "plain template" in printed


def stopped(out, files, printed):
  assert "Stopped after step 1" in printed and "To go on" in printed
  assert (out / "last/state.safetensors").exists()


def planned(out, files, printed):
  assert "temporaries of a training step" in printed and not out.exists()


def alone(out, files, printed):
  assert "--fsdp: there is only one device" in printed


# Of each case: the options, and what to look at. The runs are short: two steps unless said.
CASES = {
  "numbers": (
    "--rank 4 --alpha 8 --targets q_proj --dropout 0.25 --lr 1e-2 --warmup 1 --schedule linear "
    "--seed 3 --samples 1 --grad-accum 2 --batch-size 2 --max-grad-norm 0.5 --weight-decay 0.1 "
    "--eval-batches 2 --devices 1 --optim adamw_32bit --attention xla",
    plain,
  ),
  "variants": (
    "--model {files}/untied --dora --rslora --init gaussian --rank-pattern down_proj=2 "
    "--alpha-pattern down_proj=3 --modules-to-save lm_head --lora-plus-ratio 4 "
    "--targets all-linear --quantize fp4 --optim lion_8bit --epochs 0.14",
    variants,
  ),
  "paged": (
    "--optim paged_adamw_8bit --rank 64 --targets q_proj --eval-every 1 --adapter-dtype bfloat16",
    paged,
  ),
  "pissa": ("--init pissa --quantize int8 --targets q_proj --optim adafactor", None),
  "loftq": ("--init loftq --optim came --fsdp", alone),
  "board": (
    "--tensorboard --eval-every 1 --patience 9 --save-every 1 --neftune-alpha 5 --buckets 2 "
    "--targets q_proj",
    tensorboard,
  ),
  "packing": (
    "--packing --seq-len 96 --chat-template plain --train-on-prompt --quantize none "
    "--dtype bfloat16 --targets q_proj",
    packed,
  ),
  "yaml": ("--config {files}/run.yaml --stop-after 1", stopped),
  "plan": ("--dry-run --packing --dora --optim paged_adamw_8bit", planned),
}
# test_qlora_checkpoints.py and test_finetune.py; test_qlora_full.py
ELSEWHERE = {"resume", "full", "masters", "update_in_backward"}


@pytest.mark.parametrize("name", CASES)
def test_options(files, tmp_path, capsys, name):
  options, look = CASES[name]
  out = tmp_path / "out"
  options = options.format(files=files).split()
  steps = [] if "--config" in options else ["--steps", "2"]
  argv = arguments(files, out)
  at = argv.index("--steps")
  argv = argv[:at] + argv[at + 2 :] + steps + options
  assert main(argv) == 0
  printed = capsys.readouterr().out
  if look:
    look(out, files, printed)
  if "--dry-run" not in options and "--stop-after" not in options:
    losses = [r["loss"] for r in records(out) if "loss" in r]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert all(np.isfinite(value).all() for value in adapter(out).values())
    assert any(np.abs(v).max() > 0 for k, v in adapter(out).items() if "lora_B" in k)


def test_every_option_is_in_a_case():
  used = {word for options, _ in CASES.values() for word in options.split()}
  used |= {"--model", "--data", "--out", "--steps", "--seq-len", "--batch-size"}
  missing = [f.name for f in fields(Settings) if flag_of(f.name) not in used]
  assert set(missing) == ELSEWHERE
