"""Names, links and pictures of README and docs are those of the repository."""

from __future__ import annotations

import importlib
import re

import pytest

from doc_pages import PAGES, ROOT, read


@pytest.mark.parametrize("page", PAGES)
def test_names_are_there(page):
  """Each `lowmem.x`, `nn.x` and `linen.x` that is said of this library exists."""
  modules = {"lowmem": "optax_lowmem", "lowmem_nn": "optax_lowmem.nn"}
  text = read(page)
  for name, attribute in re.findall(r"\b(lowmem|lowmem_nn)\.([A-Za-z_]\w*)", text):
    module = importlib.import_module(modules[name])
    assert hasattr(module, attribute), f"{page}: {name}.{attribute}"
  for path in re.findall(r"`((?:tests|benchmarks|examples|optax_lowmem)/[\w./*-]+)", text):
    assert list(ROOT.glob(path.rstrip("."))), f"{page}: {path}"


def slug(heading):
  """A heading's anchor, as GitHub and the site make it."""
  return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading).strip().lower()))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_from_the_root_lead_somewhere(page):
  """Those between the pages of the site are held by `mkdocs build --strict`."""
  for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
    if target.startswith("http"):
      continue
    path, _, anchor = target.partition("#")
    assert (ROOT / path).exists(), target
    if anchor:
      headings = re.findall(r"^#+ (.*)$", read(path), re.M)
      assert anchor in map(slug, headings), target


def test_the_api_pages_hold_every_public_name_once():
  said = re.findall(r"^::: ([\w.]+)$", "\n".join(read(p) for p in PAGES if "/api/" in p), re.M)
  public = []
  for name in ("optax_lowmem", "optax_lowmem.nn", "optax_lowmem.linen"):
    public += [f"{name}.{x}" for x in importlib.import_module(name).__all__]
  assert sorted(said) == sorted(public)


def test_pictures_are_what_the_script_draws(tmp_path):
  """By the hash of what they were drawn from, as another matplotlib places text otherwise."""
  import figures

  for name in figures.FIGURES:
    fresh = figures.draw(name, tmp_path)
    committed = figures.OUT / fresh.name
    assert figures.digest(name) in committed.read_text(), (
      f"run python benchmarks/figures.py: {name}"
    )
    assert fresh.stat().st_size < 60_000
  assert {p.name for p in figures.OUT.iterdir()} == {f"{name}.svg" for name in figures.FIGURES}


def test_every_page_is_in_the_navigation():
  menu = read("mkdocs.yml")
  for page in PAGES[1:]:
    assert page.removeprefix("docs/") in menu, page
