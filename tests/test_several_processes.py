"""Two processes of four devices each are one of eight: the same bits in the same places.

This file is also the script of those processes. Each writes down the parts that its own devices
hold, so that what is compared has not gone through a collective.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_lowmem as lowmem
import test_backward_sharded as stacked
from several_processes import DEVICES, join, run_together

RULES = {
  "adamw": lambda: lowmem.adamw(1e-2),
  "offloaded": lambda: lowmem.offloaded(lowmem.adamw(1e-2), min_bytes=64, max_bytes=0),
  "adamw_4bit": lambda: lowmem.adamw(1e-2, bits=4),
  "came": lambda: lowmem.came(1e-2),
  "offloaded optax.adamw": lambda: lowmem.offloaded(optax.adamw(1e-2), min_bytes=64),
  "master_weights": lambda: lowmem.master_weights(lowmem.adamw(1e-2)),
  "stochastic_rounding": lambda: lowmem.stochastic_rounding(lowmem.adamw(1e-2), seed=3),
  "offloaded master_weights": lambda: lowmem.offloaded(
    lowmem.master_weights(lowmem.adamw(1e-2)), min_bytes=64
  ),
}
# Cut along both axes, and through its blocks: its moments lie along another axis, so gradients and
# updates go from process to process.
SHAPES = {"w": (128, 512), "lora": (512, 16), "norm": (64,)}
MESHES = {
  "first": ({"a": 4, "b": 2}, {"w": P("a", "b"), "lora": P(None, "a"), "norm": P()}),
  "second": ({"a": 2, "b": 4}, {"w": P(None, "b"), "lora": P("a"), "norm": P("a")}),
}
# What a state that was saved is read into.
CHANGES = (
  ("adamw", "offloaded"),
  ("offloaded", "adamw"),
  ("adamw", "adamw_4bit"),
  ("adamw_4bit", "adamw"),
  ("adamw", "offloaded optax.adamw"),
  ("offloaded optax.adamw", "adamw_4bit"),
)


def test_two_processes_are_one_and_a_checkpoint_goes_from_two_to_one(tmp_path):
  check_equal(tmp_path, "Explicit", ["offloaded"])


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_every_rule(tmp_path, kind):
  check_equal(tmp_path, kind, RULES)
  run_together(__file__, 2, tmp_path, kind, "restore,change", *RULES)
  run_together(__file__, 1, tmp_path, kind, "change")


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_layers_updated_in_the_backward_pass_with_their_state_in_host_memory(tmp_path, kind):
  check_equal(tmp_path, kind, ["layers"], "layers", "layers")


def check_equal(folder, kind, names, of_two="train", of_one="train,restore"):
  run_together(__file__, 2, folder, kind, of_two, *names)
  run_together(__file__, 1, folder, kind, of_one, *names)
  for name in names:
    one = dict(np.load(folder / f"{name} of 1, 0.npz"))
    parts = [dict(np.load(folder / f"{name} of 2, {rank}.npz")) for rank in (0, 1)]
    assert set(one) == set(parts[0]) | set(parts[1])
    for part in parts:
      assert len(part) < len(one)
      assert_same(name, part, {where: one[where] for where in part})


def assert_same(name, ours, theirs):
  """The same parts with the same bits; a rule's means cross the devices, in another order."""
  assert set(ours) == set(theirs)
  for where, values in ours.items():
    if name == "came":
      assert np.abs(values - theirs[where]).mean() <= 1e-3 * np.abs(theirs[where]).mean(), where
    else:
      np.testing.assert_array_equal(values, theirs[where], err_msg=where)


def test_one_that_fails_takes_the_others_with_it(tmp_path):
  script = tmp_path / "one_fails.py"
  script.write_text("import os, time\nif os.environ['RANK'] == '1': raise SystemExit(3)\n"
                    "time.sleep(60)\n")  # fmt: skip
  with pytest.raises(AssertionError, match=r"ended with \[None, 3\]"):
    run_together(str(script), 2, timeout=20)
  with pytest.raises(AssertionError, match=r"ended with \[None\]"):
    run_together(str(script), 1, timeout=1)


# In the processes ---------------------------------------------------------------------------------


def start(name, mesh, kind):
  """The transformation, parameters, where they lie, and gradients of three steps."""
  sizes, specs = MESHES[mesh]
  axes = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))
  where = {k: NamedSharding(axes, spec) for k, spec in specs.items()}
  dtype = jnp.bfloat16 if "master" in name or "rounding" in name else jnp.float32
  rng = np.random.default_rng(0)

  def laid(k):
    x = rng.standard_normal(SHAPES[k]).astype(dtype)
    return jax.make_array_from_callback(x.shape, where[k], lambda part: x[part])

  params, *grads = ({k: laid(k) for k in SHAPES} for _ in range(4))
  return RULES[name](), params, where, grads


def trained(name, mesh, kind):
  """Parameters, state and updates after three steps."""
  tx, params, where, grads = start(name, mesh, kind)
  init = jax.jit(tx.init, out_shardings=lowmem.state_shardings(tx, params, where))
  for ours, eager in zip(*map(jax.tree.leaves, (init(params), tx.init(params))), strict=True):
    assert ours.sharding.memory_kind == eager.sharding.memory_kind
    assert eager.ndim == 0 or ours.sharding.is_equivalent_to(eager.sharding, ours.ndim)

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, updates

  state, updates = tx.init(params), None
  for g in grads:
    params, state, updates = step(params, state, g)
  return params, state, updates


def parts_of(tree):
  """What the devices of this process hold, by where it belongs."""
  found = {}
  for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
    for shard in x.addressable_shards:
      place = ",".join(
        f"{s.start or 0}:{s.stop or n}" for s, n in zip(shard.index, x.shape, strict=True)
      )
      name = f"{jax.tree_util.keystr(path)} {x.sharding.memory_kind} {place}"
      found[name] = np.asarray(shard.data).astype(np.float32)
  return found


def whole(parts):
  """The arrays that such parts are of."""
  arrays = {}
  for name, values in parts.items():
    path, kind, place = name.rsplit(" ", 2)
    cut = [tuple(map(int, axis.split(":"))) for axis in place.split(",") if axis]
    arrays.setdefault((path, kind), []).append((cut, values))
  for key, cuts in arrays.items():
    shape = [max(stops) for stops in zip(*([b for _, b in cut] for cut, _ in cuts), strict=True)]
    array = arrays[key] = np.full(shape, np.nan, np.float32)
    for cut, values in cuts:
      array[tuple(slice(*ends) for ends in cut)] = values
  return arrays


def train(folder, kind, names):
  """Trains on the first mesh; writes down what is held here, and a checkpoint."""
  count, rank = jax.process_count(), jax.process_index()
  for name in names:
    params, state, updates = trained(name, "first", kind)
    parts = {"state": state, "params": params, "updates": updates}
    np.savez(folder / f"{name} of {count}, {rank}.npz", **parts_of(parts))
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(folder / f"{name} of {count}", state)
      checkpointer.wait_until_finished()


def template(tx, params, where):
  shapes = jax.eval_shape(tx.init, params)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    lowmem.state_shardings(tx, params, where),
  )


def restored(folder, name, like):
  """What the other number of processes has saved."""
  path = folder / f"{name} of {3 - jax.process_count()}"
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(path, like)


def restore(folder, kind, names):
  """Reads a state of others onto the second mesh: it is what they had, and goes on."""
  others = 3 - jax.process_count()
  for name in names:
    tx, params, where, grads = start(name, "second", kind)
    state = restored(folder, name, template(tx, params, where))
    before, saved = parts_of({"state": state}), {}
    for rank in range(others):
      saved |= np.load(folder / f"{name} of {others}, {rank}.npz")
    saved = whole(saved)
    for part, values in before.items():
      path, memory, place = part.rsplit(" ", 2)
      cut = tuple(slice(*map(int, axis.split(":"))) for axis in place.split(",") if axis)
      np.testing.assert_array_equal(values, saved[path, memory][cut], err_msg=part)
    _, state = jax.jit(tx.update, donate_argnums=1)(grads[0], state, params)
    assert set(parts_of({"state": state})) == set(before)


def layers(folder, kind, names):
  """Trains stacked layers; writes down what is held here."""
  (name,), inner = names, lowmem.master_weights(lowmem.adamw(1e-3, min_size=256))
  tx = lowmem.offloaded(inner, min_bytes=64)
  mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(kind,))

  def laid(x, spec):
    x = np.asarray(x, jnp.bfloat16)
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda part: x[part])

  with jax.set_mesh(mesh):
    params = jax.tree.map(laid, stacked.parameters(), stacked.SPECS)
    batch = laid(np.sin(np.arange(8.0 * stacked.WIDTH)).reshape(8, -1), P())
    training = lowmem.update_in_backward(lambda _, x: x, stacked.layer, stacked.head, tx)
    state = training.init(params)
    where = jax.tree.map(lambda a: a.sharding, (params, state))
    step = jax.jit(training.step, donate_argnums=(0, 1), out_shardings=(None, *where))
    for _ in range(3):
      _, params, state = step(params, state, batch)
  assert lowmem.state_bytes(state)["pinned_host"]
  parts = parts_of({"state": state, "params": params})
  np.savez(folder / f"{name} of {jax.process_count()}, {jax.process_index()}.npz", **parts)


def change(folder, kind, _):
  """Reads a state in one form and goes on in another, on the host or the device."""
  for saved, wanted in CHANGES:
    print(saved, "to", wanted, flush=True)
    old, _, where, grads = start(saved, "second", kind)
    params, expected, _ = trained(saved, "second", kind)
    new, state = RULES[wanted](), restored(folder, saved, template(old, params, where))
    state, expected = (lowmem.convert_state(s, old, new, params) for s in (state, expected))
    assert_same(wanted, parts_of(state), parts_of(expected))
    assert set(parts_of(state)) == set(parts_of(new.init(params)))
    jax.block_until_ready(jax.jit(new.update)(grads[0], state, params))


if __name__ == "__main__":
  join()
  folder, kind, phases, *names = sys.argv[1:]
  for phase in phases.split(","):
    run = {"train": train, "restore": restore, "change": change, "layers": layers}[phase]
    run(pathlib.Path(folder), AxisType[kind], names)
