"""Law 7, plain optax: every transformation composes, traces, trains and is saved as optax's do."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import optax_lowmem as lowmem
from optax_lowmem._update.tile_loop import map_tiles
from own_process import printed
from programs import times_compiled
from registry import (
  LAWFUL,
  LR,
  REGISTRY,
  REPRESENTATIVES,
  STORED,
  TRACES,
  WRAPPED,
  adamw,
  every,
  lawful,
  make,
  quantized_leaves,
  reference,
  run,
  start,
  trained_linen,
  trained_nnx,
  tree,
)

FEW = {"w": (48, 96), "lora": (512, 16), "b": (5,)}


# State --------------------------------------------------------------------------------------------


@lawful
def test_state_keeps_structure_shapes_dtypes_and_weak_types(name):
  _, new = run(name, 2)
  state = start(name, "whole")[1]
  chex.assert_trees_all_equal_structs(new, state)
  assert [jax.typeof(x) for x in jax.tree.leaves(new)] == [
    jax.typeof(x) for x in jax.tree.leaves(state)
  ]


@lawful
def test_compiles_once(name):
  """However many steps, from `init`'s state or from one that came out."""
  run(name, 3)
  assert TRACES[name, "whole"] == 1


def test_the_first_step_of_a_process_compiles_once():
  """Nothing is imported in it that adds to what jax caches programs by, as Pallas does.

  A process of its own: here, what an earlier test has imported is there.
  """
  code = """
import jax, jax.numpy as jnp, optax_lowmem as lowmem
tx, x, traces = lowmem.adamw(1e-2), jnp.ones((256, 256)), []
step, state = jax.jit(lambda g, s: (traces.append(g), tx.update(g, s, g))[1]), tx.init(x)
for _ in range(3):
  updates, state = step(x, state)
print(len(traces))
"""
  assert printed("-c", code, devices=1) == "1\n"


@lawful
def test_init_is_the_same_without_data(name):
  params, state = start(name, "whole")
  shaped = jax.eval_shape(make(name).init, params)
  chex.assert_trees_all_equal_structs(shaped, state)
  chex.assert_trees_all_equal_shapes_and_dtypes(shaped, state)
  chex.assert_trees_all_equal(jax.jit(make(name).init)(params), state)


@lawful
def test_tree_utilities_see_the_state(name):
  _, state = run(name, 1)
  chex.assert_trees_all_equal(optax.tree.map_params(make(name), lambda x: x, state), state)
  fields = ("mu", "nu", "trace", "sum_of_squares", "m1", "m2", "nu_max", "m", "v", "n", "g", "ema")
  fields = (*fields, "acc_grads")
  found = [optax.tree.get_all_with_path(state, field) for field in fields]
  assert len(quantized_leaves(found)) == len(STORED) * LAWFUL[name].moments


@pytest.mark.parametrize("name", ["adamw-8", "adamw-4", "sgd-8", "rmsprop-8", "came-8", *WRAPPED])
def test_donation_reuses_the_state(name):
  tx, params = make(name), tree(0, dtype=LAWFUL[name].dtype, shapes=FEW)
  state = tx.init(params)
  update = jax.jit(tx.update, donate_argnums=1)
  before = [q.codes.unsafe_buffer_pointer() for q in quantized_leaves(state)]
  _, new = update(tree(1, shapes=FEW), state, params)
  assert all(q.codes.is_deleted() for q in quantized_leaves(state))
  after = [q.codes.unsafe_buffer_pointer() for q in quantized_leaves(new)]
  assert set(after) == set(before)


# Transformations of optax around it, and within ---------------------------------------------------


KINDS = {
  "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
  "masked": lambda tx: optax.masked(tx, {"w": True, "lora": False, "b": True}),
  "partition": lambda tx: optax.partition(
    {"a": tx, "b": optax.sgd(0.1)}, {"w": "a", "lora": "b", "b": "a"}
  ),
  "partition_with_muon": lambda tx: optax.partition(
    {"a": tx, "b": contrib.muon(LR)}, {"w": "b", "lora": "a", "b": "a"}
  ),
  "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
  "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
  "scheduled": lambda tx: optax.chain(tx, optax.scale_by_schedule(lambda t: 1.0 / (1 + t))),
  "schedule_free": lambda tx: contrib.schedule_free(tx, LR),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def steps(tx, count, params, gradients):
  """Parameters and state after some steps of training."""

  @jax.jit
  def step(params, state, g):
    updates, state = tx.update(g, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for t in range(count):
    params, state = step(params, state, gradients(t))
  return params, state


def assert_near(ours, exact, start, error):
  """That both travelled the same way; Adam's first, equal steps make it easier than one update."""
  for k in start:
    travelled = np.abs(exact[k] - start[k]).mean()
    assert np.abs(ours[k] - exact[k]).mean() <= error * travelled


@pytest.mark.parametrize(
  ("name", "kind"),
  [(n, k) for n in REGISTRY for k in KINDS if n in REPRESENTATIVES or k == "partition"],
)
def test_wrappers_keep_the_state(name, kind):
  tx, params = KINDS[kind](make(name)), jax.eval_shape(lambda: tree(0, shapes=FEW))
  state = jax.eval_shape(tx.init, params)
  updates, new = jax.eval_shape(tx.update, params, state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
  leaves = 1 if kind in ("masked", "partition", "partition_with_muon") else 2
  assert len(quantized_leaves(new)) == leaves * REGISTRY[name].moments


@adamw
@every_kind
def test_composes(name, kind):
  params = tree(0, shapes=FEW)
  ours, exact = (
    steps(KINDS[kind](tx), 4, params, lambda t: tree(100 + t, shapes=FEW))[0]
    for tx in (make(name), reference(name))
  )
  assert_near(ours, exact, params, REGISTRY[name].error)


INNER = {
  "clipped": lambda: optax.chain(optax.clip(0.5), optax.adamw(LR)),
  "masked": lambda: optax.masked(optax.adamw(LR), {"w": True, "lora": False, "b": True}),
  "partition": lambda: optax.partition(
    {"a": optax.adamw(LR), "b": optax.sgd(0.1, 0.9)}, {"w": "a", "lora": "b", "b": "b"}
  ),
  "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=LR),
  "muon": lambda: contrib.muon(LR),
  "schedule_free": lambda: contrib.schedule_free(optax.adamw(LR, b1=0.0), LR),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", INNER)
def test_quantizes_what_is_composed(kind, bits):
  """The moments are found in the wrappers' state, and the trajectory is theirs."""
  inner, params = INNER[kind](), tree(0, shapes=FEW)
  results = [
    steps(tx, 4, params, lambda t: tree(100 + t, shapes=FEW))
    for tx in (lowmem.quantized(inner, bits), inner)
  ]
  (ours, state), (exact, _) = results
  held = {"clipped": 4, "masked": 2, "partition": 3, "injected": 4, "muon": 2, "schedule_free": 4}
  assert len(quantized_leaves(state)) == held[kind]
  assert_near(ours, exact, params, REGISTRY[f"adamw-{bits}"].error)


@every
def test_inject_hyperparams(name):
  tx = optax.inject_hyperparams(lambda lr: make(name, lr))(lr=LR)
  params, g = ({k: tree(t, shapes=FEW)[k] for k in "wb"} for t in (0, 1))
  state: Any = tx.init(params)
  update = jax.jit(tx.update)
  once, _ = update(g, state, params)
  state.hyperparams["lr"] = jnp.float32(2 * LR)
  twice, _ = update(g, state, params)
  assert times_compiled(update) == 1
  chex.assert_trees_all_close(twice, jax.tree.map(lambda u: 2 * u, once), rtol=1e-5)


# Transformations of JAX ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGISTRY)
def test_jit_vmap_and_scan_over_layers_agree(name):
  """Stacked layers (L, d, f): the state of each is that of a layer alone."""
  tx, shapes = make(name, min_size=256), {"w": (2, 20, 64), "b": (2, 5)}
  params, g = tree(0, shapes=shapes), tree(1, shapes=shapes)

  def scanned(*args):
    return jax.lax.scan(lambda c, x: (c, tx.update(*x)), None, args)[1]

  @jax.jit
  def stacked(*args):
    return jax.vmap(tx.update)(*args), scanned(*args)

  def twice(update, init, params, g):
    _, state = update(g, init(params), params)
    return update(g, state, params)

  alone = functools.partial(twice, jax.jit(tx.update), jax.jit(tx.init))
  _, state = stacked(g, jax.jit(jax.vmap(tx.init))(params), params)[0]
  both = stacked(g, state, params)
  for i in range(2):
    updates, state = alone(*jax.tree.map(lambda x, i=i: x[i], (params, g)))
    assert len(quantized_leaves(state)) == REGISTRY[name].moments
    for batch in both:
      got, held = jax.tree.map(lambda x, i=i: x[i], batch)
      chex.assert_trees_all_equal_shapes_and_dtypes(held, state)
      for k in got:
        # An ulp may turn a code of a dithered book: 0.6 % of them, by 3 %.
        assert np.abs(got[k] - updates[k]).mean() <= 5e-4 * np.abs(updates[k]).mean()


@pytest.mark.parametrize("name", ["adamw-8", "adamw-4", "lion-8"])
def test_layers_stacked_in_one_array_train_as_layers_apart(name):
  """The usual scan over layers: parameters (L, d, f), one update of the whole stack."""
  stack, single = {"w": (3, 64, 96)}, [{"w": (64, 96)}] * 3
  tx, params, g = make(name), tree(0, shapes=stack), tree(1, shapes=stack)

  @jax.jit
  def loss_and_step(params, state, x):
    def loss(params):
      def layer(x, w):
        return x + jnp.tanh(x @ w) @ w.T * 0.01, None

      return jnp.mean(jax.lax.scan(layer, x, params["w"])[0] ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = tx.update(gradients, state, params)
    return value, optax.apply_updates(params, updates), state

  state, trained, values = tx.init(params), params, []
  for _ in range(3):
    value, trained, state = loss_and_step(trained, state, jnp.ones((4, 64)))
    values.append(float(value))
  assert values[2] < values[0]
  # And the stack's update is that of its layers, block by block.
  updates, _ = jax.jit(tx.update)(g, tx.init(params), params)
  for i in range(len(single)):
    layer = {"w": params["w"][i]}
    apart, _ = jax.jit(tx.update)({"w": g["w"][i]}, tx.init(layer), layer)
    np.testing.assert_allclose(updates["w"][i], apart["w"], rtol=1e-6)


@adamw
def test_eager_steps_are_compiled_ones(name):
  params, g = tree(0, shapes=FEW), tree(1, shapes=FEW)
  tx = make(name)
  eager = tx.update(g, tx.init(params), params)
  chex.assert_trees_all_equal(jax.jit(tx.update)(g, tx.init(params), params), eager)


# Flax and Orbax -----------------------------------------------------------------------------------


@adamw
def test_trains_an_nnx_model(name):
  losses, _ = trained_nnx(make(name))
  assert losses[-1] < 0.5 * losses[0]


@adamw
def test_trains_a_linen_state(name):
  losses, state, compiled = trained_linen(make(name))
  assert losses[-1] < 0.5 * losses[0]
  assert len(quantized_leaves(state.opt_state)) == 2
  assert compiled == 1


@pytest.mark.parametrize("name", ["adamw-8", "came-8", "lion-4", "sums"])
def test_no_tracer_is_leaked(name):
  """Who looks for a leak of their own can."""
  sums = lowmem.multi_steps(lowmem.adamw(1e-3), 2, bits=8)
  tx = sums if name == "sums" else REGISTRY[name].ours(1e-3)
  params = {"w": jnp.ones((64, 256))}
  with jax.checking_leaks():
    jax.jit(tx.update)(params, tx.init(params), params)


def test_tiles_without_jit():
  """A loop then counts in Python. Those of a whole rule take 11 s."""
  x = jnp.arange(1 << 16, dtype=jnp.float32)
  with jax.disable_jit():
    (new,) = map_tiles(lambda reads, writes: [reads[0] + writes[0]], [x], [x], 1 << 14)
  chex.assert_trees_all_equal(new, x + x)
