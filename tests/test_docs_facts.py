"""Names, links, numbers and pictures of README and docs are those of the repository."""

from __future__ import annotations

import decimal
import importlib
import json
import re

import numpy as np
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


def decimals(value, count):
  """As one rounds by hand: 30.25 is 30.3."""
  step = decimal.Decimal(1).scaleb(-count)
  return str(decimal.Decimal(value).quantize(step, decimal.ROUND_HALF_UP))


def result(name):
  return json.loads(read(f"benchmarks/results/{name}"))


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


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_the_table_of_costs_is_the_results(page):
  """Each number of it, from the files that the commands beside it write."""
  step, card = result("step-cpu.json")["rows"], result("accelerator-h100.json")
  on_card = card["step"] + [r for r in card["norms"] if r["program"] == "step"]
  on_card = {r["rule"]: r for r in on_card if r["dtype"] == "float32"}
  losses = result("factored-cpu.json")["held_out_loss"] | result("train-cpu.json")["held_out_loss"]
  last = {name: np.array(curves)[:, -1] for name, curves in losses.items()}
  _, _, table = read(page).partition("| CPU step")
  rows = [line.split("|")[1:-1] for line in table.partition("\n\n")[0].splitlines()[2:]]
  for name, *cells in rows:
    name = (
      name.strip()
      .replace("`", "")
      .replace(" with momentum", "")
      .replace("(debias=True)", ", debiased")
    )
    want = [f"{step[name.replace(', debiased', '')]['state']:.3f}"]  # as step.py prints it
    if found := on_card.get(name):
      want += [decimals(found["device_bytes"] / 2**20, 0)]
      want += [decimals(found["hbm"], 1), decimals(found["kernels"], 1)]
    else:
      want += [""] * 3
    want += [decimals(step[name]["ratio"], 2) if name in step else ""]
    change = 100 * (last[name] / last["optax.adamw"] - 1).mean() if name in last else None
    want += ["" if change is None else f"{decimals(change, 2)} %" if change else "0"]
    cells = [cell.strip().lstrip("+").replace("not run", "") for cell in cells]
    assert cells == want, name


# Page, the script that prints its tables, what the script wrote, and which of the tables.
PRINTED = [
  ("docs/bf16.md", "bf16", "bf16-h100.json", ["step"]),
  (
    "docs/mixed_precision.md",
    "accumulation",
    "accumulation-h100.json",
    ["64", "1024", "memory", "temporaries"],
  ),
  ("docs/full_finetuning.md", "plan", "plan-h100.json", ["backward"]),
  (
    "docs/planning.md",
    "plan",
    "plan-h100.json",
    ["figure8", "lengths", "full", "masters", "devices", "state", "compilers", "seconds"],
  ),
]


@pytest.mark.parametrize(("page", "script", "file", "names"), PRINTED, ids=lambda x: str(x)[:30])
def test_tables_are_what_the_script_printed(page, script, file, names):
  """Each line of them, made of the numbers that are committed; heads too."""
  made = importlib.import_module(script).tables(result(file))
  lines = {line.strip() for line in read(page).splitlines()}
  for name in names:
    missing = [line for line in made[name] if line not in lines]
    assert not missing, "\n".join([f"{page} lacks of {name} in {file}:", *missing])


def test_every_page_is_in_the_navigation():
  menu = read("mkdocs.yml")
  for page in PAGES[1:]:
    assert page.removeprefix("docs/") in menu, page
