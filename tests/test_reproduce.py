"""The tables of the docs are made of the runs of `benchmarks/reproduce.py`, and only those."""

import pathlib

import pytest

import reproduce
import reproduce_tables


def runs(seeds=2):
  made = {}
  for key in reproduce.all_runs(False, None):
    task, _, bits, seed = key.split("/")
    if int(seed) < seeds:
      made[key] = {
        "loss": 2.0 + int(seed) / 100 + (int(bits) == 4) / 50,
        reproduce_tables.MEASURES[task]: 7.5,
        "curve": [3.0, 2.0],
        "steps": 80,
        "parameters": 1234,
        "state bytes": 1000 * int(bits),
      }
  return made


def test_every_optimizer_at_every_width_is_asked_for_once():
  names = reproduce.all_runs(False, None)
  assert len(names) == len(set(names)) == 2 * len(reproduce.OPTIMIZERS) * 3 * 3
  assert reproduce.all_runs(False, ["language/came/8/2"]) == ["language/came/8/2"]
  assert set(reproduce.all_runs(True, None)) < set(names)


def test_tables():
  made = reproduce_tables.tables(runs())
  assert "1,234 parameters, 80 steps, 2 seeds." in made["language"]
  row = "| adamw, 4 bits | 2.0250 (2.0200 to 2.0300) | 7.50 (7.50 to 7.50) | "
  assert row + "+1.00 (+1.00 to +1.00) % | 0.00 MB |" in made["language"]
  assert "| came, 8 bits | 2.0050 (2.0000 to 2.0100) | +0.00" in made["digits rules"]
  assert "| CAME against Adam, GPT-2 medium, memory in GiB | 8.77 | 7.44 |" in made["published"]
  assert reproduce_tables.tables({}) == {}


def test_docs_are_rewritten_between_markers_and_nowhere_else(tmp_path):
  (tmp_path / "docs").mkdir()
  for name in reproduce_tables.DOCS:
    (tmp_path / name).write_text("a\n<!-- reproduce: digits -->\nold\n<!-- end -->\nz\n")
  for table in ("| 1 |", "| 2 |"):  # and again
    reproduce_tables.write_docs(tmp_path, {"digits": table, "language": "no"})
    for name in reproduce_tables.DOCS:
      expected = f"a\n<!-- reproduce: digits -->\n{table}\n<!-- end -->\nz\n"
      assert (tmp_path / name).read_text() == expected


def test_every_table_has_a_place_in_the_docs():
  root = pathlib.Path(__file__).parents[1]
  text = "".join((root / name).read_text() for name in reproduce_tables.DOCS)
  for marker in reproduce_tables.tables(runs()):
    if marker != "digits rules":
      assert text.count(f"<!-- reproduce: {marker} -->") == 1, marker


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch):
  path = tmp_path / "runs.json"
  reproduce.save(path, runs(seeds=3))
  monkeypatch.setattr(reproduce, "one", lambda *_: pytest.fail("it ran"))
  learnt = type("Task", (), {"steps": 80})
  monkeypatch.setattr(reproduce, "task", lambda *_: learnt)
  monkeypatch.setattr("sys.argv", ["reproduce.py", "--json", str(path)])
  reproduce.main()


def test_the_tables_of_the_docs_are_those_of_all_runs():
  root = pathlib.Path(__file__).parents[1]
  found = reproduce.saved(reproduce.RESULTS / "reproduce-cpu.json")
  assert list(found) == reproduce.all_runs(False, None)
  text = "".join((root / name).read_text() for name in reproduce_tables.DOCS)
  for marker, table in reproduce_tables.tables(found).items():
    if marker != "digits rules":
      assert f"<!-- reproduce: {marker} -->\n{table}\n<!-- end -->" in text
