"""The wheel holds the whole library and the program, and `lowmem` runs from it."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

import optax_lowmem

pytestmark = pytest.mark.slow  # it builds and installs
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Built without a network, by the hatchling that is here."""
  pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed")
  folder = tmp_path_factory.mktemp("wheel")
  code = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
  subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=True)
  (path,) = folder.iterdir()
  return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
  """A folder with nothing but the installed wheel; and another, from where it is used."""
  site, elsewhere = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
  command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
  subprocess.run([*command, "--target", str(site), str(wheel)], check=True)
  return site, elsewhere


def run(installed, *command):
  """Runs it with the wheel before all else, and without the clone."""
  site, elsewhere = installed
  environment = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
  return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)


def test_it_holds_every_file_of_the_package_and_no_other(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = {name for name in archive.namelist() if ".dist-info/" not in name}
    (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "lowmem = optax_lowmem.qlora.cli:main" in archive.read(entry_points).decode()
  package = ROOT / "optax_lowmem"
  files = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
  assert names == {path.relative_to(ROOT).as_posix() for path in files}  # py.typed, if there is one
  assert {"optax_lowmem/qlora/cli.py", "optax_lowmem/qlora/commands/finetune.py"} <= names


def test_what_is_imported_is_the_wheel(installed):
  code = "import optax_lowmem.qlora.cli as cli, sys; print(cli.__file__, *sys.path, sep='\\n')"
  done = run(installed, sys.executable, "-c", code)
  assert done.returncode == 0, done.stderr
  file, *path = done.stdout.splitlines()
  assert file == str(installed[0] / "optax_lowmem/qlora/cli.py")
  assert str(ROOT) not in path[: path.index(str(installed[0])) + 1]


@pytest.mark.parametrize("how", ["script", "module"])
def test_lowmem_runs_from_another_folder(installed, how):
  script = installed[0] / "bin" / "lowmem"
  lowmem = [str(script)] if how == "script" else [sys.executable, "-m", "optax_lowmem.qlora"]
  done = run(installed, *lowmem, "--version")
  assert (done.returncode, done.stdout) == (0, f"{optax_lowmem.__version__}\n"), done.stderr

  done = run(installed, *lowmem, "finetune", "--help")
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("usage: lowmem finetune") and "--model" in done.stdout

  done = run(installed, *lowmem, "finteune")
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.startswith("error: 'finteune' is no command. Did you mean 'finetune'?\n")
  assert list(installed[1].iterdir()) == []
