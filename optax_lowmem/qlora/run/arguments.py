"""Settings from flags, from a YAML file, and from a run's record.

Flags go before the file named by ``--config``, which goes before the defaults.
"""

import argparse
import json
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

import jax

from optax_lowmem._arguments.spelling import did_you_mean
from optax_lowmem.qlora.files.yaml_files import read_yaml
from optax_lowmem.qlora.run.checks import check, check_masters, check_sort
from optax_lowmem.qlora.run.runs import resumed
from optax_lowmem.qlora.run.settings import (
  CHOICES,
  FULL,
  HELP,
  READ,
  Settings,
  default_of,
  flag_of,
  type_of,
)
from optax_lowmem.qlora.run.spellings import instead, known_as, translated


def parse(description: str, argv: Sequence[str] | None = None, prog: str | None = None) -> Settings:
  """The settings of a run, checked.

  Raises:
    ValueError, OSError: with a sentence for the user.
  """
  return settings_of(given(parser_of(description, prog), argv))


def parser_of(description: str, prog: str | None = None) -> argparse.ArgumentParser:
  """A parser with a flag for each setting; what is not given is absent from what it returns."""
  parser = _Parser(
    prog=prog, description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  for each in fields(Settings):
    flag, default, kind = flag_of(each.name), default_of(each), type_of(each)
    text = HELP[each.name] + (f" (default: {default})" if default not in (None, {}, []) else "")
    if kind is bool:
      parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    else:
      reader = _with_reason(READ[each.name]) if each.name in READ else _reader(kind)
      parser.add_argument(flag, type=reader, choices=CHOICES.get(each.name), help=text)
  return parser


def given(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> dict[str, Any]:
  """What a command line says, under the names that settings have here.

  Raises:
    ValueError: for a setting of another trainer that has no counterpart.
  """
  words = sys.argv[1:] if argv is None else argv
  return vars(parser.parse_args(translated(words, list(HELP))))


def settings_of(given: dict[str, Any]) -> Settings:
  """The settings, of flags, of the YAML file and the run that they name, and checked.

  Raises:
    ValueError, OSError: with a sentence for the user.
  """
  of_masters = "masters" in given  # of a file not the default, which that of a run in float32 has
  given = with_file(given)
  if given.get("dtype") == "auto":
    given["dtype"] = _automatic_dtype()
  saved = {}
  if given.get("resume"):
    folder = Path(given["resume"])
    saved = of_record(resumed(folder, given, set(HELP)), folder / "run.json")
  settings = Settings(**saved | given)
  for name in FULL.keys() - (saved | given).keys() if settings.full else ():
    setattr(settings, name, FULL[name])
  check_sort(settings, list(given))
  check(settings)
  if settings.dtype == "auto":
    settings.dtype = _automatic_dtype()
  if of_masters or given.get("masters", Settings.masters) != Settings.masters:
    check_masters(settings)
  return settings


def with_file(given: dict[str, Any]) -> dict[str, Any]:
  """What was given, and what the YAML file says that it names, if it names one.

  Raises:
    ValueError, OSError: as `from_yaml`.
  """
  return from_yaml(Path(given["config"])) | given if given.get("config") else given


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line, without the names of all settings before it."""

  def error(self, message: str) -> NoReturn:
    if re.match(r"unrecognized arguments: [^-]", message):
      message += ". What is several has commas between, as --targets q_proj,v_proj"
    self.exit(2, f"error: {message}. --help lists the settings.\n")


def _automatic_dtype() -> str:
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def from_yaml(path: Path) -> dict[str, Any]:
  """The settings in a YAML file.

  Raises:
    FileNotFoundError: where there is none.
    ValueError: for a file that is not a mapping of known names to values that fit them.
  """
  try:
    content = read_yaml(path)
  except (ValueError, OSError) as error:
    raise type(error)(f"--config {error}") from error
  if not isinstance(content, dict):
    raise ValueError(f"--config {path} must hold lines such as `rank: 16`.")
  known, settings = {each.name: each for each in fields(Settings)}, {}
  known.pop("config")
  for key, value in content.items():
    name = known_as(str(key))
    if why := instead(str(key)):
      raise ValueError(f"--config {path}: {key}: {why}.")
    if name in settings:
      raise ValueError(
        f"--config {path}: {key} and another name for it, {flag_of(name)}; keep one."
      )
    if name == "config":
      raise ValueError(
        f"--config {path}: {key}: a file names no other. Put all settings into one, and what is to "
        "go before it on the command line."
      )
    if name not in known:
      hint = did_you_mean(name, known)
      raise ValueError(f"--config {path}: there is no setting {key!r:.100}.{hint}")
    try:
      settings[name] = _converted(known[name], value)
    except (ValueError, TypeError) as error:
      raise ValueError(f"--config {path}: {key}: {value!r:.200} {error}.") from error
    if name in CHOICES and settings[name] not in CHOICES[name]:
      raise ValueError(f"--config {path}: {key} must be one of {', '.join(CHOICES[name])}.")
  return settings


def of_record(settings: Mapping[str, Any], file: Path) -> dict[str, Any]:
  """The settings in a run's record, those that there still are.

  Raises:
    ValueError: where one is of another kind than its setting.
  """
  kinds = {each.name: each for each in fields(Settings)}
  converted = {}
  for name, value in settings.items():
    if name in kinds:
      try:
        converted[name] = _converted(kinds[name], value)
      except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {name} {value!r:.100} {error}.") from error
  return converted


def _with_reason(read: Callable[[Any], Any]) -> Callable[[str], Any]:
  """A reader of a flag's text whose error argparse prints."""

  def told(text: str) -> Any:
    try:
      return read(text)
    except ValueError as error:
      raise argparse.ArgumentTypeError(f"{text!r:.200} {error}") from error

  return told


def _reader(kind: Any) -> Callable[[str], Any]:
  """Makes a flag's text a value: `a,b` a list, `a=1,b=2` or JSON a mapping."""
  if typing.get_origin(kind) is list:
    return lambda text: [part.strip() for part in text.split(",") if part.strip()]
  if typing.get_origin(kind) is dict:
    number = typing.get_args(kind)[1]

    def pairs(text: str) -> dict[str, Any]:
      try:
        if text.lstrip().startswith("{"):
          return {str(k): _number(number, v) for k, v in json.loads(text).items()}
        cut = [part.rpartition("=") for part in text.split(",") if part.strip()]
        return {name.strip(): _number(number, value) for name, _, value in cut}
      except (ValueError, AttributeError, RecursionError) as error:
        raise argparse.ArgumentTypeError(
          f"{text!r} must be like q_proj=8,down_proj=32, or JSON ({error})"
        ) from error

    return pairs
  return kind


def _converted(each: "Field[Any]", value: Any) -> Any:
  """A value of YAML as the setting wants it; YAML reads 1e-3 as a text."""
  if each.name in READ:
    return READ[each.name](value)
  kind: Any = type_of(each)
  optional = default_of(each) is None
  if value is None and (optional or typing.get_origin(kind)):
    return default_of(each)
  if typing.get_origin(kind) is dict:
    if not isinstance(value, Mapping):
      raise ValueError("is not a mapping of names to numbers")
    number = typing.get_args(kind)[1]
    return {str(name): _number(number, n) for name, n in value.items()}
  if typing.get_origin(kind) is list:
    return [str(part) for part in value] if isinstance(value, list) else _reader(kind)(str(value))
  if kind is bool:
    if not isinstance(value, bool):
      raise ValueError("is neither true nor false")
    return value
  return _number(kind, value)


def _number(kind: Any, value: Any) -> Any:
  """A value as a number (or text) of that kind; 8.7 is no int, and true is none."""
  text = f"is not {'an' if kind is int else 'a'} {kind.__name__}"
  if isinstance(value, (bool, list, dict)) or (kind is int and isinstance(value, float)):
    raise ValueError(text)
  try:
    return kind(value)
  except (ValueError, TypeError, OverflowError) as error:
    raise ValueError(text) from error
