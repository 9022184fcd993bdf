"""Extra arguments of an update: what is no array reaches the rule as it was passed."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_lowmem as lowmem
from optax_lowmem._update.float32 import chain
from registry import every, make, tree

PARAMS = {"w": jnp.linspace(0.5, 2.0, 64 * 96).reshape(64, 96)}


def rule(norm=False, seen=None):
  """Momentum that branches upon what else it is given; with `norm`, of normalised gradients."""

  def update(updates, state, params=None, *, reset=False, k=1, mode="on", plan=None, value=0.0):
    if seen is not None:
      seen.append((reset, k, mode, plan))
    assert type(reset) is bool and type(k) is int and type(mode) is str
    length = len(range(k)) * {"on": 1.0, "off": 0.0}[mode]
    length = length * (1.0 if plan is None or plan["warm"] else 0.5)
    if norm:
      updates = jax.tree.map(lambda g: g / jnp.linalg.norm(g), updates)
    kept = 0.0 if reset else 0.5
    trace = jax.tree.map(lambda m, g: kept * m + g, state.trace, updates)
    return jax.tree.map(lambda m: length * m + value, trace), optax.TraceState(trace)

  def init(params):
    return optax.TraceState(jax.tree.map(jnp.ones_like, params))

  return optax.GradientTransformationExtraArgs(init, update)


WRAPPERS = {
  "quantized": lowmem.quantized,
  "32 bits": lambda tx: lowmem.quantized(tx, bits=32),
  "bf16": lambda tx: lowmem.quantized(tx, storage={"trace": lowmem.Dense(jnp.bfloat16)}),
  "offloaded": lowmem.offloaded,
  "both": lambda tx: lowmem.offloaded(lowmem.quantized(tx)),
  "chain": lambda tx: chain(lowmem.quantized(tx), optax.scale(1.0)),
}
GIVEN = {
  "a flag": {"reset": True},
  "an integer": {"k": 2},
  "a string": {"mode": "off"},
  "nothing": {"plan": None},
  "in a tree": {"plan": {"warm": False, "names": ["a", None]}, "k": 3},
  "beside numbers": {"reset": True, "k": 2, "value": jnp.float32(0.25)},
  "beside a float": {"k": 0, "value": 0.25},
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_no_array_is_not_traced(name, given):
  """Outside `jit`, and in a step that closes over it."""
  norm = given == "beside numbers"  # of whole arrays
  tx, plain, given = WRAPPERS[name](rule(norm)), rule(norm), GIVEN[given]
  expected, _ = plain.update(PARAMS, plain.init(PARAMS), PARAMS, **given)
  eager, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, **given)
  jitted, _ = jax.jit(lambda s: tx.update(PARAMS, s, PARAMS, **given))(tx.init(PARAMS))
  for updates in (eager, jitted):
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


@pytest.mark.parametrize("wrap", [lowmem.quantized, lowmem.offloaded])
def test_each_value_is_traced_once(wrap):
  """True is equal to 1, and yet another argument; floats and arrays are traced for all values."""
  seen = []
  tx = wrap(rule(seen=seen))
  state = tx.init(PARAMS)
  tx.update(PARAMS, state, PARAMS)
  once = len(seen)
  for value in (0.5, 0.25):
    for given in ({"k": 1}, {"k": 2}, {"reset": True}):
      tx.update(PARAMS, state, PARAMS, value=value, **given)
  assert len(seen) == 4 * once

  def typed(updates, state, params=None, *, flag):
    return jax.tree.map(lambda g: g * (2.0 if flag is True else 3.0), updates), state

  # optax's own type knows no keyword that must be given.
  rule_of_flag = optax.GradientTransformationExtraArgs(rule().init, typed)  # pyright: ignore[reportArgumentType]
  tx = wrap(rule_of_flag)
  for flag, factor in ((1, 3.0), (True, 2.0), (1, 3.0)):
    updates, _ = tx.update(PARAMS, state, PARAMS, flag=flag)
    chex.assert_trees_all_close(updates["w"], factor * PARAMS["w"])


@pytest.mark.parametrize("norm", [False, True], ids=["elementwise", "whole arrays"])
@pytest.mark.parametrize("wrap", [lowmem.quantized, lowmem.offloaded])
def test_on_a_mesh_of_explicit_axes(wrap, norm):
  mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
  tx, plain = wrap(rule(norm)), rule(norm)
  given = {"reset": True, "k": 2, "mode": "on", "value": jnp.float32(0.5)}
  expected: Any
  updates: Any
  expected, _ = plain.update(PARAMS, plain.init(PARAMS), PARAMS, **given)
  with jax.set_mesh(mesh):
    params = jax.device_put(PARAMS, jax.NamedSharding(mesh, jax.P("x", None)))
    state = tx.init(params)
    eager, _ = tx.update(params, state, params, **given)
    jitted, _ = jax.jit(lambda p, s: tx.update(p, s, p, **given))(params, state)
  for updates in (eager, jitted):
    chex.assert_trees_all_close(updates["w"], expected["w"], rtol=1e-5)


@every
def test_optimizers_take_what_others_in_a_chain_need(name):
  tx, params = make(name), tree(0, shapes={"big": (60, 128)})
  given = {"flag": True, "k": 2, "mode": "x", "nothing": None, "value": 0.5}
  updates: Any
  updates, _ = tx.update(params, tx.init(params), params, **given)
  assert jnp.isfinite(updates["big"]).all()
