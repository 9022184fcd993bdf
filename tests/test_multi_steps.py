"""`multi_steps`: sums in few bits have no bias, one bad element stays one, and it is optax."""

import functools
import math
import pickle
import re
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_lowmem as lowmem
import own_process
from optax_lowmem._state.moments import is_quantized
from optax_lowmem._steps import sums
from programs import temporaries_of, times_compiled
from registry import SHAPES, small_tiles, trained_linen, trained_nnx, tree

# Their states have fields that `optax`'s types do not know.
loss_scaling: Any = lowmem.loss_scaling
multi_steps: Any = lowmem.multi_steps

FEW = {"big": (60, 128), "lora": (512, 16), "small": (7,)}
every = pytest.mark.parametrize("bits", [8, 16])
few = functools.partial(tree, shapes=FEW)
INNER = {
  "optax.adamw": lambda: optax.adamw(1e-3),
  "adamw": lambda: lowmem.adamw(1e-3),
  "came": lambda: lowmem.came(1e-3),
  "masters": lambda: lowmem.master_weights(lowmem.adamw(1e-3)),
}


def identity():
  """Emits what it is given."""
  return optax.identity()


@functools.cache
def accumulate(bits, dtype=jnp.float32):
  """A function that gives what `inner` is given of a stack of gradients, and the last state."""

  @functools.partial(jax.jit, static_argnums=1)
  def run(stack, count, first):
    tx = multi_steps(identity(), count, bits=bits)
    state = tx.init(stack[0])._replace(gradient_step=first)

    def body(state, g):
      updates, state = tx.update(g.astype(dtype), state)
      return state, updates

    state, updates = jax.lax.scan(body, state, stack)
    return updates, state

  return run


# Error --------------------------------------------------------------------------------------------

# How far the mean of 64 gradients may lie from that in float32: root of the mean square, as a part
# of that of the mean itself; a quarter above what was measured.
ERRORS = {
  (8, "noise"): 0.074,
  (8, "signal"): 0.054,
  (8, "bfloat16"): 0.062,
  (8, "constant"): 0.0133,
  (8, "sparse"): 0.0245,
  (16, "noise"): 0.0160,
  (16, "signal"): 0.0135,
  (16, "bfloat16"): 0.0135,
  (16, "constant"): 0.0135,
  (16, "sparse"): 0.0053,
}


def gradients(kind, count=64, seed=0, shape=(256, 512)):
  """A stack: noise about a small mean, or mostly mean; of few digits; a tenth of the rows."""
  rng = np.random.default_rng(seed)
  mean = rng.standard_normal(shape) * (0.05 if kind == "noise" else 1.0)
  spread = {"signal": 0.3, "constant": 0.0}.get(kind, 1.0)
  stack = mean + spread * rng.standard_normal((count, *shape))
  if kind == "bfloat16":
    stack = np.asarray(jnp.asarray(stack, jnp.bfloat16), np.float64)
  if kind == "sparse":
    stack = stack * (rng.random((count, shape[0], 1)) < 0.1)
  return np.asarray(stack, np.float32)


@pytest.mark.parametrize(("bits", "kind"), ERRORS)
def test_the_mean_of_64_gradients_has_no_bias(bits, kind):
  stack = gradients(kind)
  exact = stack.astype(np.float64).mean(0)
  mean = np.asarray(accumulate(bits)(jnp.asarray(stack), 64, 0)[0][-1], np.float64)
  error = mean - exact
  size = np.sqrt((error**2).mean())
  assert size <= ERRORS[bits, kind] * np.sqrt((exact**2).mean())
  # Of many errors, the mean is as near to zero as chance lets it be; and away from zero nor towards
  # it, they lie neither.
  most = 5 * size / math.sqrt(error.size)
  assert abs(error.mean()) < most
  assert abs((error * np.sign(exact)).mean()) < most


@every
@pytest.mark.parametrize("kind", ["signal", "constant"])
def test_the_error_is_another_in_each_step(bits, kind):
  """Of the same gradients step by step, too: over 32 steps, errors cancel."""
  stack, count = gradients(kind, count=4, shape=(64, 512)), 32
  many = np.tile(stack, (count, 1, 1))
  means = np.asarray(accumulate(bits)(jnp.asarray(many), 4, 0)[0][3::4], np.float64)
  error = means - stack.astype(np.float64).mean(0)
  one, all_ = (np.sqrt((x**2).mean()) for x in (error, error.mean(0)))
  assert all_ < 1.6 * one / math.sqrt(count)


@every
@pytest.mark.parametrize("scale", [1e-10, 1e-3, 1e6])
def test_gradients_of_any_scale(bits, scale):
  """The same part of them is lost: a power of two would lose the same bits."""
  stack = gradients("signal", count=8, shape=(64, 512))
  errors = []
  for factor in (1.0, scale):
    scaled = (factor * stack).astype(np.float32)
    mean = np.asarray(accumulate(bits)(jnp.asarray(scaled), 8, 0)[0][-1], np.float64)
    exact = scaled.astype(np.float64).mean(0)
    errors.append(np.sqrt(((mean - exact) ** 2).mean() / (exact**2).mean()))
  np.testing.assert_allclose(errors[0], errors[1], rtol=0.05)


@every
def test_gradients_in_bfloat16(bits):
  """They are added in float32; the mean is rounded to their dtype, as optax does it."""
  stack = gradients("bfloat16", count=16, shape=(64, 512))
  full = accumulate(bits)(jnp.asarray(stack), 16, 0)
  narrow = accumulate(bits, jnp.bfloat16)(jnp.asarray(stack, jnp.bfloat16), 16, 0)
  assert narrow[0].dtype == jnp.bfloat16
  chex.assert_trees_all_equal(narrow[0][-1], full[0][-1].astype(jnp.bfloat16))


@every
def test_what_is_not_added_to_stays_exactly(bits):
  """A row that only the first gradient had is not rounded again by others."""
  stack = np.zeros((64, 64, 512), np.float32)
  stack[0] = gradients("signal", count=1, shape=(64, 512))[0]
  run = accumulate(bits)
  first = np.asarray(run(jnp.asarray(stack[:2]), 2, 0)[0][-1]) * 2
  last = np.asarray(run(jnp.asarray(stack), 64, 0)[0][-1]) * 64
  np.testing.assert_allclose(last, first, rtol=1e-6)


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_element_stays_one(bits, bad):
  """It is NaN in the mean, as optax has it, and only it; the next mean is finite."""
  stack = gradients("signal", count=16, shape=(64, 512))
  broken = stack.copy()
  broken[1, 3, 5] = bad
  ours = accumulate(bits)(jnp.asarray(broken), 8, 0)
  theirs = accumulate(32)(jnp.asarray(broken), 8, 0)[0]
  good = np.asarray(accumulate(bits)(jnp.asarray(stack), 8, 0)[0])
  updates = np.array(ours[0])
  assert np.isnan(theirs[7, 3, 5])
  assert np.isnan(updates[7, 3, 5])
  assert not updates[:7].any()
  updates[7, 3, 5] = good[7, 3, 5]
  # What shares its block has the same scale, or a smaller one without it.
  off = np.abs(updates - good)
  assert off[7].max() < 0.1
  assert (off[7] > 0).sum() <= 64
  assert np.isfinite(updates[15]).all()
  assert np.isfinite(jax.tree.leaves(ours[1].acc_grads)[0]).all()


@every
def test_a_last_gradient_that_is_infinite_is_seen(bits):
  stack = gradients("signal", count=4, shape=(64, 512))
  stack[3, 3, 5] = np.inf
  updates = np.asarray(accumulate(bits)(jnp.asarray(stack), 4, 0)[0])
  assert np.argwhere(~np.isfinite(updates)).tolist() == [[3, 3, 5]]
  assert updates[3, 3, 5] == np.inf


# Form and memory ----------------------------------------------------------------------------------


def test_32_bits_are_optax():
  """Bit for bit, of a schedule, a sum and a function that skips."""
  schedule = lambda step: jnp.where(step < 2, 2, 3)  # noqa: E731
  options = {"use_grad_mean": False, "should_skip_update_fn": optax.skip_not_finite}
  ours = multi_steps(optax.adamw(1e-3), schedule, bits=32, **options)
  theirs = optax.MultiSteps(optax.adamw(1e-3), schedule, **options)
  params = few(0)
  a, b = ours.init(params), theirs.init(params)
  for t in range(8):
    g = few(100 + t)
    if t == 3:
      g["big"] = g["big"].at[1, 2].set(jnp.nan)
    (x, a), (y, b) = ours.update(g, a, params), theirs.update(g, b, params)
    chex.assert_trees_all_equal((x, a), (y, b))
    assert bool(lowmem.has_updated(a)) == bool(theirs.has_updated(b))


@pytest.mark.parametrize(("bits", "most"), [(8, 1.0625), (16, 2.0)])
def test_bytes(bits, most):
  """Every array of at least `min_size` elements; others in float32."""
  params = tree(0)
  state = multi_steps(identity(), 4, bits=bits).init(params)
  for name, held in state.acc_grads.items():
    size, shape = lowmem.state_bytes(held)["device"], params[name].shape
    large = math.prod(shape) >= 4096
    assert size <= (most * 1.03 if large else 4) * math.prod(shape), name
    assert large or held.dtype == jnp.float32
    assert held.shape == shape


@every
@pytest.mark.parametrize("inner", INNER)
def test_state_keeps_its_form(bits, inner):
  """By `eval_shape`, `jit` and eagerly; between steps and after one; and it is compiled once."""
  tx, params = multi_steps(INNER[inner](), 2, bits=bits), few(0)
  if inner == "masters":
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
  state = tx.init(params)
  chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params), state)
  chex.assert_trees_all_equal(jax.jit(tx.init)(params), state)
  update = jax.jit(tx.update)
  now, updates = state, None
  for t in range(2):
    updates, new = update(few(t), now, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    if t == 0:
      assert not any(np.any(u) for u in jax.tree.leaves(updates))
      chex.assert_trees_all_equal(new.inner_opt_state, state.inner_opt_state)
      chex.assert_trees_all_equal(optax.apply_updates(params, updates), params)
      eager = tx.update(few(0), state, params)[1]
      chex.assert_trees_all_equal(eager, new)
    now = new
  assert all(np.any(u) for u in jax.tree.leaves(updates))
  assert not any(np.any(x) for x in jax.tree.leaves(now.acc_grads))
  assert times_compiled(update) == 1


@every
@pytest.mark.parametrize("inner", ["optax.adamw", "adamw", "came"])
def test_a_step_is_that_of_the_mean(bits, inner):
  """Of means that are read off, `inner` makes what it makes alone."""
  params = few(0)
  means = multi_steps(identity(), 2, bits=bits)
  tx, alone = multi_steps(INNER[inner](), 2, bits=bits), INNER[inner]()
  a, b, c = means.init(params), tx.init(params), alone.init(params)
  for t in range(6):
    mean, a = jax.jit(means.update)(few(t), a)
    updates, b = jax.jit(tx.update)(few(t), b, params)
    if t % 2:
      expected, c = jax.jit(alone.update)(mean, c, params)
      chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("inner", "bits"), [("identity", 8), ("optax.adamw", 16)])
def test_tiles_give_what_the_whole_array_gives(inner, bits):
  params = tree(0)
  tx = multi_steps((INNER | {"identity": identity})[inner](), 3, bits=bits)
  ends = []
  for tiles in (False, True):

    def update(g, state, tiles=tiles):
      if not tiles:
        return tx.update(g, state, params)
      with small_tiles():
        return tx.update(g, state, params)

    state, step, updates = tx.init(params), jax.jit(update), {}
    for t in range(3):
      updates, state = step(tree(100 + t), state)
    ends.append(updates)
  for k in SHAPES:  # an ulp may turn a code
    off = np.abs(ends[0][k] - ends[1][k])
    assert not off.size or (off > 1e-6).mean() < 1e-3


# Bits, what is within, dtype of gradients; and bytes a parameter beside gradient and update. Room
# for the mean of a bfloat16 gradient, if nothing that is returned can take the gradient's place; of
# an array of 1024 x 1024 more, as a tile has 32,768 elements at least. What is replaced in bfloat16
# is copied before jax 0.12, which would convert all of it for each tile.
COPIED = 0.0 if jax.__version_info__ >= (0, 12) else 2.0
CPU: dict[tuple[int, str, str, int], float] = {
  (8, "adamw", "float32", 2048): 0.1,
  (8, "identity", "float32", 2048): 0.1,
  (8, "identity", "float32", 1024): 0.3,
  (8, "optax.adamw", "float32", 2048): 0.1,
  (8, "adamw", "bfloat16", 2048): 2.1 + COPIED,
  (16, "identity", "float32", 2048): 0.1 + COPIED,
  (16, "adamw", "float32", 2048): 0.1 + COPIED,
  (16, "optax.adamw", "float32", 2048): 0.1 + COPIED,
  (16, "adamw", "bfloat16", 2048): 2.1 + COPIED,
}


@pytest.mark.parametrize(("bits", "inner", "dtype", "side"), CPU)
def test_no_array_of_float32_beside_gradient_and_update(bits, inner, dtype, side):
  """On a CPU; compiled for an H100: `tests/test_accelerator_steps.py`."""
  rule = identity() if inner == "identity" else INNER[inner]()
  tx = multi_steps(rule, 4, bits=bits)
  params = {"w": jax.ShapeDtypeStruct((side, side), jnp.float32)}
  grads = {"w": jax.ShapeDtypeStruct((side, side), dtype)}
  state = jax.eval_shape(tx.init, params)
  donated = (0, 1) if dtype == "float32" else (1,)
  update = jax.jit(tx.update, donate_argnums=donated).lower(grads, state, params)
  assert temporaries_of(update.compile()) <= CPU[bits, inner, dtype, side] * side**2


# Composed -----------------------------------------------------------------------------------------


def trained(tx, params, count, state=None, first=0):
  @jax.jit
  def step(params, state, g):
    updates, state = tx.update(g, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params) if state is None else state
  for t in range(first, first + count):
    params, state = step(params, state, few(100 + t))
  return params, state


AROUND = {
  "chain": lambda tx: optax.chain(optax.clip(10.0), tx),
  "masked": lambda tx: optax.masked(tx, {"big": True, "lora": True, "small": False}),
  "partition": lambda tx: optax.partition(
    {"a": tx, "b": optax.identity()}, {"big": "a", "lora": "a", "small": "b"}
  ),
  "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
  "offloaded": lambda tx: lowmem.offloaded(tx, min_bytes=64),
  "loss_scaling": lambda tx: loss_scaling(tx, 1.0, growth_interval=None),
}


@every
@pytest.mark.parametrize("around", AROUND)
def test_composes(bits, around):
  build = lambda: multi_steps(lowmem.adamw(1e-3), 2, bits=bits)  # noqa: E731
  params, state = trained(AROUND[around](build()), few(0), 4)
  expected, _ = trained(build(), few(0), 4)
  if around == "offloaded":
    state = lowmem.unpaged(state)
  found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.MultiStepsState))
  assert any(isinstance(x, optax.MultiStepsState) for x in found)
  assert bool(lowmem.has_updated(state))
  for k in ("big", "lora"):
    np.testing.assert_allclose(params[k], expected[k], rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("order", ["around", "within"])
def test_master_weights(bits, order):
  """Around it and within it the masters are the same, and stay between steps."""
  narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), few(0))
  rule = optax.sgd(1e-3)
  if order == "around":
    tx = multi_steps(lowmem.master_weights(rule), 2, bits=bits)
  else:
    tx = lowmem.master_weights(multi_steps(rule, 2, bits=bits))
  start = lowmem.master_params(narrow, tx.init(narrow))
  params, state = trained(tx, narrow, 1)
  chex.assert_trees_all_equal(lowmem.master_params(params, state), start)
  params, state = trained(tx, params, 1, state, first=1)
  for k, w in lowmem.master_params(params, state).items():
    mean = (np.asarray(few(100)[k]) + np.asarray(few(101)[k])) / 2
    off = np.abs(np.asarray(w) - (np.asarray(start[k]) - 1e-3 * mean))
    assert off.mean() < 1e-3 * 0.02


@every
def test_a_schedule_and_what_is_skipped(bits):
  """As many gradients as it says; those that are left out count for nothing."""
  schedule = lambda step: jnp.where(step == 0, 2, 3)  # noqa: E731
  tx = multi_steps(optax.sgd(1.0), schedule, bits=bits, should_skip_update_fn=optax.skip_not_finite)
  like = optax.MultiSteps(optax.sgd(1.0), schedule, should_skip_update_fn=optax.skip_not_finite)
  params, update = few(0), jax.jit(tx.update)
  ours, theirs, before = tx.init(params), like.init(params), None
  expected: Any
  chex.assert_trees_all_equal_shapes_and_dtypes(ours.skip_state, theirs.skip_state)
  for t in range(9):
    g = few(100 + t)
    if t in (1, 4):
      g["big"] = g["big"].at[2, 3].set(jnp.nan)
      before = ours.acc_grads
    updates, ours = update(g, ours, params)
    expected, theirs = like.update(g, theirs, params)
    if t in (1, 4):
      chex.assert_trees_all_equal(ours.acc_grads, before)
    for name in ("mini_step", "gradient_step", "skip_state"):
      chex.assert_trees_all_equal(getattr(ours, name), getattr(theirs, name))
    for k in FEW:
      assert np.abs(np.asarray(updates[k]) - np.asarray(expected[k])).max() < 0.1
  assert int(ours.gradient_step) == 2
  assert times_compiled(update) == 1


@every
def test_a_sum_instead_of_the_mean(bits):
  params = few(0)
  tx = multi_steps(identity(), 2, bits=bits, use_grad_mean=False)
  state, updates = tx.init(params), {}
  for t in range(2):
    updates, state = tx.update(few(t), state)
  np.testing.assert_allclose(updates["small"], few(0)["small"] + few(1)["small"], rtol=1e-6)


@every
def test_hyperparameters_are_injected(bits):
  """Within it, and around it with what is no array told."""
  within = multi_steps(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5), 1, bits=bits)
  params = few(0)
  state: Any = within.init(params)
  update = jax.jit(within.update)
  update(few(1), state, params)
  state.inner_opt_state.hyperparams["learning_rate"] = jnp.float32(0.0)
  assert not np.any(update(few(1), state, params)[0]["big"])
  assert times_compiled(update) == 1
  around = optax.inject_hyperparams(
    lambda lr, bits: multi_steps(optax.sgd(lr), 1, bits=bits), static_args=("bits",)
  )(lr=0.5, bits=bits)
  updates: Any
  updates, _ = around.update(few(1), around.init(params), params)
  np.testing.assert_allclose(updates["small"], -0.5 * few(1)["small"], rtol=1e-6)
  with pytest.raises(TypeError, match="static_args="):
    optax.inject_hyperparams(lambda bits: multi_steps(identity(), 2, bits=bits))(bits=8).init(
      params
    )


@every
def test_extra_arguments_reach_the_inner_transformation(bits):
  def update(updates, state, params=None, *, value=0.0, flag=False, **extra_args):
    del params, extra_args
    factor = value if flag else 0.0
    return jax.tree.map(lambda g: -factor * g, updates), state

  inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
  tx = multi_steps(inner, 1, bits=bits)
  params = few(0)
  updates: Any
  updates, _ = tx.update(few(1), tx.init(params), params, value=0.5, flag=True)
  np.testing.assert_allclose(updates["small"], -0.5 * few(1)["small"], rtol=1e-6)


@every
def test_vmap_and_a_donated_scan(bits):
  tx = multi_steps(lowmem.adamw(1e-3, min_size=256), 2, bits=bits, min_size=256)
  params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((2, 20, 64)), jnp.float32)}
  state, batched = jax.vmap(tx.init)(params), params
  for _ in range(2):
    batched, state = jax.jit(jax.vmap(tx.update))(params, state, params)
  layer = {"w": params["w"][1]}
  alone, updates = tx.init(layer), {}
  for _ in range(2):
    updates, alone = jax.jit(tx.update)(layer, alone, layer)
  np.testing.assert_allclose(batched["w"][1], updates["w"], rtol=1e-5, atol=1e-9)

  def body(carry, _):
    updates, state = tx.update(layer, carry[1], carry[0])
    return (optax.apply_updates(carry[0], updates), state), None

  run = jax.jit(lambda c: jax.lax.scan(body, c, length=4)[0], donate_argnums=0)
  params, state = run((jax.tree.map(jnp.copy, layer), tx.init(layer)))
  assert int(state.gradient_step) == 2
  assert np.isfinite(params["w"]).all()


@every
def test_tree_utilities_see_the_state(bits):
  params, tx = few(0), multi_steps(lowmem.adamw(1e-3), 2, bits=bits)
  state: Any = trained(tx, params, 1)[1]
  same = optax.tree.map_params(tx, lambda x: x, state, is_leaf=lowmem.is_stored)
  chex.assert_trees_all_equal(same, state)
  assert is_quantized(optax.tree.get(state, "mu")["big"])
  assert int(optax.tree.get(state, "mini_step")) == 1
  dense = lowmem.dequantized(state)
  assert np.abs(np.asarray(dense.acc_grads["big"]) - few(100)["big"]).max() < 0.1


def orbax(state, like, path):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path / "state", state)
    checkpointer.wait_until_finished()
    return checkpointer.restore(path / "state", like)


WAYS = {"orbax": orbax, "pickle": lambda state, *_: pickle.loads(pickle.dumps(state))}


@every
@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_is_resumed_is_the_same(bits, way, tmp_path):
  """In the middle of a step, too."""
  tx = multi_steps(lowmem.adamw(1e-3), 2, bits=bits)
  params, state = trained(tx, few(0), 3)
  restored = WAYS[way]((params, state), (few(0), tx.init(few(0))), tmp_path)
  chex.assert_trees_all_equal(restored, (params, state))
  ends = [trained(tx, each[0], 3, each[1], first=3) for each in ((params, state), restored)]
  chex.assert_trees_all_equal(*ends)


@every
def test_trains_flax_models(bits):
  def tx():
    return multi_steps(lowmem.adamw(3e-2), 2, bits=bits)

  losses, _ = trained_nnx(tx())
  assert losses[0] == losses[1]
  assert losses[-1] < losses[0]
  losses, state, compiled = trained_linen(tx())
  assert losses[0] == losses[1]
  assert losses[-1] < losses[0]
  assert int(state.opt_state.gradient_step) == 4
  assert compiled == 1


# Refused ------------------------------------------------------------------------------------------

REFUSED = {
  "bits": (lambda: multi_steps(identity(), 2, bits=4), ValueError, "`bits` must be one of"),
  "none": (lambda: multi_steps(identity(), 0), ValueError, "`every_k` must be at least 1"),
  "half": (lambda: multi_steps(identity(), 1.5), TypeError, "must be an integer, or a func"),
  "class": (lambda: multi_steps(optax.adam, 2), TypeError, "`inner` must be an optax"),
  "block": (
    lambda: multi_steps(identity(), 2, block_size=64),
    ValueError,
    "`block_size` is of `bits=8` alone",
  ),
  "odd": (
    lambda: multi_steps(identity(), 2, bits=8, block_size=3),
    ValueError,
    "`block_size` must be a positive multiple of 2",
  ),
  "whole": (
    lambda: multi_steps(identity(), 2).init(jnp.arange(3)),
    TypeError,
    "accumulated of floating arrays",
  ),
  "skip": (
    lambda: multi_steps(identity(), 2, should_skip_update_fn=3),
    TypeError,
    "`should_skip_update_fn` must be a function",
  ),
  "mean": (lambda: multi_steps(identity(), 2, use_grad_mean="no"), TypeError, "`use_grad_mean`"),
  "not a state": (lambda: lowmem.has_updated(()), ValueError, "it holds 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
  call, error, message = REFUSED[case]
  with pytest.raises(error, match=message):
    call()


@every
def test_refuses_sums_that_are_held_otherwise(bits):
  params, other = few(0), 24 - bits
  state = multi_steps(identity(), 2, bits=other).init(params)
  with pytest.raises(ValueError, match="made with other `bits`"):
    multi_steps(identity(), 2, bits=bits).update(params, state)
  state = multi_steps(identity(), 2, bits=bits).init({"big": params["big"]})
  with pytest.raises(ValueError, match="sums of 1 parameters"):
    multi_steps(identity(), 2, bits=bits).update(params, state)


@every
def test_means_of_optax_are_not_taken_for_sums(bits):
  """Nor sums for means: optax holds the mean of the gradients so far."""
  params, g = few(0), few(1)
  theirs, ours = multi_steps(optax.sgd(1.0), 4, bits=32), multi_steps(optax.sgd(1.0), 4, bits=bits)
  _, state = theirs.update(g, theirs.init(params), params)
  with pytest.raises(ValueError, match="made with other `bits`"):
    ours.update(g, state, params)
  with pytest.raises(ValueError, match="in the midst of a step, 1 gradients"):
    lowmem.convert_state(state, theirs, ours, params)
  _, state = ours.update(g, ours.init(params), params)
  with pytest.raises(ValueError, match="in the midst of a step"):
    lowmem.convert_state(state, ours, theirs, params)
  for _ in range(3):
    _, state = ours.update(g, state, params)
  assert lowmem.has_updated(lowmem.convert_state(state, ours, theirs, params))


@every
def test_a_tree_without_arrays(bits):
  tx = multi_steps(optax.adam(1e-3), 2, bits=bits)
  updates, state = tx.update({}, tx.init({}), {})
  assert updates == {} and int(state.mini_step) == 1


def test_what_is_rounded_to_zero_is_not_taken_for_a_bad_element():
  """By bits: a CPU takes such numbers for zero before they are rounded, a GPU does not."""
  x = jax.lax.bitcast_convert_type(jnp.array([-(2**31) + 7, -(2**31), 7], jnp.int32), jnp.float32)
  for noise in (0, 2**16 - 1):
    rounded = sums._rounded(x, jnp.full(3, noise, jnp.int32))
    bits = jax.lax.bitcast_convert_type(rounded, jnp.uint16)
    assert [int(b) == 0x8000 for b in bits] == [False, True, False]


def test_what_is_kept_of_skipped_gradients_keeps_its_dtype():
  """Of gradients in float16, for parameters in float32, in a scan."""
  skips = functools.partial(optax.skip_large_updates, max_squared_norm=1e3)
  tx = multi_steps(optax.sgd(0.1), 2, should_skip_update_fn=skips)
  params = jnp.ones((64, 64))

  def step(state, _):
    _, state = tx.update(params.astype(jnp.float16) / 64, state, params)
    return state, ()

  state, _ = jax.lax.scan(step, tx.init(params), length=2)
  assert bool(lowmem.has_updated(state))


@every
def test_refuses_what_pages_its_state_within(bits):
  tx = multi_steps(lowmem.offloaded(lowmem.adamw(1e-3), min_bytes=64), 2, bits=bits)
  swap = re.escape("Swap them: `offloaded(lowmem.multi_steps(tx, …))`")
  with pytest.raises(ValueError, match=swap):
    tx.init(few(0))


# Sharded ------------------------------------------------------------------------------------------


def check_sharded(kind):
  """Results and layouts on eight devices; no collective."""
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
  specs = {"big": P("a", "b"), "lora": P("b", None), "small": P()}
  where = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
  for bits in (8, 16):
    for inner in ("optax.adamw", "adamw"):
      tx, ends = multi_steps(INNER[inner](), 2, bits=bits), []
      for sharded in (False, True):
        params = jax.device_put(few(0), where) if sharded else few(0)
        state = tx.init(params)

        @jax.jit
        def step(params, state, g, tx=tx):
          updates, state = tx.update(g, state, params)
          return optax.apply_updates(params, updates), state

        for t in range(4):
          g = jax.device_put(few(t), where) if sharded else few(t)
          params, state = step(params, state, g)
        ends.append(params)
      for k in FEW:
        assert ends[1][k].sharding.is_equivalent_to(where[k], 2), (bits, inner, k)
        # An ulp may turn a code.
        off = np.abs(np.asarray(ends[0][k]) - np.asarray(ends[1][k]))
        assert off.mean() < 1e-5, (bits, inner, k, off.mean())
      held = state.acc_grads["lora"]
      codes = held.codes if bits == 8 else held
      assert codes.sharding.is_equivalent_to(where["lora"], 2)
      laid = lowmem.state_shardings(tx, few(0), where)
      assert jax.tree.leaves(laid.acc_grads["lora"])[0].is_equivalent_to(where["lora"], 2)
      compiled = step.lower(params, state, jax.device_put(few(0), where)).compile()
      assert not own_process.moves_of(compiled), (bits, inner)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_eight_devices(kind):
  own_process.printed(__file__, kind)


if __name__ == "__main__":
  assert jax.device_count() == 8
  check_sharded(AxisType[sys.argv[1]])
