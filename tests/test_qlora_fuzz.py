"""Damaged files of every kind are read or refused by name, within limits of time and memory."""

import sys

import pytest

import _fuzz
from reliability import KINDS, MEMORY, SECONDS, is_sentence

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sources")
  _fuzz.write_sources(folder)
  for kind, name in (("rows", "rows.jsonl"), ("GGUF", "model.gguf"), ("adapters", "peft/lora")):
    _fuzz.read(kind, folder / name, folder, tmp_path_factory.mktemp("whole"))
  return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_by_name(sources, kind, monkeypatch):
  monkeypatch.setattr("optax_lowmem.qlora.text.confined.SECONDS", 1.0)
  for number in range(12):
    got = _fuzz.result({"seed": 1, "kind": kind, "number": number}, sources)
    assert got["what"] in ("read", "refused"), got
    assert got["seconds"] < SECONDS and got["memory"] < 2 * got["size"] + MEMORY, got


def test_the_judge_knows_what_is_no_refusal(sources, monkeypatch):
  case = {"seed": 1, "kind": "rows", "number": 0}
  for error, what in (
    (ValueError("Expecting value: line 1 column 1"), "unnamed"),
    (OSError("[Errno 2]"), "unnamed"),
    (KeyError("x"), "wrong kind"),
    (RecursionError(), "wrong kind"),
  ):

    def fail(*_, error=error):
      raise error

    monkeypatch.setattr(_fuzz, "read", fail)
    assert _fuzz.result(case, sources)["what"] == what
  assert is_sentence("error: /a/b is damaged.\n", "/a/b")
  assert not is_sentence("Traceback\nerror: /a/b\n", "/a/b") and not is_sentence("error: x\n", "/a")
