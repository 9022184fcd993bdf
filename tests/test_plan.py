"""`plan`, `memory_report` and their kin: the bytes they say are those of the arrays themselves."""

# What is called wrongly is called so on purpose.
# pyright: reportArgumentType=false

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optax_lowmem as lowmem
from optax_lowmem._plan.compiler import topology
from optax_lowmem.qlora import model_shapes
from registry import REGISTRY, SHAPES, make, tree

ADAPTER = {f"layers/{k}": {"a": (4, 96, 8), "b": (4, 8, 96)} for k in ("q", "down")}


def shapes(tree, dtype="float32"):
  return jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, dtype), tree, is_leaf=lambda x: isinstance(x, tuple)
  )


# Odd shapes, a real model of stacked layers, a convolutional net, an adapter, and a table alone.
MODELS = {
  "odd": shapes(SHAPES),
  "stacked": shapes(
    {"embed": (1000, 256), "layers": {"up": (4, 256, 688), "norm": (4, 256)}, "head": (256, 1000)},
    "bfloat16",
  ),
  "convolutions": shapes([(3, 3, 3, 64), (64,), (3, 3, 64, 128), (128,), (1152, 10)]),
  "adapter": shapes(ADAPTER),
  "table": shapes((70_001, 33)),
}


def arrays_bytes(tree):
  """Bytes of arrays by their memory, counted from the arrays."""
  found = {"device": 0, "pinned_host": 0}
  for x in jax.tree.leaves(tree):
    found["pinned_host" if x.sharding.memory_kind == "pinned_host" else "device"] += x.nbytes
  return found


@pytest.mark.cheap
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", REGISTRY)
def test_state_is_exact(name, model):
  for tx in (make(name), lowmem.offloaded(make(name))):
    planned = lowmem.plan(MODELS[model], tx)
    assert planned.state_bytes == lowmem.state_bytes(jax.eval_shape(tx.init, MODELS[model]))


@pytest.mark.parametrize("name", ["adamw-8", "adamw-4", "came-8", "adafactor-4", "amsgrad-8"])
def test_state_is_that_of_the_arrays(name):
  params = tree(0)
  for tx in (make(name), lowmem.offloaded(make(name))):
    planned = lowmem.plan(params, tx)
    assert planned.state_bytes == arrays_bytes(tx.init(params))
    assert (
      planned.of("weights") == planned.of("gradients") == sum(p.nbytes for p in params.values())
    )


def test_parts_are_named_by_what_they_are():
  planned = lowmem.plan(MODELS["stacked"], lowmem.came(1e-3))
  names = [part.name for part in planned.parts]
  assert names[:2] == ["weights, bfloat16", "gradients"]
  assert "optimizer state, ema, power8 and float32" in names
  assert planned.parts[0].parameters == sum(x.size for x in jax.tree.leaves(MODELS["stacked"]))
  assert (
    planned.as_dict()["device_bytes"]
    == planned.device_bytes
    == planned.of("weights") + planned.of("gradients") + planned.of("state")
  )
  assert planned.method == "shapes" and "activations" in str(planned)


def test_a_function_and_arrays_are_planned_as_shapes_are():
  params = {"w": jnp.ones((64, 96))}
  planned = [lowmem.plan(t, lowmem.adam(1e-3)) for t in (params, lambda: params)]
  assert planned[0] == planned[1]


def test_of_an_nnx_model_adapters_are_trained():
  nnx = pytest.importorskip("flax.nnx")
  from optax_lowmem import nn

  def model():
    made = nnx.List([nnx.Linear(128, 256, rngs=nnx.Rngs(0))])
    net = nnx.Sequential(*made)
    return nn.add_lora(nn.quantize_model(net), 4, 8.0, ".*", rngs=nnx.Rngs(1))

  planned = lowmem.plan(nnx.eval_shape(model), lowmem.adamw(1e-3))
  found = {part.name: part.parameters for part in planned.parts}
  assert found["frozen weights, NF4"] == 128 * 256
  assert found["adapters, float32"] == 4 * (128 + 256)
  assert planned.of("gradients") == 4 * 4 * (128 + 256)
  whole = lowmem.plan(nnx.eval_shape(model), lowmem.adamw(1e-3), wrt=nnx.Param)
  assert "weights, float32" in {part.name for part in whole.parts}


@pytest.mark.parametrize("devices", [4, "mesh"])
def test_on_a_mesh_each_device_holds_its_part(devices, monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 4)  # as in a process that has them
  mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  cut = NamedSharding(mesh, PartitionSpec("data"))
  params = {
    "w": jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=cut),
    "b": jax.ShapeDtypeStruct((512,), jnp.float32),
  }
  for tx in (lowmem.adamw(1e-3), lowmem.offloaded(lowmem.adamw(1e-3)), lowmem.came(1e-3)):
    planned = lowmem.plan(params, tx, mesh=mesh if devices == "mesh" else devices)
    assert planned.devices == 4
    assert planned.of("weights") == 64 * 512 * 4 + 512 * 4
    alone = lowmem.plan({"w": jax.ShapeDtypeStruct((64, 512), jnp.float32), "b": params["b"]}, tx)
    # A factor along the axis that is not cut is whole on each device.
    assert planned.state_bytes == alone.state_bytes
  assert "each device" in str(planned)


def test_a_mesh_of_devices_is_taken_as_it_is():
  mesh = jax.make_mesh((1,), ("x",))
  x = jax.device_put(jnp.zeros((64, 64)), NamedSharding(mesh, PartitionSpec("x")))
  assert lowmem.plan(x, lowmem.adam(1e-3), mesh=mesh).of("weights") == x.nbytes


BAD = {
  "a name": (lambda: lowmem.plan("lama-7b", optax.adam(1e-3)), ValueError, "mean 'llama-7b'"),
  "a configuration": (
    lambda: lowmem.plan({"model_type": "llama"}, optax.adam(1e-3)), ValueError, "vocab_size"
  ),
  "numbers": (lambda: lowmem.plan([1.0], optax.adam(1e-3)), TypeError, "got float in a list"),
  "nothing": (lambda: lowmem.plan({}, optax.adam(1e-3)), TypeError, "got nothing in a dict"),
  "a function": (lambda: lowmem.plan(MODELS["table"], optax.adam), TypeError, "Call it first"),
  "mesh": (
    lambda: lowmem.plan(MODELS["table"], optax.adam(1e-3), mesh=0),
    ValueError, "`mesh` must be a mesh or a positive number of devices, got 0",
  ),
  "one device": (
    lambda: lowmem.plan(MODELS["table"], optax.adam(1e-3), mesh=2),
    ValueError, "this process must have more than one.*'jax_num_cpu_devices', 2",
  ),
  "card": (
    lambda: lowmem.plan(MODELS["table"], optax.adam(1e-3), card="h10"),
    ValueError, "`card` 'h10' is unknown. Did you mean 'h100'",
  ),
  "step": (
    lambda: lowmem.plan(MODELS["table"], optax.adam(1e-3), step=print), ValueError, "pass `card`"
  ),
  "wrt": (
    lambda: lowmem.plan(MODELS["table"], optax.adam(1e-3), wrt=int), ValueError, "NNX models"
  ),
  "optimizers": (
    lambda: lowmem.compare_optimizer_memory(MODELS["table"], ["adamw_9bit"]),
    ValueError, "Did you mean 'adamw_8bit'|adamw_4bit",
  ),
  "memory": (
    lambda: lowmem.plan(MODELS["table"], optax.adam(1e-3)).fits("24 G"), ValueError, "'4GB'"
  ),
  "tpus": (lambda: topology("v5e", 16), ValueError, "has 16 devices, and for v5e"),
  "callback of what": (lambda: lowmem.memory_callback("1"), ValueError, "steps, got '1'"),
  "callback": (lambda: lowmem.memory_callback(0), ValueError, "positive number of steps, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case):
  call, kind, said = BAD[case]
  with pytest.raises(kind, match=said):
    call()


def test_a_report_counts_what_is_there():
  params = tree(0)
  state = lowmem.offloaded(lowmem.adamw(1e-3)).init(params)
  report = lowmem.memory_report(params, state)
  assert {"device": report.device_bytes, "pinned_host": report.host_bytes} == arrays_bytes(
    (params, state)
  )
  assert "on the host" in report.line() and "in all" in str(report)
  assert report.in_use is None or report.in_use >= report.device_bytes


def test_a_report_of_an_nnx_model_names_its_moments():
  """By the boxes of `nnx.Optimizer` alone, a moment and a count were both "value"."""
  nnx = pytest.importorskip("flax.nnx")
  model = nnx.Linear(256, 64, rngs=nnx.Rngs(0))
  state = nnx.Optimizer(model, lowmem.adamw(1e-3), wrt=nnx.Param).opt_state
  for params in (model, nnx.state(model)):
    names = [part.name for part in lowmem.memory_report(params, state).parts]
    assert names[:2] == ["parameters, float32", "optimizer state, count"]
    assert names[2].startswith("optimizer state, mu") and len(names) == 4


def test_print_helpers(capsys):
  lowmem.print_memory_usage({"w": jnp.zeros((64, 64))})
  assert "parameters, float32       4,096  16.0 KiB" in capsys.readouterr().out
  nnx = pytest.importorskip("flax.nnx")
  lowmem.print_trainable_parameters(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
  assert (
    capsys.readouterr().out == "trainable params: 72 || all params: 72 || trainable%: 100.0000\n"
  )


def test_comparison_is_exact():
  """7 billion parameters in one row of the table of every article: 56 GB and 14."""
  params = jax.ShapeDtypeStruct((109_375, 64_000), jnp.float32)
  rows = {row.name: row for row in lowmem.compare_optimizer_memory(params)}
  assert round(rows["adamw"].device / 1e9) == 56
  assert rows["adamw_8bit"].per_parameter == pytest.approx(2.125, abs=1e-3)
  assert rows["paged_adamw_8bit"].host + rows["paged_adamw_8bit"].device == (
    rows["adamw_8bit"].device
  )
  assert rows["sgd"].device == 0
  own = lowmem.compare_optimizer_memory(params, {"mine": optax.trace(0.9)})
  assert own[0].device == math.prod(params.shape) * 4 and "mine" in str(own)


@pytest.mark.parametrize("paged", [False, True])
def test_the_update_alone_is_compiled_for_a_cpu_where_no_compiler_is(paged, monkeypatch):
  from optax_lowmem._plan import compiler

  monkeypatch.setattr(compiler, "missing", lambda card: "its compiler")
  params = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
  tx = lowmem.offloaded(lowmem.adamw(1e-3)) if paged else lowmem.adamw(1e-3)
  planned = lowmem.plan(params, tx, card="h100")
  assert (planned.host_bytes > 0) == paged
  assert planned.state_bytes == lowmem.plan(params, tx).state_bytes
  assert planned.method == "compiled" and planned.compiler == "cpu"
  assert "other temporaries" in planned.note and "optax_lowmem[plan]" in planned.note
  assert planned.device_bytes >= planned.of("weights") * 2 + planned.of("state")
  monkeypatch.setattr(jax, "device_count", lambda: 8)
  with pytest.raises(ValueError, match="To plan for 8 cards, install its compiler"):
    lowmem.plan(params, lowmem.adamw(1e-3), card="h100", mesh=8)


def test_planning_imports_nothing_heavy():
  import subprocess
  import sys

  code = "import sys, optax_lowmem; print([m for m in ('flax.nnx', 'matplotlib') if m in "
  code += "sys.modules], any(m.startswith('jax.experimental.topologies') for m in sys.modules))"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout == "[] False\n"


def test_numbers_are_plain():
  """They go to JSON as they are."""
  import json

  planned = lowmem.plan({"w": np.zeros((8, 8), np.float32)}, lowmem.adam(1e-3))
  assert json.loads(json.dumps(planned.as_dict()))["method"] == "shapes"


def test_a_model_by_name_or_configuration_is_its_parameters(tmp_path):
  config = {"model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128}
  config |= {"num_hidden_layers": 2, "num_attention_heads": 4}
  (tmp_path / "config.json").write_text(json.dumps(config))
  tx = lowmem.adamw(1e-3)
  by_shapes = lowmem.plan(model_shapes(config), tx)
  assert by_shapes == lowmem.plan(config, tx) == lowmem.plan(tmp_path / "config.json", tx)
  assert lowmem.plan("smollm2-135m", tx).state_bytes["device"] > 2 * 134_000_000
