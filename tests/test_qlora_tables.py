"""Rows of CSV and Parquet files are those of JSON; what is neither is said."""

import builtins
import csv
import json

import numpy as np
import pytest

from optax_lowmem.qlora.data.dataset import DataError, load
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer
from test_qlora_data import chat, save_tokenizer

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

TALK = chat("the cat,\n sat?", 'yes, "it" did')
ROWS = {
  "alpaca": [
    {"instruction": "the cat,\n sat?", "input": "", "output": 'yes, "it" did'},
    {"instruction": "the dog\tran", "input": "12", "output": "é"},
  ],
  "chat": [{"messages": TALK}, {"messages": [*TALK, *chat("and?", "ran")]}],
  "completions": [{"prompt": "the", "completion": " cat"}, {"prompt": "", "completion": "dog"}],
  "texts": [{"text": "the cat"}, {"text": "the dog\n\nran"}],
}


@pytest.fixture
def tokenizer(tmp_path):
  save_tokenizer(tmp_path / "model")
  return ChatTokenizer.from_model(tmp_path / "model")


def write(path, rows):
  if path.suffix == ".parquet":
    parquet.write_table(pa.Table.from_pylist(rows), path)
  elif path.suffix in (".csv", ".tsv"):
    with path.open("w", newline="", encoding="utf-8") as file:
      writer = csv.DictWriter(file, list(rows[0]), delimiter=",\t"[path.suffix == ".tsv"])
      writer.writeheader()
      for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
  else:
    path.write_text(json.dumps(rows))
  return path


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_table_gives_the_rows_of_json(tmp_path, tokenizer, kind, suffix):
  want = load(write(tmp_path / "a.json", ROWS[kind]), tokenizer, 64)
  got = load(write(tmp_path / f"a{suffix}", ROWS[kind]), tokenizer, 64)
  assert got.kind == want.kind and got.notes == want.notes and len(got.rows) == 2
  for a, b in zip(got.rows, want.rows, strict=True):
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.learned, b.learned)


def test_parquet_is_known_by_its_content(tmp_path, tokenizer):
  write(tmp_path / "a.parquet", ROWS["chat"]).rename(tmp_path / "a.bin")
  assert len(load(tmp_path / "a.bin", tokenizer, 64).rows) == 2


def test_fields_that_a_table_fills_up_are_not_there(tmp_path, tokenizer):
  """Where one message of a Parquet file has a name, all have the field."""
  rows = [{"messages": [m | {"weight": 1} for m in TALK]}, {"messages": TALK}]
  assert load(write(tmp_path / "a.parquet", rows), tokenizer, 64).notes == []


@pytest.mark.parametrize(
  ("name", "content", "what"),
  [
    (
      "a.csv",
      b"question,answer\na,b\n",
      r"a\.csv, line 2: expected the keys .*'question', 'answer'",
    ),
    ("a.csv", b"text\na\nb,c\n", r"a\.csv, line 3: 2 fields where the first line names 1"),
    ("a.csv", b"prompt,completion\na\n", r"a\.csv, line 2: 1 fields where .* names 2"),
    ("a.csv", b"text,text\na,b\n", r"a\.csv, line 1: a name is there twice"),
    ("a.csv", b'text\n"a\n', r"a\.csv, line 2: unexpected end of data"),
    ("a.csv", b"messages\n[}\n", r"a\.csv, line 2: 'messages' is not JSON"),
    ("a.csv", b"text\n\xff\n", r"a\.csv, line 2: byte 0xff is not UTF-8"),
    ("a.csv", b"text\n", r"a\.csv has no rows"),
    ("a.parquet", b"PAR1 and no more", r"a\.parquet is a Parquet file that cannot be read"),
  ],
)
def test_bad_tables_are_named_with_the_place(tmp_path, tokenizer, name, content, what):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError, match=what):
    load(tmp_path / name, tokenizer, 64)


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path, tokenizer, monkeypatch):
  path, real = write(tmp_path / "a.parquet", ROWS["texts"]), builtins.__import__

  def without(name, *args, **kwargs):
    if name.startswith("pyarrow"):
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", without)
  with pytest.raises(DataError, match=r"pip install 'optax_lowmem\[parquet\]'"):
    load(path, tokenizer, 64)
