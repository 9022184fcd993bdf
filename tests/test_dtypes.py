"""Parameters and storages of other dtypes than float32."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from optax_lowmem._state.moments import Kind, field_of, kind_of, places
from registry import LR, REGISTRY, every_rule, make, reference, tree

SHAPES = {"w": (64, 96), "b": (3,)}
NUMBERED = ["adamw-8", "lamb-8", "lars-8", "adafactor-8", "came-8"]


@pytest.mark.parametrize("how", ["8 bits", "32 bits", "offloaded"])
@pytest.mark.parametrize("name", NUMBERED)
def test_a_parameter_may_be_a_python_number(name, how):
  """Passed to a step, and closed over by a compiled one."""
  params = {"w": tree(0)["big"], "b": 1.0}
  arrays = params | {"b": jnp.float32(1.0)}
  tx = make(name, bits=32 if how == "32 bits" else 8)
  tx = lowmem.offloaded(tx) if how == "offloaded" else tx
  state = tx.init(params)
  chex.assert_trees_all_equal(state, tx.init(arrays))
  expected, _ = jax.jit(tx.update)(arrays, state, arrays)

  def update(state):
    return tx.update(params, state, params)[0]

  for call in (update, jax.jit(update)):
    chex.assert_trees_all_close(call(state), expected, rtol=1e-5)


@every_rule
def test_moments_in_float8(name):
  """Of rules by parts and on whole arrays: the first update is that of float32."""
  params = tree(0, shapes=SHAPES)
  shaped = jax.eval_shape(reference(name).init, params)
  kinds = {field_of(m): kind_of(shaped, m) for m in places(shaped, params)}
  wide, narrow = lowmem.Dense(jnp.float8_e5m2), lowmem.Dense(jnp.float8_e4m3fn)
  storage = {f: wide if k is Kind.SECOND else narrow for f, k in kinds.items() if f and k}
  tx = lowmem.quantized(reference(name), storage=storage)
  update = jax.jit(tx.update)
  updates, state = update(params, tx.init(params), params)
  start = jax.tree.map(lambda x, like: x.astype(like.dtype), tx.init(params), shaped)
  expected, _ = jax.jit(reference(name).update)(params, start, params)
  chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)
  updates, new = update(params, state, params)
  chex.assert_tree_all_finite(updates)
  held = [x.dtype.itemsize for x in jax.tree.leaves(new) if x.shape == (64, 96)]
  assert len(held) >= REGISTRY[name].moments and set(held) <= {1, 4} and 1 in held
  chex.assert_trees_all_equal_shapes_and_dtypes(state, new)


def at_32_bits(name, dtype):
  """Updates and state of parameters of `dtype`, and optax's of the same numbers in float32."""
  params, grads = tree(0, 1.0, dtype, SHAPES), tree(1, 1e-2, dtype, SHAPES)
  plain = jax.tree.map(lambda x: x.astype(jnp.float32), (params, grads))
  results = []
  for tx, (p, g) in ((make(name, bits=32), (params, grads)), (reference(name), plain)):
    update, state, updates = jax.jit(tx.update), tx.init(p), g
    for _ in range(3):
      updates, state = update(g, state, p)
    results.append((updates, state))
  return results


@every_rule
def test_32_bits_of_bfloat16_are_float32_rounded_once(name):
  """Not optax's of bfloat16, whose averages stand still: those of the same numbers in float32."""
  (updates, state), (expected, exact) = at_32_bits(name, jnp.bfloat16)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, exact)
  chex.assert_trees_all_close(state, exact, rtol=1e-6, atol=1e-12)
  for k, u in updates.items():
    assert u.dtype == jnp.bfloat16
    eps = jnp.finfo(jnp.bfloat16).eps
    np.testing.assert_allclose(u.astype(jnp.float32), expected[k], rtol=float(eps), atol=1e-7)


@pytest.mark.parametrize("name", ["adamw-8", "lamb-8", "adafactor-8"])
def test_32_bits_of_float64_are_float32(name):
  with jax.enable_x64(True):
    (updates, state), (expected, exact) = at_32_bits(name, jnp.float64)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, exact)
    chex.assert_trees_all_close(state, exact, rtol=1e-6, atol=1e-12)
    assert {u.dtype for u in updates.values()} == {jnp.dtype(jnp.float64)}
    chex.assert_trees_all_close(updates, expected, rtol=1e-6, atol=1e-12)


def test_32_bits_of_bfloat16_take_what_float32_takes():
  params = {"w": jnp.ones((64, 128), jnp.bfloat16)}
  size = lambda tx: lowmem.state_bytes(tx.init(params))["device"]  # noqa: E731
  assert size(lowmem.adam(LR, bits=32)) == 4 + 2 * 4 * 64 * 128
  assert size(optax.adam(LR)) == 4 + 2 * 2 * 64 * 128
