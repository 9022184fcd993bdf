"""What stands in the folder of a run, and how a run is found again.

::

    run.json       the settings, the chat template that was found, and checksums of data and base
                   model; --resume reads it
    config.yaml    the settings, for people and for --config
    metrics.jsonl  what was measured, a line each time; nothing depends on it
    adapter/       the adapter at the end of the run, in PEFT's format; or, with --full,
    model/         the model
    last/          the newest adapter or model, and what --resume needs beside it
    best/          the one with the lowest held-out loss
    loss.png, summary.json, tensorboard/
"""

import datetime
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from optax_lowmem.qlora.files.disk import write_whole
from optax_lowmem.qlora.run.run_folder import is_unfinished
from optax_lowmem.qlora.run.settings import CHANGEABLE, ONLY, Settings, flag_of, text_of, trained_by

_KEYS = ("data_sha256", "today", "base", "template")


def read_run(folder: Path) -> dict[str, Any]:
  """What run.json of a run holds.

  Raises:
    FileNotFoundError: where there is no run.
    ValueError: where run.json is damaged.
  """
  file = folder / "run.json"
  if not file.is_file():
    hint = ""
    if folder.is_dir() and is_unfinished(folder):
      hint = " It was stopped before its first save; begin it again with the same --out."
    raise FileNotFoundError(f"{folder}: there is no run in that folder (no run.json).{hint}")
  try:
    content = json.loads(file.read_text("utf-8"))
    if content.keys() - {*_KEYS, "settings", "sha256"}:
      raise ValueError("it holds a key that no run writes")
    if "sha256" in content and _sum(content) != content["sha256"]:
      raise ValueError("its content does not give the SHA-256 that stands in it")
    return {name: content.get(name) for name in _KEYS} | {"settings": dict(content["settings"])}
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise ValueError(
      f"{file} is damaged ({error}). Copy it from where it is whole, or start a new run with "
      "--config config.yaml of that folder."
    ) from error


def _sum(record: dict[str, Any]) -> str:
  rest = {name: value for name, value in record.items() if name != "sha256"}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def resumed(folder: Path, given: dict[str, Any], known: set[str]) -> dict[str, Any]:
  """The saved run's settings, after making sure that none of them is contradicted."""
  try:
    saved = read_run(folder)["settings"]
  except (ValueError, OSError) as error:
    raise type(error)(f"--resume {error}") from error
  saved = {name: value for name, value in saved.items() if name in known}
  for name, value in given.items():
    before = saved.get(name)
    if name not in CHANGEABLE and before != value and before != _as_before(name, value):
      raise ValueError(
        f"{flag_of(name)} {text_of(value)} contradicts the run in {folder}, which has "
        f"{text_of(before) or 'none'}. Leave it out to continue that run, or start a new one."
      )
  return saved | {"out": str(folder), "stop_after": 0, "dry_run": False}


def _as_before(name: str, value: Any) -> Any:
  """A value as runs had it once: several targets were one pattern."""
  return "|".join(value) if name == "targets" and isinstance(value, list) else value


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
    raise ValueError(f"{folder / 'run.json'} is damaged ({error}).") from error


def save_settings(
  s: Settings,
  out: Path,
  data_sha256: str,
  today: datetime.date | None = None,
  base: dict[str, str] | None = None,
  template: str | None = None,
) -> None:
  """Writes run.json and config.yaml, from which the run can be resumed and repeated."""
  settings = asdict(s) | {"resume": None, "config": None}
  for name in ("model", "data"):  # so that it can be resumed from anywhere
    settings[name] = str(Path(path).resolve()) if (path := settings[name]) else None
  record = {"settings": settings, "data_sha256": data_sha256}
  record["today"] = (today or datetime.date.today()).isoformat()
  if base is not None:
    record["base"] = base
  if template is not None:  # what --chat-template auto has found
    record["template"] = template
  record["sha256"] = _sum(record)
  write_whole(out / "run.json", json.dumps(record, indent=2) + "\n")
  once = {"config", "resume", "out", "stop_after", "dry_run"}
  other = {name for name, kind in ONLY.items() if kind != trained_by(s)}
  repeatable = {name: value for name, value in settings.items() if name not in once | other}
  write_whole(out / "config.yaml", yaml.safe_dump(repeatable, sort_keys=False))


def check_same_data(folder: Path, data_sha256: str, data: Path) -> None:
  """Raises ValueError where the resumed run saw other data."""
  if read_run(folder)["data_sha256"] != data_sha256:
    raise ValueError(
      f"{data} is not the data of the run in {folder} (another SHA-256). Name the same file "
      "with --data, or start a new run."
    )
