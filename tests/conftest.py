"""What the tests share."""

import itertools
import os
import pathlib
import shutil
import tempfile
import warnings

import pytest

# One thread a test process: the suite runs on as many processes as there are cores.
os.environ.setdefault(
  "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

# Half of the suite's time is compiling. What takes long is compiled once for all its processes,
# those of the script among them.
OWN_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if OWN_CACHE:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax-cache-")
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

# Where each operation came from is not asked for here: 8 % of the time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

GOLDEN = pathlib.Path(__file__).parent / "golden"


# Few tests that take long: a process that came to them last would run them while others wait.
LONG = ("test_sharding", "test_composition", "test_qlora_options", "test_offloaded")


def pytest_addoption(parser):
  parser.addoption(
    "--few", action="store_true", help="of laws over all transformations, ask representatives only"
  )


def pytest_collection_modifyitems(config, items):
  items.sort(key=lambda item: item.path.stem not in LONG)
  if config.getoption("--few"):
    from registry import REGISTRY, REPRESENTATIVES

    others = {*REGISTRY} - {*REPRESENTATIVES}

    def is_left_out(item):
      return hasattr(item, "callspec") and item.callspec.params.get("name") in others

    config.hook.pytest_deselected(items=list(filter(is_left_out, items)))
    items[:] = itertools.filterfalse(is_left_out, items)


def pytest_unconfigure(config):
  if OWN_CACHE:
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


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
