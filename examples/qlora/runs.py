"""The folder of a run: where it is, what stands in it, and how it is found again.

::

    run.json       the settings, and the SHA-256 of the data; --resume reads it
    config.yaml    the settings, for people and for --config
    metrics.jsonl  what was measured, a line each time
    adapter/       the adapter at the end of the run, in PEFT's format
    last/          the newest adapter, and what --resume needs beside it
    best/          the adapter with the lowest held-out loss
    loss.png, summary.json, tensorboard/
"""

import datetime
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
  from arguments import Settings

# What a resumed run may change; everything else would make it another run.
CHANGEABLE = {
  "model",
  "data",
  "config",
  "steps",
  "epochs",
  "out",
  "resume",
  "save_every",
  "stop_after",
}
CHANGEABLE |= {"dry_run", "tensorboard"}


def read_run(folder: Path) -> dict[str, Any]:
  """What run.json of a run holds.

  Raises:
    FileNotFoundError: where there is no run.
    ValueError: where run.json is damaged.
  """
  file = folder / "run.json"
  if not file.is_file():
    raise FileNotFoundError(f"{folder}: there is no run in that folder (no run.json).")
  try:
    content = json.loads(file.read_text("utf-8"))
    known = {name: content.get(name) for name in ("data_sha256", "today")}
    return known | {"settings": dict(content["settings"])}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{folder}: run.json is damaged ({error}).") from error


def resumed(folder: Path, given: dict[str, Any], known: set[str]) -> dict[str, Any]:
  """The saved run's settings, after making sure that none of them is contradicted."""
  try:
    saved = read_run(folder)["settings"]
  except (ValueError, OSError) as error:
    raise type(error)(f"--resume {error}") from error
  saved = {name: value for name, value in saved.items() if name in known}
  for name, value in given.items():
    if name not in CHANGEABLE and saved.get(name) != value:
      raise ValueError(
        f"--{name.replace('_', '-')} {value} contradicts the run in {folder}, which has "
        f"{saved.get(name)}. Leave it out to continue that run, or start a new one."
      )
  return saved | {"out": str(folder), "stop_after": 0, "dry_run": False}


def output_folder(s: "Settings") -> Path:
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


def make_folder(out: Path) -> None:
  """Makes the folder and tries to write to it.

  Raises:
    OSError: where that cannot be.
  """
  try:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
      pass
  except OSError as error:
    raise OSError(
      f"--out {out}: nothing can be written there ({error.strerror}). Choose another folder."
    ) from error


def _occupied(path: Path) -> bool:
  return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def began(folder: Path) -> datetime.date | None:
  """The day on which a run began, which Llama 3's template writes; None where it was not kept.

  Raises:
    FileNotFoundError: where there is no run.
    ValueError: where run.json is damaged.
  """
  day = read_run(folder)["today"]
  try:
    return None if day is None else datetime.date.fromisoformat(day)
  except (ValueError, TypeError) as error:
    raise ValueError(f"{folder}: run.json is damaged ({error}).") from error


def save_settings(
  s: "Settings", out: Path, data_sha256: str, today: datetime.date | None = None
) -> None:
  """Writes run.json and config.yaml, from which the run can be resumed and repeated."""
  settings = asdict(s) | {"resume": None, "config": None}
  for name in ("model", "data"):  # so that it can be resumed from anywhere
    settings[name] = str(Path(path).resolve()) if (path := settings[name]) else None
  record = {"settings": settings, "data_sha256": data_sha256}
  record["today"] = (today or datetime.date.today()).isoformat()
  write_whole(out / "run.json", json.dumps(record, indent=2) + "\n")
  once = {"config", "resume", "out", "stop_after", "dry_run"}
  repeatable = {name: value for name, value in settings.items() if name not in once}
  write_whole(out / "config.yaml", yaml.safe_dump(repeatable, sort_keys=False))


def check_same_data(folder: Path, data_sha256: str, data: Path) -> None:
  """Raises ValueError where the resumed run saw other data."""
  if read_run(folder)["data_sha256"] != data_sha256:
    raise ValueError(
      f"{data} is not the data of the run in {folder} (another SHA-256). Name the same file "
      "with --data, or start a new run."
    )


def write_whole(path: Path, text: str) -> None:
  """Writes a file in one step: it is the old one or the new one, never half of it."""
  partial = path.with_name(path.name + ".partial")
  partial.write_text(text, encoding="utf-8")
  partial.replace(path)
