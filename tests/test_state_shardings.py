"""How a state lies, known before it is made. What needs eight devices runs in its own process."""

import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_lowmem as lowmem
import own_process
from optax_lowmem._host_memory.pages import is_paged
from registry import REGISTRY, make

# Cut along both axes, through its blocks, by layers; and one that is whole.
SHAPES = {"both": (64, 1024), "lora": (512, 16), "stack": (8, 32, 256), "b": (5,)}
SPECS = {"both": P("b", "a"), "lora": P(None, "a"), "stack": P("b", None, "a"), "b": P()}


def test_what_does_not_fit_is_refused():
  mesh = jax.make_mesh((1,), ("a",))
  params, tx = {"w": jnp.zeros((4, 4)), "b": jnp.zeros(4)}, lowmem.adamw(1e-2)
  where = NamedSharding(mesh, P())
  with pytest.raises(ValueError, match="for each array of `params`"):
    lowmem.state_shardings(tx, params, {"w": where})
  with pytest.raises(ValueError, match="for each array of `params`"):
    lowmem.state_shardings(tx, params, {"w": where, "c": where})
  with pytest.raises(TypeError, match=r"NamedSharding`, got P.* at \['b'\]"):
    lowmem.state_shardings(tx, params, {"w": where, "b": P()})
  other = NamedSharding(jax.make_mesh((1,), ("b",)), P())
  with pytest.raises(ValueError, match="must be of one mesh"):
    lowmem.state_shardings(tx, params, {"w": where, "b": other})
  nowhere = NamedSharding(mesh.abstract_mesh, P())
  with pytest.raises(ValueError, match="must be of a mesh of devices"):
    lowmem.state_shardings(tx, params, {"w": nowhere, "b": nowhere})


def test_boxes_of_linen():
  linen = pytest.importorskip("flax.linen")
  mesh = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Auto,))
  init = linen.with_partitioning(linen.initializers.ones, (None, "a"))
  model = linen.Dense(128, kernel_init=init)
  boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 64)))
  where = lowmem.state_shardings(lowmem.adamw(1e-2), boxed, linen.get_sharding(boxed, mesh))
  kernel = where[0].mu["params"]["kernel"]
  assert isinstance(kernel, linen.Partitioned)
  assert kernel.value.codes.spec == kernel.value.scales.spec == P(None, "a")


@pytest.mark.parametrize(
  ("kind", "every"),
  [
    ("Explicit", 8),
    pytest.param("Auto", 1, marks=pytest.mark.slow),
    pytest.param("Explicit", 1, marks=pytest.mark.slow),
  ],
)
def test_on_eight_devices(kind, every):
  own_process.printed(__file__, kind, every)


# In the processes of eight devices ----------------------------------------------------------------


def arrays(seed):
  normal = np.random.default_rng(seed).standard_normal
  return {k: jnp.asarray(normal(shape), jnp.float32) for k, shape in SHAPES.items()}


def two_steps(tx, params, grads, state):
  """The updates of the second step, and its state, which lies as the first one did."""
  update, updates = jax.jit(tx.update, donate_argnums=1), grads
  before = jax.tree.map(lambda x: x.sharding, state)
  for _ in range(2):
    updates, state = update(grads, state, params)
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
      assert x.sharding.is_equivalent_to(s, x.ndim), (x.sharding, s)
  return updates, lowmem.unpaged(state)


def check(name, tx, inner, mesh):
  """Two steps from a state that was laid out so equal those of one device."""
  print(name, flush=True)
  shardings = {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()}
  plain = arrays(0), arrays(1)
  params, grads = jax.device_put(plain[0], shardings), jax.device_put(plain[1], shardings)
  shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
  where = lowmem.state_shardings(tx, shapes, shardings)
  expected = two_steps(inner, *plain, inner.init(plain[0]))
  state = jax.jit(tx.init, out_shardings=where)(params)
  assert [x.sharding for x in jax.tree.leaves(state)] == jax.tree.leaves(where)
  pairs = map(jax.tree.leaves, map(lowmem.unpaged, (state, tx.init(params))))
  for x, y in zip(*pairs, strict=True):
    if x.ndim == 0 and len(y.devices()) == 1:
      continue  # optax's counts are wherever they are needed
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)
  moved = jax.tree.map(np.asarray, state)
  put = jax.device_put(moved, where)
  chex.assert_trees_all_equal(put, state)
  assert [x.sharding for x in jax.tree.leaves(put)] == jax.tree.leaves(where)
  for x in jax.tree.leaves(state, is_leaf=is_paged):
    if is_paged(x):
      assert {lane.sharding.memory_kind for lane in x.lanes} == {"pinned_host"}
  ours = two_steps(tx, params, grads, state)
  assert jax.tree.structure(ours) == jax.tree.structure(expected)
  # Norms and means cross the devices, so last bits may differ there, and then a code.
  for x, y in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(expected[0]), strict=True):
    assert np.abs(x - y).mean() <= 1e-3 * np.abs(y).mean()


def check_all(kind, every):
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
  for name in dict.fromkeys([*list(REGISTRY)[::every], "adamw-4", "came-8", "adafactor-8"]):
    check(name, make(name), make(name), mesh)
  for name in ("adamw-8", "came-4"):
    check(f"offloaded {name}", lowmem.offloaded(make(name), min_bytes=64), make(name), mesh)
  check("optax.adamw", optax.adamw(1e-2), optax.adamw(1e-2), mesh)
  check("offloaded optax.adamw", lowmem.offloaded(optax.adamw(1e-2)), optax.adamw(1e-2), mesh)


def check_lbfgs(kind):
  """Its memory of differences is made on one device, and is laid on the mesh before it is paged."""
  mesh = jax.make_mesh((8,), ("a",), axis_types=(kind,))
  start = jnp.linspace(-1, 1, 4096).reshape(64, 64)
  f = lambda p: jnp.square(p - 3).sum()  # noqa: E731
  ends = []
  for tx in (optax.lbfgs(), lowmem.offloaded(optax.lbfgs())):

    @jax.jit
    def step(p, state, tx=tx):
      value, grad = jax.value_and_grad(f)(p)
      updates, state = tx.update(grad, state, p, value=value, grad=grad, value_fn=f)
      return optax.apply_updates(p, updates), state

    p = jax.device_put(start, NamedSharding(mesh, P()))
    state = tx.init(p)
    for _ in range(2):
      p, state = step(p, state)
    ends.append(p)
  assert lowmem.state_bytes(state)["pinned_host"] > 2 * 10 * start.nbytes
  chex.assert_trees_all_close(*ends, rtol=1e-6)


if __name__ == "__main__":
  assert jax.device_count() == 8
  kind, every = AxisType[sys.argv[1]], int(sys.argv[2])
  check_lbfgs(kind)
  check_all(kind, every)
