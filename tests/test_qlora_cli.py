"""``lowmem`` before a command begins: what there is, what was meant, what is missing."""

import importlib
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

import optax_lowmem
from optax_lowmem.qlora import cli

ROOT = pathlib.Path(optax_lowmem.__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def test_without_a_command_it_says_which_there_are(capsys):
  for argv in ([], ["--help"], ["-h"]):
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: lowmem COMMAND")
    for command in ("finetune", "plan", "chat", "merge", "export"):
      assert f"\n  {command} " in printed


def test_its_version(capsys):
  assert cli.main(["--version"]) == 0
  assert capsys.readouterr().out == f"{optax_lowmem.__version__}\n"


@pytest.mark.parametrize(
  ("typed", "meant"),
  [("finteune", "finetune"), ("mrege", "merge"), ("--resume", None), ("x", None)],
)
def test_of_an_unknown_command_the_nearest_is_named(typed, meant, capsys):
  assert cli.main([typed, "--lr", "1"]) == 2
  said = capsys.readouterr()
  first = said.err.splitlines()[0]
  hint = f" Did you mean {meant!r}?" if meant else ""
  assert first == f"error: {typed!r} is no command.{hint}"
  assert "usage: lowmem COMMAND" in said.err and not said.out


@pytest.mark.parametrize("command", ["finetune", "plan", "chat", "merge", "export"])
@pytest.mark.parametrize("gone", [["flax"], ["rich"], ["matplotlib"], ["gguf", "yaml"]])
def test_a_missing_package_is_one_sentence(command, gone, monkeypatch, capsys):
  """Before anything is imported or done: matplotlib is wanted when a run ends."""
  for name in gone:
    monkeypatch.setitem(sys.modules, name, None)
  monkeypatch.setattr(importlib, "import_module", None)
  assert cli.main([command, "run"]) == 1
  said = capsys.readouterr().err
  names = ", ".join("pyyaml" if name == "yaml" else name for name in gone)
  verb = "is" if len(gone) == 1 else "are"
  assert said == (
    f"error: `lowmem {command}` needs {names}, which {verb} not installed. Run "
    "`pip install 'optax_lowmem[qlora]'`.\n"
  )


def test_it_says_so_of_an_installation_without_flax():
  """As by `pip install optax_lowmem`, without an extra."""
  code = "import sys; sys.modules['flax'] = None; from optax_lowmem.qlora import cli; "
  code += "sys.exit(cli.main(['finetune']))"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT
  )
  assert done.returncode == 1 and done.stderr.count("\n") == 1
  assert "needs flax" in done.stderr and "pip install 'optax_lowmem[qlora]'" in done.stderr


def test_every_command_is_there():
  for module, name, _ in cli._COMMANDS.values():
    assert callable(getattr(importlib.import_module(f"optax_lowmem.qlora.commands.{module}"), name))


def test_what_is_needed_is_what_the_extra_installs():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  extras = project["optional-dependencies"]
  wanted = {r.partition(">=")[0] for r in extras["qlora"] + extras["flax"]}
  assert {*cli._NEEDED.values()} == wanted - {"optax_lowmem[flax]"}
  assert project["scripts"] == {"lowmem": "optax_lowmem.qlora.cli:main"}
