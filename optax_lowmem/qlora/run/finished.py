"""A run that has left an adapter, as ``chat``, ``merge`` and ``export`` take it."""

import argparse
from pathlib import Path

from optax_lowmem.qlora.files.fetch import default_model
from optax_lowmem.qlora.run.arguments import of_record
from optax_lowmem.qlora.run.called import called
from optax_lowmem.qlora.run.checkpoints import check_sealed, found
from optax_lowmem.qlora.run.runs import read_run
from optax_lowmem.qlora.run.settings import Settings
from optax_lowmem.qlora.run.terminal import say


def parser_of(command: str, description: str) -> argparse.ArgumentParser:
  """A command's arguments, with those that say which run, which adapter and where its base is."""
  parser = argparse.ArgumentParser(prog=called(command), description=description)
  parser.add_argument("run", type=Path, help="the run's folder")
  parser.add_argument("--best", action="store_true", help="the best adapter, not the last")
  parser.add_argument("--model", type=Path, help="the base model, if it is not where it was")
  return parser


def of_run(
  run: Path, *, best: bool = False, model: Path | None = None
) -> tuple[Settings, Path, Path]:
  """The settings of a run, its base model (`model`, if given) and its adapter.

  Raises:
    FileNotFoundError, ValueError: where there is no run, its model has moved, or it has left no
      adapter yet.
  """
  s = Settings(**of_record(read_run(run)["settings"], run / "run.json"))
  path = model or (Path(s.model) if s.model else default_model(say))
  if model is None and not path.exists():
    raise FileNotFoundError(
      f"There is no model at {path}, where the run in {run} had it. If it has moved, name it with "
      "--model."
    )
  adapter = found(run / ("best" if best else "last"))
  if not adapter.is_dir():
    hint = " It is made by --eval-every, and at the end of a run." if best else ""
    raise FileNotFoundError(f"There is no {adapter.name}/ in {run}.{hint}")
  check_sealed(adapter)
  return s, path, adapter
