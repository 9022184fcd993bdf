"""A run that has left something, as ``chat``, ``merge`` and ``export`` take it."""

import argparse
from pathlib import Path

from optax_lowmem.qlora.files.fetch import default_model
from optax_lowmem.qlora.run.arguments import of_record, settings_of
from optax_lowmem.qlora.run.called import called
from optax_lowmem.qlora.run.checkpoints import check_sealed, found
from optax_lowmem.qlora.run.runs import read_run
from optax_lowmem.qlora.run.settings import Settings
from optax_lowmem.qlora.run.terminal import say


def parser_of(command: str, description: str) -> argparse.ArgumentParser:
  """A command's arguments, with those that say which run, which adapter and where its base is."""
  parser = argparse.ArgumentParser(prog=called(command), description=description)
  parser.add_argument("run", type=Path, help="the run's folder")
  parser.add_argument("--best", action="store_true", help="the best it has saved, not the last")
  parser.add_argument("--model", type=Path, help="the base model, if it is not where it was")
  return parser


def of_run(
  run: Path, *, best: bool = False, model: Path | None = None
) -> tuple[Settings, Path, Path]:
  """The settings of a run, its base model (`model`, if given) and what it has trained.

  Of a run that has trained all parameters, what it has trained is in the place of the base.

  Raises:
    FileNotFoundError, ValueError: where there is no run, its model has moved, or it has left
      nothing yet.
  """
  s = Settings(**of_record(read_run(run)["settings"], run / "run.json"))
  saved = found(run / ("best" if best else "last"))
  if s.full:
    path = saved
  else:
    path = model or (Path(s.model) if s.model else default_model(say))
  if model is None and not s.full and not path.exists():
    raise FileNotFoundError(
      f"There is no model at {path}, where the run in {run} had it. If it has moved, name it with "
      "--model."
    )
  if not saved.is_dir():
    hint = " It is made by --eval-every, and at the end of a run." if best else ""
    raise FileNotFoundError(f"There is no {saved.name}/ in {run}.{hint}")
  check_sealed(saved)
  return s, path, saved


def of_run_or_model(
  run: Path, *, best: bool = False, model: Path | None = None
) -> tuple[Settings, Path, Path]:
  """As `of_run`; of a model, that model.

  Raises:
    ValueError: also for a base, or the best of several, where there is only a model.
  """
  lone = not (run / "run.json").exists() and ((run / "config.json").exists() or run.is_file())
  if lone and best:
    raise ValueError(f"--best is of a run's folder, and {run} is a model. Leave it out.")
  taken = (settings_of({"full": True}), run, run) if lone else of_run(run, best=best, model=model)
  if taken[0].full and model is not None:
    what = "is a model" if lone else "has trained all parameters"
    raise ValueError(f"--model {model} is the base of adapters, and {run} {what}. Leave it out.")
  return taken


def adapter_of(
  run: Path, command: str, *, best: bool = False, model: Path | None = None
) -> tuple[Settings, Path, Path]:
  """As `of_run`, for what is done with adapters.

  Raises:
    ValueError: also for a run that has left none.
  """
  s, path, saved = of_run(run, best=best, model=model)
  if s.full:
    raise ValueError(
      f"The run in {run} has trained all parameters: there is no adapter to {command}. Its model "
      f"is {run / 'model' if (run / 'model').is_dir() else saved}."
    )
  return s, path, saved
