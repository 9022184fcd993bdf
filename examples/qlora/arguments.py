"""The arguments of finetune.py: their defaults, their checks, and what a resumed run keeps."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax


@dataclass
class Settings:
  """All of a run's arguments. The defaults are those of the run without arguments."""

  model: str | None = None
  data: str | None = None
  steps: int = 80
  batch_size: int = 4
  grad_accum: int = 1
  seq_len: int = 128
  rank: int = 16
  alpha: float = 32.0
  dropout: float = 0.0
  targets: str = "[qkvo]_proj|gate_proj|up_proj|down_proj"
  quantize: str = "nf4"
  dtype: str = "auto"
  lr: float = 1e-3
  schedule: str = "cosine"
  warmup: int | None = None
  max_grad_norm: float = 1.0
  optim: str = "adamw_8bit"
  seed: int = 0
  out: str | None = None
  resume: str | None = None
  eval_every: int = 0
  eval_batches: int = 16
  save_every: int = 50
  stop_after: int = 0
  dry_run: bool = False


# What a resumed run may change; everything else would make it another run.
CHANGEABLE = {"model", "data", "steps", "out", "resume", "save_every", "stop_after", "dry_run"}

HELP = {
  "model": "Hugging Face directory or GGUF file (default: SmolLM2-135M-Instruct, by pip)",
  "data": "Alpaca JSON, chat messages as JSONL, or plain text (default: Chit-Chat, by pip)",
  "steps": "training steps",
  "batch_size": "rows a forward pass",
  "grad_accum": "forward passes a step",
  "seq_len": "tokens a row; longer rows are cut",
  "rank": "rank of the adapters",
  "alpha": "the adapters are scaled by alpha / rank",
  "dropout": "dropout in the adapters",
  "targets": "layers to adapt, a regular expression for their names or full paths",
  "quantize": "how the base model's linear layers are held",
  "dtype": "dtype of everything else in the base model, and of its arithmetic; auto is float32 "
  "on a CPU, bfloat16 elsewhere",
  "lr": "peak learning rate",
  "schedule": "what follows the warmup: constant, or a fall to 0",
  "warmup": "steps in which the learning rate rises from 0 (default: a twentieth of the steps)",
  "max_grad_norm": "clip gradients to this norm; 0 does not",
  "optim": "optimizer, by the names of optax_lowmem.create",
  "seed": "of the adapters, the order of the rows, and dropout",
  "out": "folder for the results, new or empty (default: qlora-out, or qlora-out-2, ...)",
  "resume": "folder of a run to continue; its other arguments are kept",
  "eval_every": "measure the held-out loss every so many steps too; 0: only first and last",
  "eval_batches": "held-out batches to measure",
  "save_every": "save the training state every so many steps; 0: only at the end",
  "stop_after": "stop at this step, as if by Ctrl-C, to be continued with --resume; 0: do not",
  "dry_run": "print shapes and memory; load no weights, train nothing",
}
CHOICES = {
  "quantize": ("nf4", "none"),
  "dtype": ("auto", "float32", "bfloat16"),
  "schedule": ("constant", "linear", "cosine"),
}


def parse(description: str, argv: Sequence[str] | None = None) -> Settings:
  """The settings of a run, checked.

  Raises:
    ValueError, OSError: with a sentence for the user.
  """
  parser = argparse.ArgumentParser(
    description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False
  )
  for field in fields(Settings):
    name, default = field.name, field.default
    if name == "dry_run":
      parser.add_argument("--dry-run", action="store_true", help=HELP[name])
      continue
    text = HELP[name] + (f" (default: {default})" if default is not None else "")
    kind = type(default) if default is not None else int if name == "warmup" else str
    parser.add_argument(
      f"--{name.replace('_', '-')}", type=kind, choices=CHOICES.get(name), help=text
    )
  given = vars(parser.parse_args(argv))
  saved = _resumed(Path(given["resume"]), given) if "resume" in given else {}
  settings = Settings(**saved | given)
  check(settings)
  if settings.dtype == "auto":
    settings.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return settings


def _resumed(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
  """The saved run's settings, after making sure that none of them is contradicted."""
  file = folder / "run.json"
  if not file.is_file():
    raise FileNotFoundError(f"--resume {folder}: there is no run in that folder (no run.json).")
  try:
    saved = {k: v for k, v in json.loads(file.read_text("utf-8"))["settings"].items() if k in HELP}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"--resume {folder}: run.json is damaged ({error}).") from error
  for name, value in given.items():
    if name not in CHANGEABLE and saved.get(name) != value:
      raise ValueError(
        f"--{name.replace('_', '-')} {value} contradicts the run in {folder}, which has "
        f"{saved.get(name)}. Leave it out to continue that run, or start a new one."
      )
  return saved | {"out": str(folder), "stop_after": 0, "dry_run": False}


def check(s: Settings) -> None:
  """Raises ValueError for a setting no run can have."""
  least = {"steps": 1, "batch_size": 1, "grad_accum": 1, "seq_len": 2, "rank": 1}
  least |= {"eval_every": 0, "eval_batches": 1, "save_every": 0, "stop_after": 0, "seed": 0}
  for name, low in least.items():
    if (value := getattr(s, name)) < low:
      raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, got {value}.")
  for name in ("alpha", "lr"):
    if not (math.isfinite(value := getattr(s, name)) and value > 0):
      raise ValueError(f"--{name} must be a positive number, got {value}.")
  if not 0 <= s.dropout < 1:
    raise ValueError(f"--dropout must be at least 0 and less than 1, got {s.dropout}.")
  if not (math.isfinite(s.max_grad_norm) and s.max_grad_norm >= 0):
    raise ValueError(f"--max-grad-norm must be 0 or a positive number, got {s.max_grad_norm}.")
  if s.warmup is not None and not 0 <= s.warmup < s.steps:
    raise ValueError(
      f"--warmup must be at least 0 and less than --steps {s.steps}, got {s.warmup}."
    )
  if s.model is not None and not Path(s.model).exists():
    raise FileNotFoundError(f"--model {s.model}: there is no such file or directory.")
  if s.data is not None and not Path(s.data).is_file():
    raise FileNotFoundError(f"--data {s.data}: there is no such file.")


def output_folder(s: Settings) -> Path:
  """The folder to write to. A run never writes into a folder that holds something else.

  Raises:
    FileExistsError: where `--out` is a file or a folder with something in it.
  """
  if s.out is None:
    names = ["qlora-out"] + [f"qlora-out-{i}" for i in range(2, 1000)]
    return next(Path(name) for name in names if not _occupied(Path(name)))
  out = Path(s.out)
  if _occupied(out) and not (s.resume and out.resolve() == Path(s.resume).resolve()):
    hint = f", or continue that run with --resume {out}" if (out / "run.json").exists() else ""
    raise FileExistsError(f"--out {out} exists and is not empty. Choose another folder{hint}.")
  return out


def _occupied(path: Path) -> bool:
  return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def save_settings(s: Settings, out: Path, data_sha256: str) -> None:
  """Writes run.json, from which the run can be resumed."""
  settings = asdict(s) | {"resume": None}
  for name in ("model", "data"):  # so that it can be resumed from anywhere
    settings[name] = str(Path(path).resolve()) if (path := settings[name]) else None
  record = {"settings": settings, "data_sha256": data_sha256}
  (out / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def check_same_data(folder: Path, data_sha256: str, data: Path) -> None:
  """Raises ValueError where the resumed run saw other data."""
  before = json.loads((folder / "run.json").read_text("utf-8")).get("data_sha256")
  if before != data_sha256:
    raise ValueError(
      f"{data} is not the data of the run in {folder} (another SHA-256). Name the same file "
      "with --data, or start a new run."
    )
