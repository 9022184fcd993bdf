"""Sharded parameters give the results of unsharded ones, in a process of eight devices."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import optax_lowmem as lowmem

assert jax.device_count() == 8
params, grads = jax.random.normal(jax.random.key(0), (2, 512, 256))
tx = lowmem.adamw(1e-2)
expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
for kind in (AxisType.Auto, AxisType.Explicit):
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
  with jax.set_mesh(mesh):
    for spec in (P("a"), P(None, "a"), P("a", "b")):
      p, g = jax.device_put((params, grads), NamedSharding(mesh, spec))
      state = tx.init(p)
      assert state[0].mu.codes.sharding.is_equivalent_to(p.sharding, 2)
      updates, new = jax.jit(tx.update)(g, state, p)
      np.testing.assert_array_equal(updates, expected)
      if kind == AxisType.Explicit:
        assert updates.sharding.is_equivalent_to(p.sharding, 2)
        assert new[0].mu.codes.sharding.is_equivalent_to(p.sharding, 2)
print("equal")
"""


def test_sharded_updates_equal_unsharded_ones():
  devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM], env=os.environ | devices, capture_output=True, text=True
  )
  assert done.stdout.endswith("equal\n"), done.stderr
