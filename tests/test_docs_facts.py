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


# Page, the script that prints its tables, what it wrote, and which of the tables; by default all.
PRINTED = [
  ("docs/accelerators.md", "accelerator", "accelerator-h100.json", []),
  ("docs/bf16.md", "bf16", "bf16-h100.json", []),
  ("docs/bf16.md", "bf16_training", "bf16-training-cpu.json", []),
  ("docs/codebooks.md", "accuracy", "accuracy-cpu.json", []),
  ("docs/factored.md", "train", "factored-cpu.json", []),
  ("docs/full_finetuning.md", "backward", "backward-h100.json", []),
  ("docs/full_finetuning.md", "plan", "plan-h100.json", ["backward"]),
  ("docs/lora.md", "bases", "bases-cpu.json", []),
  ("docs/lora.md", "lora_memory", "lora-memory-cpu.json", []),
  ("docs/lora.md", "lora_memory", "lora-memory-dora-cpu.json", []),
  ("docs/mixed_precision.md", "accumulation", "accumulation-h100.json", []),
  ("docs/performance.md", "step", "step-cpu.json", []),
  ("docs/planning.md", "plan", "plan-h100.json", [
    "figure8", "lengths", "full", "masters", "devices", "state", "compilers", "seconds",
  ]),
  ("docs/reliability.md", "reliability", "reliability-cpu.json", []),
  ("docs/scale.md", "scale", "scale-h100.json", []),
  ("docs/scale.md", "one_billion", "one-billion-cpu.json", []),
  ("docs/training.md", "train", "train-cpu.json", []),
]  # fmt: skip


def made(script, file, names=()):
  """The lines of a script's tables, of the numbers that are committed."""
  found = importlib.import_module(script).tables(result(file))
  return [plain(line) for name in names or found for line in found[name]]


def plain(line):
  return line.strip().replace("**", "")


@pytest.mark.parametrize(("page", "script", "file", "names"), PRINTED, ids=str)
def test_tables_are_what_the_script_printed(page, script, file, names):
  """Heads too, where the script prints them. Of `train` a line lacks the last column."""
  lines = [plain(line) for line in read(page).splitlines()]
  missing = [line for line in made(script, file, names) if not any_begins(line, lines)]
  assert not missing, "\n".join([f"{page} lacks of {file}:", *missing])


def any_begins(begin, lines):
  return any(line.startswith(begin) for line in lines)


# Page, script and results, and words in the head of a table that leaves out lines of the script's.
PARTS = [
  ("docs/codebooks.md", "codebooks", "codebooks-cpu.json", "one store: mean"),
  ("docs/factored.md", "step", "step-cpu.json", "of (4096, 16)"),
]


@pytest.mark.parametrize(("page", "script", "file", "words"), PARTS, ids=str)
def test_parts_of_tables_are_what_the_script_printed(page, script, file, words):
  _, _, rest = read(page).partition(words)
  rows = [plain(line) for line in rest.partition("\n\n")[0].splitlines()[2:]]
  assert rows
  assert set(rows) <= set(made(script, file))


def of_pages():
  """The table of docs/offload.md."""
  for r in result("accelerator-h100.json")["paged"]:
    count, _, width = r["matrices"].partition(" of ")
    numbers = [r[key] / 2**20 for key in ("host", "without", "paged", "bound")]
    cells = " | ".join(f"{x:,.0f}" for x in numbers)
    yield f"| {r['rule']}, {r['dtype']} | {count} of {width} | {cells} |"


def of_qlora():
  """The table of docs/qlora.md, without its first columns: two versions of jax."""
  files = ("accelerator-h100-jax-0.10.json", "accelerator-h100.json")
  for old, new in zip(*(result(file)["qlora"] for file in files), strict=True):
    keys = ("device GiB", "temporaries GiB")
    cells = " | ".join(f"{old[key]:.2f} / {new[key]:.2f}" for key in keys)
    yield f"| {old['tokens']:,} | {old['adapters']} | {cells} |"


def of_steps():
  """The table of docs/performance.md: a step in both dtypes, then paged."""
  card = result("accelerator-h100.json")
  steps = card["step"] + [r for r in card["norms"] if r["program"] == "step"]
  rules = {}
  for r in steps:
    cells = f"{decimals(r['device_bytes'] / 2**20, 0)} MiB | {decimals(r['hbm'], 1)} B/param "
    rules.setdefault(r["rule"], []).append(cells + f"| {decimals(r['kernels'], 1)}")
  shown = ("optax.adamw", "adamw, 8 bits", "adamw, 4 bits", "lion, 8 bits", "optax.adafactor")
  for rule in (*shown, "came, 8 bits", "optax.lamb", "lamb, 8 bits"):
    yield f"| {rule} | {' | '.join(rules[rule])} |"


@pytest.mark.parametrize(
  ("page", "lines"),
  [("docs/offload.md", of_pages), ("docs/qlora.md", of_qlora), ("docs/performance.md", of_steps)],
)
def test_tables_of_a_form_of_their_own_are_the_results(page, lines):
  there = [plain(line) for line in read(page).splitlines()]
  missing = [line for line in lines() if not any(known.endswith(line) for known in there)]
  assert not missing, "\n".join(missing)


def test_every_page_is_in_the_navigation():
  menu = read("mkdocs.yml")
  for page in PAGES[1:]:
    assert page.removeprefix("docs/") in menu, page
