"""What tools read of the package: signatures, types, docstrings, and names in pickles."""

import importlib.util
import inspect
import json
import pathlib
import pickle
import pickletools
import re
import subprocess
import sys
import typing

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from optax import contrib

import optax_lowmem as lowmem
from optax_lowmem import linen, nn
from optax_lowmem._linear.packed_weight import CODEBOOKS
from optax_lowmem._optimizers.quantized import _BITS
from optax_lowmem._quantization.codebooks import _CODEBOOKS

ROOT = pathlib.Path(lowmem.__file__).parents[1]
PYRIGHT = importlib.util.find_spec("pyright")
OPTAX = ["adafactor", "adagrad", "adam", "adamw", "ademamix", "lamb", "lars", "lion", "rmsprop"]
OPTAX += ["sgd"]
STORAGE = ["bits", "block_size", "min_size", "quantize_mask"]


# Mistakes -----------------------------------------------------------------------------------------

PROGRAM = """\
import jax.numpy as jnp
import optax
from flax import nnx

import optax_lowmem as lowmem
from optax_lowmem import linen, nn

rngs = nnx.Rngs(0)
model = nnx.Sequential(nnx.Linear(64, 64, rngs=rngs))
tx = optax.adam(1e-3)
name: str = "adamw_8bit"
storage = {"mu": "log8"}
"""

# What is written, the exception, and its message.
PLANTED = [
  (
    "lowmem.adamw(1e-3, weight_decays=0.1)",
    TypeError,
    r"adamw\(\) takes no argument 'weight_decays'\. Did you mean 'weight_decay'\?",
  ),
  ('lowmem.adamw(1e-3, bits="8")', ValueError, r"`bits` must be one of \(32, 8, 4\), got '8'"),
  ("lowmem.adamw(1e-3, bits=7)", ValueError, r"`bits` must be one of \(32, 8, 4\), got 7"),
  (
    'lowmem.offloaded(tx, fallback="gpu")',
    ValueError,
    "`fallback` must be 'device' or None, got 'gpu'",
  ),
  (
    'nn.add_lora(model, 2, 4, bias="some", rngs=rngs)',
    ValueError,
    "`bias` must be 'none', 'all' or 'lora_only', got 'some'",
  ),
  (
    'nn.quantize_model(model, codebook="nf5")',
    ValueError,
    "`codebook` must be one of nf4, fp4, int8, got 'nf5'",
  ),
  (
    'lowmem.adamw(1e-3, block_size="64")',
    ValueError,
    "`block_size` must be a positive multiple of 2, got '64'",
  ),
  (
    "lowmem.offloaded(tx, max_bytes=1.5)",
    ValueError,
    "`max_bytes` must be a number of bytes or a string such as '4GB'.*got 1.5",
  ),
  (
    'nn.add_lora(model, 2, 4, init="pisa", rngs=rngs)',
    ValueError,
    "`init` must be 'default'.*got 'pisa'",
  ),
  ('lowmem.quantize(jnp.ones((1, 64)), "nf5")', ValueError, "Did you mean 'nf4'"),
  ('lowmem.Blockwise("power9")', ValueError, "Did you mean 'power8'"),
  ('lowmem.came(1e-3, bits="4")', ValueError, "`bits` must be one of"),
  ('lowmem.explain(tx, jnp.ones(1), "gpu")', ValueError, "'gpu' is 'cuda'"),
  ('linen.NF4Dense(4, codebook="nf5")', ValueError, "`codebook` must be one of"),
  ('lowmem.kernels.using("on").__enter__()', ValueError, "`mode` must be one of auto"),
]
# A name of `create` is a string, which often is in a file: it is found where it is used.
UNSEEN = [
  (
    'lowmem.create("adamw_8bitz", 1e-3)',
    ValueError,
    "optimizer name 'adamw_8bitz' is unknown. Did you mean 'adamw_8bit'",
  ),
]
RIGHT = [
  "lowmem.adamw(optax.cosine_decay_schedule(1e-3, 100), jnp.float32(0.9), bits=4, nesterov=True)",
  "lowmem.create(name, 1e-3, weight_decay=0.1)",
  "lowmem.quantized(tx, storage=storage)",
  'lowmem.quantized(tx, 4, storage={"mu": lowmem.Dense(jnp.bfloat16), "nu": "log8_unsigned"})',
  'lowmem.offloaded(tx, fallback="device", max_bytes="4GB")',
  "lowmem.sgd(1e-2, 0.9, True, block_size=128, quantize_mask=lambda p: p)",
]


@pytest.mark.skipif(PYRIGHT is None, reason="pyright is not installed")
def test_pyright_finds_the_mistakes(tmp_path):
  lines = [*PROGRAM.splitlines(), *RIGHT, *(call for call, *_ in UNSEEN)]
  wanted = {}
  for call, *_ in PLANTED:
    lines.append(call)
    wanted[len(lines)] = call
  (tmp_path / "planted.py").write_text("\n".join(lines) + "\n")
  config = {"include": ["planted.py"], "extraPaths": [str(ROOT)], "typeCheckingMode": "basic"}
  (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
  command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
  command += ["--project", str(tmp_path)]
  out = subprocess.run(command, capture_output=True, text=True)
  report = json.loads(out.stdout)["generalDiagnostics"]
  found = {d["range"]["start"]["line"] + 1 for d in report if d["severity"] == "error"}
  assert {n: lines[n - 1] for n in sorted(found)} == wanted, out.stdout


@pytest.mark.parametrize(("call", "exception", "message"), [*PLANTED, *UNSEEN])
def test_a_mistake_is_refused_at_construction(call, exception, message):
  scope = {}
  exec(PROGRAM, scope)
  with pytest.raises(exception, match=message):
    eval(call, scope)


def test_what_is_right_is_not_refused():
  scope = {}
  exec(PROGRAM, scope)
  for call in RIGHT:
    eval(call, scope)


# Signatures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTAX)
def test_a_signature_is_that_of_optax(name):
  theirs = inspect.signature(getattr(optax, name, None) or getattr(contrib, name)).parameters
  ours = dict(inspect.signature(getattr(lowmem, name)).parameters)
  further = {n: ours.pop(n) for n in [*STORAGE, "last_two_axes"] if n in ours}
  assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in further.values())
  assert list(further)[:4] == STORAGE
  added = [n for n in theirs if n not in ours]
  assert not added, f"optax {optax.__version__} has further arguments of {name}: {added}"
  assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in theirs.values()]
  for p, q in zip(ours.values(), theirs.values(), strict=True):
    # Adafactor's own default is a function that makes a dtype.
    assert p.default == q.default, p.name


@pytest.mark.parametrize("name", ["adagrad", "adam", "adamw", "ademamix", "lion", "rmsprop", "sgd"])
def test_types_are_those_of_optax(name):
  theirs = inspect.get_annotations(getattr(optax, name, None) or getattr(contrib, name))
  ours = typing.get_type_hints(getattr(lowmem, name))
  for argument, hint in theirs.items():
    if argument not in ("return", "mask"):  # of which optax's names types that are not there
      assert members(ours[argument]) == members(hint), argument


def members(hint):
  """A union's members, in whatever way it was written."""
  return set(typing.get_args(hint) or [hint])


def test_closed_sets_are_what_is_known():
  assert set(typing.get_args(lowmem.CodebookName)) == set(_CODEBOOKS)
  for name in (*OPTAX, "came", "scale_by_came", "quantized"):
    hints = typing.get_type_hints(getattr(lowmem, name))
    assert set(typing.get_args(hints["bits"])) == set(_BITS), name
  for function in (
    nn.quantize_model,
    linen.quantize_params,
    nn.LoftQ,
    linen.NF4Dense,
    nn.QuantizedLinear.from_weight,
    nn.QuantizedEinsum.__init__,
    nn.QuantizedModule.__init__,
  ):
    hints = typing.get_type_hints(function)
    assert set(typing.get_args(hints["codebook"])) == set(CODEBOOKS), function


# Docstrings ---------------------------------------------------------------------------------------

PUBLIC = [
  (module.__name__, name)
  for module in (lowmem, nn, linen)
  for name in module.__all__
  if callable(getattr(module, name)) and name not in ("CodebookName", "Init", "Storage")
]
# As flax's own, and said to be so; what is a Variable; what `find_layers` and `explain` return.
INHERITED = {"NF4Dense", "LoRADense", "LoRAScale", "LoRAStart", "QuantizedWeight"}
INHERITED |= {"Explanation", "OptimizerComparison"}


@pytest.mark.parametrize(("module", "name"), [p for p in PUBLIC if p[1] not in INHERITED])
def test_every_argument_is_documented(module, name):
  public = getattr(sys.modules[module], name)
  text = inspect.getdoc(public) or ""
  section = re.search(r"^(Args|Attributes):\n((?:  .*\n|\n)+)", text + "\n", re.M)
  documented = re.findall(r"^  (\*{0,2}\w+(?:, \*{0,2}\w+)*):", section[2] if section else "", re.M)
  documented = [n.strip("*") for names in documented for n in names.split(", ")]
  layer = inspect.isclass(public) and issubclass(public, nnx.Module)  # whose class is called
  signature = inspect.signature(public.__init__ if layer else public)
  parameters = [n for n in signature.parameters if n != "self"]
  assert [n for n in parameters if n not in documented] == []


@pytest.mark.parametrize("name", OPTAX)
def test_help_says_all(name):
  text = inspect.getdoc(getattr(lowmem, name)) or ""
  parts = ("Args:", "Returns:", "Raises:", "Examples:", "References:", ".. math::", "at 8 bits")
  text = re.sub(r"\s+", " ", text).lower()
  assert [part for part in (*parts, "at 4") if part.lower() not in text] == []


def test_the_package_says_that_it_is_typed():
  assert (pathlib.Path(lowmem.__file__).parent / "py.typed").is_file()


# Pickles ------------------------------------------------------------------------------------------


def strings_of(pickled):
  return {arg for _, arg, _ in pickletools.genops(pickled) if isinstance(arg, str)}


@pytest.mark.parametrize("name", ["adamw", "came", "adafactor"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_pickled_state_names_no_private_file(name, bits):
  tx = lowmem.offloaded(getattr(lowmem, name)(1e-3, bits=bits), fallback="device")
  state = tx.init({"w": jnp.ones((64, 96)), "b": jnp.ones(4)})
  pickled = pickle.dumps(state)
  assert not [s for s in strings_of(pickled) if s.startswith("optax_lowmem.")]
  loaded = pickle.loads(pickled)
  assert jax.tree.structure(loaded) == jax.tree.structure(state)


def test_public_classes_are_of_the_package():
  for module in (lowmem, nn, linen):
    for name in module.__all__:
      if inspect.isclass(one := getattr(module, name)):
        assert one.__module__ == module.__name__, name
        assert pickle.loads(pickle.dumps(one)) is one
        typing.get_type_hints(one)


@pytest.mark.parametrize("name", _CODEBOOKS)
def test_a_codebook_is_pickled_by_its_name(name):
  book = lowmem.get_codebook(name)
  assert pickle.loads(pickle.dumps(book)) is book
  assert {s for s in strings_of(pickle.dumps(book)) if "optax" in s} == {"optax_lowmem"}
  assert repr(pickle.loads(pickle.dumps(lowmem.Blockwise(book)))) == repr(lowmem.Blockwise(name))


def test_layers_are_pickled_by_public_names():
  model = nn.quantize_model(nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0))))
  state = nnx.state(model)
  assert not [s for s in strings_of(pickle.dumps(nnx.to_pure_dict(state))) if "lowmem._" in s]
  assert not [s for s in strings_of(pickle.dumps(model.layers[0])) if "lowmem._" in s]


def test_states_of_adapters_are_pickled_by_public_names():
  stack = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))(nnx.Rngs(0).split(2))
  model = nnx.Dict(layers=nnx.Dict(q=stack))
  targets = [r"layers\.0\.q"]
  model = nn.add_lora(model, 2, 4, targets, init="pissa", dropout=0.1, rngs=nnx.Rngs(1))
  pickled = pickle.dumps(nnx.state(model))
  names = {s for s in strings_of(pickled) if "lowmem" in s}
  assert names == {"optax_lowmem.nn"} and {"LoRAScale", "LoRAStart"} <= strings_of(pickled)
  nnx.update(model, pickle.loads(pickled))
