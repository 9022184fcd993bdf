"""README and docs are true: their Python runs, and what they name is there.

A page is run from top to bottom in one namespace, and takes nothing as given: a reader copies it. A
block that cannot run here begins with a line ``# Not run in the tests: why``.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
import tomllib

import pytest

from doc_pages import NOT_RUN, PAGES, ROOT, blocks, commands, read, run, unknown_names
from optax_lowmem import nn


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p, "python", "pycon"))])
def test_a_page_runs_from_top_to_bottom(page):
  if "import equinox" in read(page):
    pytest.importorskip("equinox")
  names = run(page)
  RESULTS.get(page, lambda names: None)(names)


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p, "python", "pycon"))])
def test_a_page_uses_no_name_that_it_does_not_make(page):
  """Also in functions that it does not call, and in what is not run."""
  assert not list(unknown_names(page))


def of_lora(names):
  assert isinstance(names["model"].up_proj.base, nn.NF4Linear)
  assert pathlib.Path("adapter/adapter_model.safetensors").exists()
  assert names["second"].up_proj.variant == names["third"].up_proj.variant == names["LoHa"]()


def of_lora_foreign(names):
  assert names["layers"].names == ["embed", "q_einsum", "o_einsum"]
  assert type(names["model"].q_einsum) is nn.LoRALinear


def of_lora_linen(names):
  assert set(names["state"].params["attention"]) == {"query", "value"}


# What pages must end with, beside running.
RESULTS = {
  "docs/lora.md": of_lora,
  "docs/lora_foreign.md": of_lora_foreign,
  "docs/lora_linen.md": of_lora_linen,
}


def test_few_blocks_are_not_run():
  skipped = [
    (page, block.line)
    for page in PAGES
    for block in blocks(page, "python", "pycon")
    if NOT_RUN.match(block.text)
  ]
  assert len(skipped) <= 4, skipped


def options_of(words):
  """What a command understands, as text."""
  from optax_lowmem.qlora import cli

  said = io.StringIO()
  with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
    assert cli.main([*words[1:2], "--help"]) == 0
  return said.getvalue()


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p, "sh"))])
def test_commands_are_there(page):
  extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
  for words in commands(page):
    text, given = " ".join(words), [w.split("=")[0] for w in words if w.startswith("--")]
    if "pip" in words:
      for names in re.findall(r"(?:optax_lowmem|\.)\[([\w,]+)\]", text):
        assert set(names.split(",")) <= set(extras), text
    elif words[0] == "lowmem":
      help_text = options_of(words)
      for option in given:
        assert re.search(rf"{option}\b", help_text), text
    elif words[:3] == ["python", "-m", "pytest"]:
      for path in (w for w in words[3:] if w.startswith("tests")):
        assert list(ROOT.glob(path.split("::")[0])), text
    elif words[0] == "python" and words[1] != "-m":
      assert (ROOT / words[1]).is_file(), text
      if words[1] != "examples/qlora/finetune.py":
        for option in given:
          assert f'"{option}"' in read(words[1]), text


def test_the_command_says_what_the_page_says(capsys):
  """Errors of `lowmem`, which a page shows as one does at a terminal."""
  from optax_lowmem.qlora import cli

  shown = [
    example
    for page in PAGES
    for block in blocks(page, "console")
    for example in re.findall(r"^\$ lowmem (.*)\n((?:(?!\$).+\n)+)", block.text, re.M)
  ]
  assert len(shown) >= 4
  for command, said in shown:
    with contextlib.suppress(SystemExit):
      assert cli.main(command.split()) != 0
    assert said.strip() in capsys.readouterr().err, command
