"""Pages that others moved out of host memory: noticed, named, put back, and never an abort."""

import contextlib
import copy
import io
import math
import os
import pickle
import subprocess
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding

import optax_lowmem as lowmem
from optax_lowmem._host_memory.pages import is_paged

KINDS = {"explicit": AxisType.Explicit, "automatic": AxisType.Auto}
SHAPES = {"two lanes": (256, 64), "one lane": (33, 64)}


def parameters():
  return {k: jnp.linspace(-1, 1, math.prod(s)).reshape(s) for k, s in SHAPES.items()}


def on_mesh(kind):
  return NamedSharding(jax.make_mesh((1,), ("a",), axis_types=(KINDS[kind],)), jax.P())


def initialised(tx, params, where):
  """As large programs do it: every array of the state has a sharding."""
  return jax.jit(tx.init, out_shardings=jax.tree.map(lambda _: where, tx.init(params)))(params)


def by_flax(state):
  serialization = pytest.importorskip("flax.serialization")
  leaves, treedef = jax.tree.flatten(state)
  data = serialization.to_bytes(list(map(np.asarray, leaves)))
  return treedef.unflatten(serialization.from_bytes(leaves, data))


def by_numpy(state):
  """What `equinox.tree_serialise_leaves` and `tree_deserialise_leaves` do."""

  def one(x):
    file = io.BytesIO()
    np.save(file, np.asarray(x))
    file.seek(0)
    return jnp.asarray(np.load(file))

  return jax.tree.map(one, state)


UNDONE = {
  "out_shardings": lambda tx, p: initialised(tx, p, SingleDeviceSharding(jax.devices()[0])),
  "out_shardings on explicit axes": lambda tx, p: initialised(tx, p, on_mesh("explicit")),
  "out_shardings on automatic axes": lambda tx, p: initialised(tx, p, on_mesh("automatic")),
  "on explicit axes": lambda tx, p: initialised(
    tx, jax.device_put(p, on_mesh("explicit")), on_mesh("explicit")
  ),
  "pickle": lambda tx, p: pickle.loads(pickle.dumps(tx.init(p))),
  "numpy": lambda tx, p: jax.tree.map(np.asarray, tx.init(p)),
  "files of leaves": lambda tx, p: by_numpy(tx.init(p)),
  "flax": lambda tx, p: by_flax(tx.init(p)),
  "device_put to a sharding": lambda tx, p: jax.device_put(tx.init(p), on_mesh("automatic")),
  "device_put to a memory": lambda tx, p: jax.device_put(tx.init(p), jax.memory.Space.Device),
}


def pages(state):
  return [x for x in jax.tree.leaves(state, is_leaf=is_paged) if is_paged(x)]


def memories(state):
  return {lane.sharding.memory_kind for x in pages(state) for lane in x.lanes}


def shapes_of(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def step_of(tx):
  def step(params, state):
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state

  return step


CALLS = {
  "eager": lambda step: step,
  "jit": jax.jit,
  "donated": lambda step: jax.jit(step, donate_argnums=(0, 1)),
  "scan": lambda step: jax.jit(
    lambda *carry: jax.lax.scan(lambda c, _: (step(*c), None), carry, None, 2)[0],
    donate_argnums=(0, 1),
  ),
}
REFUSED = r"the page '.*' of `state` .*`state = lowmem.paged\(state\)`"


@pytest.mark.parametrize("how", UNDONE)
def test_undone_paging_is_noticed_and_put_back(how):
  tx = lowmem.offloaded(lowmem.adamw(1e-2))
  params, like = parameters(), tx.init(parameters())
  state = UNDONE[how](tx, params)
  for call in CALLS.values():
    with pytest.raises(ValueError, match=REFUSED):
      call(step_of(tx))(params, state)
  back = lowmem.paged(state)
  assert memories(back) == {"pinned_host"}
  chex.assert_trees_all_equal(back, like)
  back = lowmem.paged(state, like)
  assert jax.tree.map(jax.typeof, back) == jax.tree.map(jax.typeof, like)
  chex.assert_trees_all_equal(back, like)


def check_donated(how):
  """What was put back trains as a state that was never moved."""
  tx = lowmem.offloaded(optax.adamw(1e-2))
  state = UNDONE[how](tx, parameters())
  run = CALLS["donated"](step_of(tx))
  with pytest.raises(ValueError, match=REFUSED):
    run(parameters(), state)
  ends = []
  for start in (lowmem.paged(state), tx.init(parameters())):
    end = run(*run(parameters(), start))
    assert memories(end[1]) == {"pinned_host"}
    ends.append(end)
  for ours, exact in zip(*map(jax.tree.leaves, ends), strict=True):
    np.testing.assert_array_equal(ours, exact)


def check_shapes_first():
  """JAX may keep what it traced for shapes of which no memory is known."""
  tx, params = lowmem.offloaded(optax.adamw(1e-2)), parameters()
  step, moved = step_of(tx), UNDONE["device_put to a memory"](tx, parameters())
  jax.eval_shape(step, params, shapes_of(moved))
  with contextlib.suppress(ValueError):
    CALLS["donated"](step)(params, moved)


def test_nothing_aborts_when_donated():
  """In a process of its own, which a donated page on the device has ended before."""
  done = subprocess.run(
    [sys.executable, __file__],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr[-4000:]
  assert done.stdout.splitlines() == list(UNDONE)


def test_what_keeps_its_place_is_not_refused():
  tx = lowmem.offloaded(optax.adamw(1e-2))
  params = parameters()
  state = tx.init(params)
  host = jax.tree.map(lambda x: x.sharding, state)
  for kept in (
    copy.deepcopy(state),
    jax.tree.map(jnp.copy, state),
    jax.jit(tx.init)(params),
    jax.jit(tx.init, out_shardings=host)(params),
    jax.device_put(pickle.loads(pickle.dumps(state)), host),
    lowmem.paged(state),
  ):
    assert memories(kept) == {"pinned_host"}
    jax.jit(step_of(tx), donate_argnums=1)(params, kept)


def test_orbax_restores_what_can_be_used_at_once(tmp_path):
  """Its arrays are in host memory, but JAX's types of them say otherwise."""
  ocp = pytest.importorskip("orbax.checkpoint")
  tx, params = lowmem.offloaded(optax.adamw(1e-2)), parameters()
  state = tx.init(params)
  template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "state", template)
  ends = [jax.jit(step_of(tx))(params, start) for start in (restored, state)]
  chex.assert_trees_all_equal(*ends)
  assert memories(restored) == memories(ends[0][1]) == {"pinned_host"}


def test_shapes():
  """They may be evaluated without a memory, and be given one."""
  tx, params = lowmem.offloaded(lowmem.adamw(1e-2)), parameters()
  state = jax.eval_shape(tx.init, params)
  bare = shapes_of(state)
  for shapes in (state, bare, lowmem.paged(bare)):
    _, new = jax.eval_shape(step_of(tx), params, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
  with pytest.raises(ValueError, match=REFUSED):
    jax.jit(step_of(tx)).lower(params, bare)
  placed = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tx.init(params)
  )
  for shapes in (lowmem.paged(bare), placed):
    compiled = jax.jit(step_of(tx), donate_argnums=1).lower(params, shapes).compile()
    assert memories(compiled(params, tx.init(params))[1]) == {"pinned_host"}


def test_pages_are_put_back_outside_of_jit():
  tx = lowmem.offloaded(optax.adamw(1e-2))
  with pytest.raises(ValueError, match=r"within `jax\.jit`"):
    jax.jit(lowmem.paged, donate_argnums=0)(pickle.loads(pickle.dumps(tx.init(parameters()))))


def test_a_state_without_pages_needs_one_that_has():
  with pytest.raises(ValueError, match=r"Pass `like=tx.init\(params\)`"):
    lowmem.paged(optax.adamw(1e-2).init(parameters()))


def test_a_state_that_was_never_paged_is_noticed():
  params = parameters()
  tx, inner = lowmem.offloaded(optax.adamw(1e-2)), optax.adamw(1e-2)
  with pytest.warns(UserWarning, match=r"has no pages.*`lowmem.paged\(state, like=tx.init"):
    jax.jit(tx.update)(params, inner.init(params), params)
  small = lowmem.offloaded(inner, min_bytes=1 << 40)
  with warnings.catch_warnings(action="error"):
    jax.jit(small.update)(params, small.init(params), params)


if __name__ == "__main__":
  for how in UNDONE:
    check_donated(how)
    print(how, flush=True)
  check_shapes_first()
