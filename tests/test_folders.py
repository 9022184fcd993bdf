"""Where things are: folders import one way, and none is too large to look through."""

import ast
import collections
import pathlib

import pytest

import optax_lowmem

PACKAGE = pathlib.Path(optax_lowmem.__file__).parent
# As CONTRIBUTING.md draws them: each may import those before it.
ORDER = [
  "_arguments",
  "_meshes",
  "_quantization",
  "_host_memory",
  "_state",
  "_programs",
  "kernels",
  "_sharding",
  "_update",
  "_masters",
  "_steps",
  "_paging",
  "_backward",
  "_optimizers",
  "_plan",
  "",  # what `import optax_lowmem` gives
  "_linear",
  "_variants",
  "_peft",
  "linen",
  "nn/_proofs",
  "nn/_layers",
  "nn/_adapters",
  "nn/_model",
  "nn/_peft",
  "nn/_merging",
  "nn",
  "qlora/files",
  "qlora/text",
  "qlora/data",
  "qlora/models",
  "qlora/families",
  "qlora/loading",
  "qlora/training",
  "qlora/run",
  "qlora/kinds",
  "qlora/planning",
  "qlora/commands",
  "qlora",
]


def module(path):
  return ".".join(("optax_lowmem", *path.relative_to(PACKAGE).with_suffix("").parts))


FILES = {module(p).removesuffix(".__init__"): p for p in sorted(PACKAGE.rglob("*.py"))}


def folder(name):
  return FILES[name].parent.relative_to(PACKAGE).as_posix().removeprefix(".")


def imported(name):
  """The modules of this package that a module imports, at its top or later."""
  for node in ast.walk(ast.parse(FILES[name].read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names if alias.name in FILES)
    elif isinstance(node, ast.ImportFrom) and node.module in FILES:
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        yield full if full in FILES else node.module


def test_every_folder_has_its_place():
  assert {folder(name) for name in FILES} == set(ORDER)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
  here = ORDER.index(folder(name))
  for other in imported(name):
    assert ORDER.index(folder(other)) <= here, f"{name} imports {other}"


@pytest.mark.parametrize("each", ORDER)
def test_no_folder_has_more_than_twelve_files(each):
  files = [p for p in (PACKAGE / each).glob("*.py") if p.name != "__init__.py"]
  assert len(files) <= 12, [p.name for p in files]


def test_no_files_import_each_other():
  """Nor is there a longer cycle."""
  graph = {name: set(imported(name)) - {name} for name in FILES}
  done = collections.OrderedDict()

  def visit(name, path):
    assert name not in path, " -> ".join((*path, name))
    if name not in done:
      for other in graph[name]:
        visit(other, (*path, name))
      done[name] = True

  for name in graph:
    visit(name, ())
