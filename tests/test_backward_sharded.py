"""The update in the backward pass of layers that are cut over eight devices."""

import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowmem as lowmem
import own_process

LAYERS, WIDTH = 3, 64
SPECS = {
  "outer": {"out": PartitionSpec("x")},
  "layers": {
    "norm": PartitionSpec(),
    "w": PartitionSpec(None, "x"),
    "v": PartitionSpec(None, None, "x"),
  },
}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_eight_devices(kind):
  own_process.printed(__file__, kind)


# In the processes of eight devices ----------------------------------------------------------------


def parameters():
  keys = jax.random.split(jax.random.key(0), 3)
  return {
    "outer": {"out": jax.random.normal(keys[0], (WIDTH, 4)) / 8},
    "layers": {
      "norm": jnp.ones((LAYERS, WIDTH)),
      "w": jax.random.normal(keys[1], (LAYERS, WIDTH, 128)) / 8,
      "v": jax.random.normal(keys[2], (LAYERS, 128, WIDTH)) / 11,
    },
  }


def whole(tree):
  """Gathered, as a layer's parameters are to be computed with; on automatic axes XLA does so."""

  def one(a):
    explicit = AxisType.Explicit in jax.typeof(a).sharding.mesh.axis_types
    return jax.sharding.reshard(a, PartitionSpec()) if explicit else a

  return jax.tree.map(one, tree)


def layer(p, x, batch):
  p = whole(p)
  return x + jnp.tanh((x * p["norm"]) @ p["w"]) @ p["v"]


def head(outer, x, batch):
  return ((x @ whole(outer)["out"]) ** 2).mean()


def run(tx, params, where=None, is_paged=False):
  training = lowmem.update_in_backward(lambda outer, x: x, layer, head, tx, clip_norm=0.1)
  state, x = training.init(params), jnp.sin(jnp.arange(8.0 * WIDTH)).reshape(8, WIDTH)
  assert is_paged == bool(lowmem.state_bytes(state)["pinned_host"])
  before = jax.tree.map(lambda a: a.sharding, (params, state))
  kinds = jax.tree.map(lambda a: a.sharding.memory_kind, (params, state))
  # Automatic axes are laid out by XLA, unless it is told.
  out: Any = {} if where != AxisType.Auto else {"out_shardings": (None, *before)}
  step = jax.jit(chex.assert_max_traces(training.step, n=1), donate_argnums=(0, 1), **out)
  chex.clear_trace_counter()
  for _ in range(2):
    _, params, state = step(params, state, x)
  if where is not None:
    after = jax.tree.map(
      lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), (params, state), before
    )
    assert all(jax.tree.leaves(after))
    assert jax.tree.map(lambda a: a.sharding.memory_kind, (params, state)) == kinds
    codes = lowmem.unpaged(state)["layers"][0].mu["w"].codes.sharding
    assert codes.shard_shape((LAYERS, WIDTH, 128)) == (LAYERS, WIDTH // 8, 128)
  return jax.tree.map(np.asarray, params)


def main(kind):
  assert jax.device_count() == 8
  tx = lowmem.adamw(1e-3, min_size=256)
  want = run(tx, parameters())
  mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
  is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
  where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=is_spec)
  with jax.set_mesh(mesh):
    got = run(tx, jax.device_put(parameters(), where), kind)
    paged = run(lowmem.offloaded(tx, min_bytes=64), jax.device_put(parameters(), where), kind, True)
  chex.assert_trees_all_close(got, want, atol=2e-4)  # a gradient's last bit may turn a code
  chex.assert_trees_all_equal(paged, got)


if __name__ == "__main__":
  main(AxisType[sys.argv[1]])
