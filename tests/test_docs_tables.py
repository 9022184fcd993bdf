"""Numbers in README and docs are those that the commands beside them print."""

from __future__ import annotations

import decimal
import importlib
import json
import re

import numpy as np
import pytest

from doc_pages import PAGES, read


def decimals(value, count):
  """As one rounds by hand: 30.25 is 30.3."""
  step = decimal.Decimal(1).scaleb(-count)
  return str(decimal.Decimal(value).quantize(step, decimal.ROUND_HALF_UP))


def result(name):
  return json.loads(read(f"benchmarks/results/{name}"))


# A cell of a result, and a command that prints some.
NUMBER = re.compile(r"[~+-]?[\d.,]+( ?(%|[A-Za-z/]{1,8}))?( .*)?")
COMMAND = re.compile(r"python (-m pytest )?(benchmarks|tests|examples)/[\w/]+\.py")
# Heads of tables of numbers that nobody measured.
DEFINED = ("| | n | w | smallest | rounded at random below |", "| what | limit |")


def sections(text):
  """Each section's own text, with that of the headings that it is under."""
  above = []
  for part in re.split(
    r"^(?=#+ )", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.M
  ):
    level = len(part) - len(part.lstrip("#"))
    above = [(n, t) for n, t in above if n < level] + [(level, part)]
    yield part, " ".join(t for _, t in above).split()


def has_results(table):
  """Whether a third of its cells are numbers, the first column apart."""
  rows = [line.strip().strip("|").split("|")[1:] for line in table.splitlines()[2:]]
  cells = [cell.strip().replace("**", "") for row in rows for cell in row if cell.strip()]
  return sum(bool(NUMBER.fullmatch(cell)) for cell in cells) * 3 >= max(len(cells), 1)


@pytest.mark.parametrize("page", [p for p in PAGES if "/api/" not in p])
def test_tables_of_numbers_stand_under_the_command_that_prints_them(page):
  for part, above in sections(read(page)):
    for table in re.findall(r"(?:^ *\|.*\n)+", part, re.M):
      if has_results(table) and table.splitlines()[0] not in DEFINED:
        assert COMMAND.search(" ".join(above)), table.splitlines()[0]


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
  ("docs/qlora.md", "accelerator_qlora", "attention-h100.json", []),
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
