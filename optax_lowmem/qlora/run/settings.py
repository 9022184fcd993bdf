"""The settings of a run: their defaults, their checks, and where they come from.

Flags go before the file named by ``--config``, which goes before the defaults.
"""

import argparse
import difflib
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import jax

from optax_lowmem.qlora.files.yaml_files import read_yaml
from optax_lowmem.qlora.models.attention import KINDS
from optax_lowmem.qlora.run.checks import check
from optax_lowmem.qlora.run.runs import resumed
from optax_lowmem.qlora.run.spellings import instead, known_as, translated


@dataclass
class Settings:
  """All of a run's settings. The defaults are those of the run without arguments."""

  model: str | None = None
  data: str | None = None
  config: str | None = None
  # data
  seq_len: int = 128
  packing: bool = False
  buckets: int = 0
  train_on_prompt: bool = False
  chat_template: str = "auto"
  # steps
  steps: int = 80
  epochs: float = 0.0
  batch_size: int = 4
  grad_accum: int = 1
  seed: int = 0
  devices: int = 0
  fsdp: bool = False
  # base model and adapters
  quantize: str = "nf4"
  dtype: str = "auto"
  attention: str = "auto"
  rank: int = 16
  alpha: float = 32.0
  dropout: float = 0.0
  targets: str = "([qkvo]|qkv|gate|up|gate_up|down)_proj"
  init: str = "default"
  adapter_dtype: str = "float32"
  rslora: bool = False
  dora: bool = False
  rank_pattern: dict[str, int] = field(default_factory=dict)
  alpha_pattern: dict[str, float] = field(default_factory=dict)
  modules_to_save: list[str] = field(default_factory=list)
  neftune_alpha: float = 0.0
  # optimizer
  optim: str = "adamw_8bit"
  lr: float = 1e-3
  lora_plus_ratio: float = 0.0
  schedule: str = "cosine"
  warmup: int | None = None
  weight_decay: float | None = None
  max_grad_norm: float = 1.0
  # results
  out: str | None = None
  resume: str | None = None
  eval_every: int = 0
  eval_batches: int = 16
  samples: int = 2
  patience: int = 0
  save_every: int = 50
  stop_after: int = 0
  tensorboard: bool = False
  dry_run: bool = False


HELP = {
  "model": "Hugging Face directory or GGUF file (default: SmolLM2-135M-Instruct, by pip)",
  "data": "JSON or JSONL of Alpaca, chat, ShareGPT or completion rows, or plain text "
  "(default: Chit-Chat, by pip)",
  "config": "a YAML file of these settings, named as the flags are; flags go before it",
  "seq_len": "tokens a row; longer rows are cut",
  "packing": "put several short rows into one sequence",
  "buckets": "pad rows to one of so many lengths, not all to --seq-len; 0: do not",
  "train_on_prompt": "learn the questions too, not only the answers",
  "chat_template": "how conversations are written; auto: as the model's own template says",
  "steps": "training steps",
  "epochs": "passes over the rows, in the place of --steps; 0: as many as --steps says",
  "batch_size": "rows a forward pass",
  "grad_accum": "forward passes a step",
  "seed": "of the adapters, the order of the rows, and dropout",
  "devices": "local devices to spread a batch's rows over; 0: all",
  "fsdp": "hold a part of the base model on each device, not a copy",
  "quantize": "how the base model's linear layers are held",
  "dtype": "dtype of everything else in the base model, and of its arithmetic; auto is float32 "
  "on a CPU, bfloat16 elsewhere",
  "attention": "chunked: in memory that grows with --seq-len, not with its square; xla: all scores "
  "of a layer at once; cudnn: NVIDIA's kernel, without --packing; auto: chunked",
  "rank": "rank of the adapters",
  "alpha": "the adapters are scaled by alpha / rank",
  "dropout": "dropout in the adapters",
  "targets": "layers to adapt, a regular expression for their names or full paths; all-linear is "
  "every linear layer but the head",
  "init": "how adapters start",
  "adapter_dtype": "dtype of the adapters and their gradients; bfloat16 halves both, and rounds "
  "away updates of less than 1/512 of a value, so it wants a higher --lr",
  "rslora": "scale the adapters by alpha / sqrt(rank)",
  "dora": "train the magnitude of the weights apart from their direction",
  "rank_pattern": "ranks of some layers, such as q_proj=8,down_proj=32, or JSON",
  "alpha_pattern": "alphas of some layers, the same way",
  "modules_to_save": "modules to train whole, such as lm_head,embed_tokens",
  "neftune_alpha": "noise on the embeddings in training, 5 for example; 0: none",
  "optim": "optimizer, by the names of optax_lowmem.create",
  "lr": "peak learning rate",
  "lora_plus_ratio": "learning rate of the second factors over that of the first; 0: the same",
  "schedule": "what follows the warmup: constant, or a fall to 0",
  "warmup": "steps in which the learning rate rises from 0 (default: a twentieth of the steps)",
  "weight_decay": "the optimizer's weight decay (default: the optimizer's own)",
  "max_grad_norm": "clip gradients to this norm; 0 does not",
  "out": "folder for the results, new or empty (default: qlora-out, or qlora-out-2, ...)",
  "resume": "folder of a run to continue; its other arguments are kept",
  "eval_every": "measure the held-out loss every so many steps too; 0: only first and last",
  "eval_batches": "held-out batches to measure",
  "samples": "held-out prompts to continue before and after; 0: none",
  "patience": "stop after so many measurements without a lower held-out loss; 0: never",
  "save_every": "save the training state every so many steps; 0: only at the end",
  "stop_after": "stop at this step, as if by Ctrl-C, to be continued with --resume; 0: do not",
  "tensorboard": "write TensorBoard's event files too",
  "dry_run": "print shapes and memory; load no weights, train nothing",
}
CHOICES = {
  "quantize": ("nf4", "fp4", "int8", "none"),
  "init": ("default", "gaussian", "pissa", "loftq"),
  "dtype": ("auto", "float32", "bfloat16"),
  "attention": KINDS,
  "adapter_dtype": ("float32", "bfloat16"),
  "schedule": ("constant", "linear", "cosine"),
  "chat_template": ("auto", "chatml", "llama-2", "llama-3", "mistral", "plain"),
}


def parse(description: str, argv: Sequence[str] | None = None, prog: str | None = None) -> Settings:
  """The settings of a run, checked.

  Raises:
    ValueError, OSError: with a sentence for the user.
  """
  parser = _Parser(
    prog=prog, description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  for each in fields(Settings):
    flag, default, kind = flag_of(each.name), default_of(each), kind_of(each)
    text = HELP[each.name] + (f" (default: {default})" if default not in (None, {}, []) else "")
    if kind is bool:
      parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    else:
      parser.add_argument(flag, type=_reader(kind), choices=CHOICES.get(each.name), help=text)
  words = sys.argv[1:] if argv is None else argv
  given = vars(parser.parse_args(translated(words, list(HELP))))
  if given.get("config"):
    given = from_yaml(Path(given["config"])) | given
  if given.get("dtype") == "auto":
    given["dtype"] = _automatic_dtype()
  saved = {}
  if given.get("resume"):
    folder = Path(given["resume"])
    saved = of_record(resumed(folder, given, set(HELP)), folder / "run.json")
  settings = Settings(**saved | given)
  check(settings)
  if settings.dtype == "auto":
    settings.dtype = _automatic_dtype()
  return settings


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line, without the names of all settings before it."""

  def error(self, message: str) -> NoReturn:
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
  for key, value in content.items():
    name = known_as(str(key))
    if why := instead(str(key)):
      raise ValueError(f"--config {path}: {key}: {why}.")
    if name in settings:
      raise ValueError(
        f"--config {path}: {key} and another name for it, {flag_of(name)}; keep one."
      )
    if name not in known or name == "config":
      near = difflib.get_close_matches(name, known, n=1)
      hint = f" Did you mean {near[0]!r}?" if near else ""
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


def flag_of(name: str) -> str:
  return f"--{name.replace('_', '-')}"


def default_of(each: "Field[Any]") -> Any:
  return each.default if each.default is not MISSING else each.default_factory()  # type: ignore


def kind_of(each: "Field[Any]") -> Any:
  """A setting's type, without the None it may be."""
  given = each.type
  if isinstance(given, types.UnionType):
    return next(t for t in typing.get_args(given) if t is not type(None))
  return given


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
  kind: Any = kind_of(each)
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
