"""What the tests share."""

import gc
import os
import pathlib
import warnings

import pytest

from thorough import ALWAYS_ASKED

# One thread a test process: the suite runs on as many processes as there are cores.
os.environ.setdefault(
  "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

# Four fifths of the suite's time is compiling. What was compiled once, by any process or an earlier
# run, is not compiled again: a part of test_contract.py takes 127 s then, not 219.
ROOT = pathlib.Path(__file__).parents[1]
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Where each operation came from is not asked for here: 8 % of the time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Traced programs are many objects, and few of them garbage: 4 % of the time.
gc.set_threshold(100_000, 20, 100)

GOLDEN = pathlib.Path(__file__).parent / "golden"


# Few tests that take long: a process that came to them last would run them while others wait.
LONG = (
  "test_sharding",
  "test_contract",
  "test_multi_steps",
  "test_kernels",
  "test_plan_cli",
  "test_finetune",
  "test_update_in_backward",
  "test_masters_composition",
)


def pytest_addoption(parser):
  parser.addoption(
    "--few", action="store_true", help="ask representatives only in test_accelerator*.py too"
  )


@pytest.hookimpl(tryfirst=True)  # before `-m` is heeded
def pytest_collection_modifyitems(config, items):
  """Laws over all transformations are asked of a few; of the others by `-m thorough` and `slow`."""
  from registry import ALWAYS, LAWFUL, REPRESENTATIVES, WRAPPED

  few = config.getoption("--few")
  some = any("::" in argument for argument in config.args)
  files = set() if some else {item.path.stem for item in items}
  lost = {(file, test) for file in files for test in ALWAYS_ASKED.get(file, ())}
  for item in items:
    test, _, case = item.name.partition("[")
    kept = ALWAYS_ASKED.get(item.path.stem, {}).get(test)
    if kept is not None and (not kept or any(part in f"[{case}" for part in kept)):
      lost.discard((item.path.stem, test))
    name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
    on_cards = item.path.stem.startswith("test_accelerator")
    asked_of_all = (on_cards and not few) or item.get_closest_marker("cheap")
    if name in LAWFUL and name not in (*REPRESENTATIVES, *WRAPPED) and not asked_of_all:
      item.add_marker(pytest.mark.slow)
    if item.get_closest_marker("slow"):
      continue
    if kept is not None:
      rare = not any(part in f"[{case}" for part in kept)
    else:
      rare = name in LAWFUL and name not in ALWAYS and not asked_of_all
    if rare:
      item.add_marker(pytest.mark.thorough)
  if lost:
    raise pytest.UsageError(f"tests/thorough.py names cases that are not there: {sorted(lost)}.")
  items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A folder with a tiny `model`, and `rows.json` to train it on."""
  from qlora_cases import save_model, save_rows

  folder = tmp_path_factory.mktemp("qlora")
  save_model(folder / "model")
  save_rows(folder / "rows.json")
  return folder


@pytest.fixture(scope="module")
def peft():
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return pytest.importorskip("peft")
