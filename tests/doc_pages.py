"""Pages of documentation as their blocks, and how a block is run."""

from __future__ import annotations

import builtins
import doctest
import pathlib
import re
import shlex
import symtable
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md"))]
NOT_RUN = re.compile(r"# Not run in the tests: \w.{10,}")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_RAISED = re.compile(r"(?P<kind>\w*(?:Error|Warning)): (?P<message>.*)", re.S)


class Block(NamedTuple):
  """What stands between two fences: its language, its text, and the line it begins on."""

  language: str
  text: str
  line: int


def read(page: str) -> str:
  return (ROOT / page).read_text()


def blocks(page: str, *languages: str) -> Iterator[Block]:
  """The blocks of a page in these languages."""
  text = read(page)
  for found in _FENCE.finditer(text):
    if found[1] in languages:
      yield Block(found[1], found[2], text[: found.start()].count("\n") + 2)


def run(page: str) -> dict[str, Any]:
  """Runs a page's Python from top to bottom; returns the names that it ends with."""
  names: dict[str, Any] = {"__name__": "__main__"}
  for block in blocks(page, "python", "pycon"):
    if NOT_RUN.match(block.text):
      continue
    where = "\n" * (block.line - 1)  # so that a traceback names the line of the page
    if block.language == "python":
      exec(compile(where + block.text, page, "exec"), names)
      continue
    for example in doctest.DocTestParser().get_examples(block.text):
      _run_example(example, names, f"{page}, line {block.line + example.lineno}")
  return names


def unknown_names(page: str) -> Iterator[tuple[int, str]]:
  """Global names that a block uses, with its line, and neither it nor one above it makes."""
  known = {*dir(builtins), "__name__"}
  for block in blocks(page, "python", "pycon"):
    text = block.text
    if block.language == "pycon":
      text = "".join(x.source for x in doctest.DocTestParser().get_examples(text))
    module = symtable.symtable(text, page, "exec")
    known |= {s.get_name() for s in module.get_symbols() if s.is_assigned() or s.is_imported()}
    for scope in _scopes(module):
      for symbol in scope.get_symbols():
        is_global = symbol.is_global() or scope is module
        if is_global and symbol.is_referenced() and symbol.get_name() not in known:
          yield block.line, symbol.get_name()


def _scopes(scope: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
  yield scope
  for child in scope.get_children():
    yield from _scopes(child)


def _run_example(example: doctest.Example, names: dict[str, Any], where: str) -> None:
  """Runs what follows `>>>`; what is printed, raised or warned must be what the page says."""
  expected = " ".join(example.want.split())
  raised = _RAISED.fullmatch(expected)
  said, printed = "", []
  names["print"] = lambda *what: printed.append(" ".join(map(str, what)))
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
      try:
        value = eval(example.source.strip(), names)
        printed += [] if value is None else [repr(value)]
      except SyntaxError:
        exec(example.source, names)
    except Exception as error:
      if not raised:
        raise
      said = f"{type(error).__name__}: {error}"
  del names["print"]
  if raised and raised["kind"].endswith("Warning"):
    said = "\n".join(f"{w.category.__name__}: {w.message}" for w in caught)
  elif not raised:
    said = "\n".join(printed)
  got = " ".join(said.split())
  pattern = ".*".join(re.escape(part.strip()) for part in expected.split("..."))
  assert re.fullmatch(pattern, got, re.S), f"{where}: the page says\n{expected}\nand it is\n{got}"


def commands(page: str) -> Iterator[list[str]]:
  """The commands that a page shows, in words."""
  for block in blocks(page, "sh"):
    for line in block.text.replace("\\\n", " ").splitlines():
      for command in re.split(r"&&|;", line.split("  #")[0]):
        words = shlex.split(command, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
          words = words[1:]
        if words:
          yield words
