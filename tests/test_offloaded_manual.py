"""`offloaded` within `jax.shard_map` and `jax.pmap`, where each device has a part of its own."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_lowmem as lowmem
import own_process

RULES = {
  "trace": lambda: optax.trace(0.9),
  "quantized": lambda: lowmem.quantized(optax.adam(1e-3)),
  "came": lambda: lowmem.came(1e-3),
}
PARAMS = {"w": jnp.linspace(-1, 1, 512 * 96).reshape(512, 96)}


def mapped(fn, kind=AxisType.Auto, out_specs=None):
  mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(kind,))
  params = jax.device_put(PARAMS, jax.NamedSharding(mesh, P("x", None)))
  out = P("x") if out_specs is None else out_specs
  run = jax.shard_map(fn, mesh=mesh, in_specs=P("x"), out_specs=out, check_vma=False)
  return run, params


def two_steps(tx, params):
  state, updates = tx.init(params), params
  for _ in range(2):
    updates, state = tx.update(params, state, params)
  return updates


@pytest.mark.parametrize("name", RULES)
def test_in_a_compiled_shard_map(name):
  check(name, AxisType.Explicit)


def check(name, kind):
  plain, tx = RULES[name](), lowmem.offloaded(RULES[name]())
  ours, params = mapped(lambda p: two_steps(tx, p), kind)
  theirs, _ = mapped(lambda p: two_steps(plain, p), kind)
  chex.assert_trees_all_equal(jax.jit(ours)(params), jax.jit(theirs)(params))
  init, _ = mapped(tx.init, kind, P())
  large = [x for x in jax.tree.leaves(jax.jit(init)(params)) if x.size > 4096]
  assert large and {x.sharding.memory_kind for x in large} == {"pinned_host"}


def test_on_two_devices():
  own_process.printed(__file__, devices=2)


@pytest.mark.parametrize("where", ["pmap", "shard_map"])
def test_is_refused_where_results_are_left_on_the_device(where):
  tx = lowmem.offloaded(optax.trace(0.9))
  state = tx.init(PARAMS)

  def call(fn):
    if where == "pmap":
      return jax.pmap(fn)(jax.tree.map(lambda x: x[None], PARAMS))
    return mapped(fn)[0](PARAMS)

  for fn in (tx.init, lambda p: tx.update(p, state, p)):
    with pytest.raises(ValueError, match=rf"within .*`jax\.{where}`.*Use `jax.jit\(jax.shard_map"):
      call(fn)
  call(optax.trace(0.9).init)


if __name__ == "__main__":
  assert jax.device_count() == 2
  for rule in RULES:
    for axes in (AxisType.Auto, AxisType.Explicit):
      check(rule, axes)
