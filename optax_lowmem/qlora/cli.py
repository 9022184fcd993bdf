"""``lowmem``: its commands, and what is said where one is unknown or an extra is missing."""

import importlib
import sys
from importlib.util import find_spec

from optax_lowmem._arguments.spelling import did_you_mean

# By name: the module, the function, and what it does. Modules are imported when they are asked for:
# together they take seconds, and need packages of the extra `qlora`.
_COMMANDS = {
  "finetune": ("finetune", "train", "train a language model: adapters on 4 bits, or all of it"),
  "plan": ("memory", "plan", "say what a run would hold in memory, and whether it fits"),
  "compare": ("memory", "compare", "say what optimizers hold for a model"),
  "recommend": ("recommend", "recommend", "say how to train a model in the memory there is"),
  "chat": ("chat", "talk", "talk to what a run has trained"),
  "merge": ("merge", "merge", "write a model without adapters, as Hugging Face loads it"),
  "export": ("export", "export", "write an adapter as llama.cpp takes it"),
}
_NEEDED = {
  "flax": "flax",
  "gguf": "gguf",
  "jinja2": "jinja2",
  "matplotlib": "matplotlib",
  "rich": "rich",
  "safetensors": "safetensors",
  "tokenizers": "tokenizers",
  "yaml": "pyyaml",
}


def main(argv: list[str] | None = None, default: str | None = None) -> int:
  """Runs a command; returns the process's exit status.

  Args:
    argv: the command and its arguments; by default those of the process.
    default: the command where none is named; None asks for one.
  """
  argv = sys.argv[1:] if argv is None else argv
  if argv and argv[0] in _COMMANDS:
    command, rest = argv[0], argv[1:]
  elif default is not None:
    command, rest = default, argv
  elif not argv or argv[0] in ("-h", "--help"):
    print(_usage())
    return 0
  elif argv[0] == "--version":
    from optax_lowmem import __version__

    print(__version__)
    return 0
  else:
    hint = did_you_mean(argv[0], _COMMANDS)
    print(f"error: {argv[0]!r} is no command.{hint}\n\n{_usage()}", file=sys.stderr)
    return 2
  # All of them, at once and at the start: some are imported when a run ends.
  missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
  if missing:
    what = f"{', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
    print(
      f"error: `lowmem {command}` needs {what}. Run `pip install 'optax_lowmem[qlora]'`.",
      file=sys.stderr,
    )
    return 1
  if default is None and not {"-h", "--help"} & {*rest}:
    print("Starting ...", file=sys.stderr, flush=True)  # some imports take seconds
  module, name, _ = _COMMANDS[command]
  run = getattr(importlib.import_module(f"optax_lowmem.qlora.commands.{module}"), name)
  try:
    return run(rest)
  except KeyboardInterrupt:
    print("Stopped at once; what was not saved yet is lost.", file=sys.stderr)
    return 130


def _usage() -> str:
  lines = [f"  {name:10} {what}" for name, (_, _, what) in _COMMANDS.items()]
  return "\n".join(
    ["usage: lowmem COMMAND ...", "", *lines, "", "`lowmem COMMAND --help` lists its arguments."]
  )
