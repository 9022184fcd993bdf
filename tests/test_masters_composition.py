"""`master_weights` and `stochastic_rounding` are plain optax: composed, traced, trained, saved."""

import pickle
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_lowmem as lowmem
import own_process
from programs import times_compiled

WRAPPERS = {
  "16 bits": lambda tx: lowmem.master_weights(tx),
  "8 bits": lambda tx: lowmem.master_weights(tx, bits=8),
  "stochastic": lambda tx: lowmem.stochastic_rounding(tx, seed=5),
}
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
INNER = {
  "optax.adamw": lambda: optax.adamw(1e-3),
  "adamw": lambda: lowmem.adamw(1e-3),
  "came": lambda: lowmem.came(1e-3),
  "offloaded": lambda: lowmem.offloaded(lowmem.adamw(1e-3), min_bytes=64),
}
PAGED = {  # where every moment is quantized, codes and scales are what is paged
  "8 bits": lambda: lowmem.adamw(1e-3, min_size=1),
  "4 bits": lambda: lowmem.adamw(1e-3, bits=4, min_size=1),
  "float32": lambda: optax.adamw(1e-3),
}
SHAPES = {"w": (64, 128), "lora": (512, 16), "norm": (128,)}


def tree(seed, norm=jnp.float32):
  """Matrices in bfloat16 and a norm, which may be float32."""
  normal = np.random.default_rng(seed).standard_normal
  dtypes = {"w": jnp.bfloat16, "lora": jnp.bfloat16, "norm": norm}
  return {k: jnp.asarray(0.1 * normal(s), dtypes[k]) for k, s in SHAPES.items()}


def steps(tx, count, params, state=None, first=0, dtype=None):
  @jax.jit
  def step(params, state, g):
    if dtype is not None:
      g = jax.tree.map(lambda g: g.astype(dtype), g)
    updates, state = tx.update(g, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params) if state is None else state
  for t in range(first, first + count):
    params, state = step(params, state, tree(100 + t))
  return params, state


def weights_of(params, state):
  """What is trained: the masters if there are any."""
  found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, lowmem.MasterWeightsState))
  if any(isinstance(x, lowmem.MasterWeightsState) for x in found):
    return lowmem.master_params(params, state)
  return jax.tree.map(lambda p: p.astype(jnp.float32), params)


@every_wrapper
@pytest.mark.parametrize("inner", INNER)
def test_state_keeps_its_form(wrapper, inner):
  """By `eval_shape`, `jit` and eagerly; after updates too; and it is compiled once."""
  tx, params = WRAPPERS[wrapper](INNER[inner]()), tree(0)
  state = tx.init(params)
  shaped = jax.eval_shape(tx.init, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(shaped, state)
  update = jax.jit(tx.update)
  updates, new = update(tree(1), state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
  assert [jax.typeof(x) for x in jax.tree.leaves(new)] == [
    jax.typeof(x) for x in jax.tree.leaves(state)
  ]
  assert all(u.dtype == jnp.float32 for u in jax.tree.leaves(updates))
  assert [x.sharding.memory_kind for x in jax.tree.leaves(new)] == [
    x.sharding.memory_kind for x in jax.tree.leaves(state)
  ]
  chex.assert_trees_all_equal(tx.update(tree(1), state, params)[0], updates)
  if inner != "offloaded":  # `jax.jit` lays what it returns on the device
    chex.assert_trees_all_equal(jax.jit(tx.init)(params), state)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    chex.assert_trees_all_equal(tx.init(shapes), state)
    params = optax.apply_updates(params, updates)
    update(tree(2), update(tree(1), new, params)[1], params)
    assert times_compiled(update) == 1  # pages are committed, which parameters then are as well


@every_wrapper
def test_float32_parameters_are_left_to_the_inner_transformation(wrapper):
  exact = jax.tree.map(lambda p: p.astype(jnp.float32), tree(0))
  plain, _ = steps(optax.adamw(1e-3), 5, exact, dtype=jnp.float32)
  params, state = steps(WRAPPERS[wrapper](optax.adamw(1e-3)), 5, tree(0))
  assert params["norm"].dtype == jnp.float32
  assert params["w"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(params["norm"], plain["norm"])
  if wrapper == "16 bits":
    masters = lowmem.master_params(params, state)
    del plain["norm"], masters["norm"]
    chex.assert_trees_all_equal(masters, {k: plain[k] for k in masters})


AROUND = {
  "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
  "masked": lambda tx: optax.masked(tx, {"w": True, "lora": True, "norm": False}),
  "partition": lambda tx: optax.partition(
    {"a": tx, "b": optax.sgd(0.1)}, {"w": "a", "lora": "a", "norm": "b"}
  ),
  "offloaded": lambda tx: lowmem.offloaded(tx, min_bytes=64),
}


@every_wrapper
@pytest.mark.parametrize("around", AROUND)
def test_composes(wrapper, around):
  """Around it: what trains is what trains without, where the two do the same."""
  build = WRAPPERS[wrapper]
  params, state = steps(AROUND[around](build(lowmem.adamw(1e-3))), 4, tree(0))
  if around == "chain":
    inner = optax.chain(optax.clip_by_global_norm(1.0), lowmem.adamw(1e-3))
    expected, other = steps(build(inner), 4, tree(0))
  else:
    expected, other = steps(build(lowmem.adamw(1e-3)), 4, tree(0))
  ours, theirs = weights_of(params, state), weights_of(expected, other)
  if around in ("masked", "partition"):
    del ours["norm"], theirs["norm"]
  # Gradients are clipped in bfloat16 outside of it, and in float32 within.
  # An ulp may turn a code of a moment.
  tolerance = 3e-5 if around == "chain" else 3e-6
  if wrapper == "stochastic":
    tolerance = 2e-3 if around in ("chain", "masked", "partition") else tolerance
  for k in ours:
    assert np.abs(ours[k] - theirs[k]).mean() <= tolerance


@every_wrapper
@pytest.mark.parametrize("order", ["around", "within"])
def test_multi_steps(wrapper, order):
  """Steps that only accumulate change neither parameters nor remainders."""
  build, every = WRAPPERS[wrapper], 2
  if order == "around":
    tx = optax.MultiSteps(build(optax.adamw(1e-3)), every).gradient_transformation()
  else:
    tx = build(optax.MultiSteps(optax.adamw(1e-3), every).gradient_transformation())
  begin = tree(0)
  params, state = steps(tx, 1, begin)
  if order == "around" or wrapper != "stochastic":
    chex.assert_trees_all_equal(params, begin)
  start = weights_of(begin, tx.init(begin))
  chex.assert_trees_all_equal(weights_of(params, state), start)
  params, state = steps(tx, 1, params, state, first=1)
  mean = {k: (tree(100)[k].astype("float32") + tree(101)[k].astype("float32")) / 2 for k in SHAPES}
  changes, _ = optax.adamw(1e-3).update(mean, optax.adamw(1e-3).init(start), start)
  expected: Any = optax.apply_updates(start, changes)
  ours = weights_of(params, state)
  for k in SHAPES:
    # bfloat16 sums of gradients turn the first steps of Adam where gradients cancel.
    off = np.abs(ours[k] - expected[k]).mean()
    assert off <= (4e-4 if wrapper == "stochastic" else 2e-5)


@every_wrapper
@pytest.mark.parametrize("order", ["around", "within"])
def test_apply_if_finite(wrapper, order):
  """Within, of any gradients; around, of float32: optax makes zeros in the dtype of gradients."""
  build = WRAPPERS[wrapper]
  if order == "within":
    tx = build(optax.apply_if_finite(optax.sgd(0.1), 3))
  else:
    tx = optax.apply_if_finite(build(optax.sgd(0.1)), 3)
  begin, g = tree(0), tree(1)
  if order == "around":
    g = jax.tree.map(lambda g: g.astype(jnp.float32), g)
  bad = {**g, "w": g["w"].at[3, 5].set(jnp.nan)}
  state = tx.init(begin)
  updates: Any
  updates, skipped = jax.jit(tx.update)(bad, state, begin)
  params = optax.apply_updates(begin, updates)
  if wrapper != "stochastic":
    chex.assert_trees_all_equal(weights_of(params, skipped), weights_of(begin, state))
  chex.assert_trees_all_equal(params, begin)
  updates, state = jax.jit(tx.update)(g, skipped, params)
  assert np.any(updates["w"])
  assert np.isfinite(updates["w"]).all()


@every_wrapper
def test_hyperparameters_are_injected(wrapper):
  """Around it and within it: the learning rate of the next step is what is set."""
  build = WRAPPERS[wrapper]
  around = optax.inject_hyperparams(lambda lr: build(optax.sgd(lr)))(lr=0.1)
  within = build(optax.inject_hyperparams(lambda lr: optax.sgd(lr))(lr=0.1))
  params = tree(0)
  for tx, held in ((around, lambda s: s), (within, lambda s: s.inner_state)):
    state: Any = tx.init(params)
    update = jax.jit(tx.update)
    update(tree(1), state, params)
    held(state).hyperparams["lr"] = jnp.float32(0.0)
    updates, _ = update(tree(1), state, params)
    assert times_compiled(update) == 1
    assert all(not np.any(u) for u in jax.tree.leaves(updates))


@every_wrapper
def test_extra_arguments_reach_the_inner_transformation(wrapper):
  def update(updates, state, params=None, *, value=0.0, **extra_args):
    del extra_args
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((updates, params)))
    return jax.tree.map(lambda g: -value * g, updates), state

  inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
  params, tx = tree(0), WRAPPERS[wrapper](inner)
  updates: Any
  updates, _ = tx.update(tree(1), tx.init(params), params, value=0.5)
  np.testing.assert_array_equal(updates["norm"], -0.5 * tree(1)["norm"])


@every_wrapper
def test_extra_arguments_may_have_any_name(wrapper):
  """Also those that the wrappers and the engine use for arguments of their own."""

  def update(updates, state, params=None, **extra):
    del params
    scale = extra["first"] + extra["given"] + extra["index"] + extra["grads"]
    return jax.tree.map(lambda g: -scale * g, updates), state

  inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
  params, tx = tree(0), WRAPPERS[wrapper](inner)
  given = {"first": 1.0, "given": 2.0, "index": 3.0, "grads": 4.0}
  updates: Any
  updates, _ = jax.jit(tx.update)(tree(1), tx.init(params), params, **given)
  np.testing.assert_array_equal(updates["norm"], -10 * tree(1)["norm"])


@every_wrapper
@pytest.mark.parametrize("inner", PAGED)
def test_moments_in_host_memory_change_nothing(wrapper, inner):
  build = WRAPPERS[wrapper]
  params, state = steps(build(PAGED[inner]()), 3, tree(0))
  paged = lowmem.offloaded(PAGED[inner](), min_bytes=1)
  moved, moved_state = steps(build(paged), 3, tree(0))
  chex.assert_trees_all_equal(weights_of(moved, moved_state), weights_of(params, state))


@every_wrapper
def test_python_numbers_are_arrays(wrapper):
  """A parameter may be one, and so may its gradient, under `jit` and eagerly."""
  params, grads = {"w": tree(0)["w"], "scale": 0.5}, {"w": tree(1)["w"], "scale": 1.0}
  tx = WRAPPERS[wrapper](optax.sgd(0.25))
  state = tx.init(params)
  eager: Any = tx.update(grads, state, params)[0]
  held: Any = jax.jit(lambda state: tx.update(grads, state, params)[0])(state)
  assert float(eager["scale"]) == float(held["scale"]) == -0.25
  chex.assert_trees_all_equal(held["w"], eager["w"])


@every_wrapper
def test_a_state_in_float64_stays_in_float64(wrapper):
  """As a transformation may hold a sum that has to be exact."""

  def update(updates, state, params=None):
    del params
    state = jax.tree.map(lambda s, g: s + g.astype(jnp.float64) / 3, state, updates)
    return jax.tree.map(lambda s: s.astype(jnp.float32), state), state

  def init(params):
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float64), params)

  with jax.enable_x64(True):
    params, tx = tree(0), WRAPPERS[wrapper](optax.GradientTransformation(init, update))
    state: Any = jax.jit(tx.update)(tree(1), tx.init(params), params)[1]
    want = tree(1)["w"].astype(jnp.float64) / 3
    np.testing.assert_array_equal(state.inner_state["w"], want)


@every_wrapper
def test_tree_utilities_see_the_state(wrapper):
  params, tx = tree(0), WRAPPERS[wrapper](lowmem.adamw(1e-3))
  state: Any = steps(tx, 1, params)[1]
  chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, state), state)
  seen = []
  optax.tree.map_params(tx, lambda x: seen.append(x) or x, state)
  assert optax.tree.get(state, "mu") is not None
  if wrapper != "stochastic":
    assert any(x is state.remainder["w"] for x in seen)


@every_wrapper
def test_vmap_and_scan_over_layers(wrapper):
  """Each layer of a stack is trained as it is alone; rounding may be drawn otherwise."""
  tx = WRAPPERS[wrapper](lowmem.adamw(1e-3, min_size=256))
  params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((2, 20, 64)), jnp.bfloat16)}
  state = jax.vmap(tx.init)(params)
  batched = jax.jit(jax.vmap(tx.update))(params, state, params)
  scanned = jax.jit(lambda *args: jax.lax.scan(lambda c, x: (c, tx.update(*x)), None, args)[1])(
    params, state, params
  )
  for i in range(2):
    layer = jax.tree.map(lambda x, i=i: x[i], params)
    alone = jax.jit(tx.update)(layer, tx.init(layer), layer)
    for both in (batched, scanned):
      updates, held = jax.tree.map(lambda x, i=i: x[i], both)
      chex.assert_trees_all_equal_shapes_and_dtypes(held, alone[1])
      np.testing.assert_array_equal(updates["w"], alone[0]["w"])


@every_wrapper
def test_a_donated_step_in_a_scan_trains(wrapper):
  """Twelve steps in one program are twelve programs of a step."""
  tx = WRAPPERS[wrapper](optax.sgd(0.1))
  params = tree(0)
  g = [tree(100 + t) for t in range(6)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *g)

  def body(carry, g):
    updates, state = tx.update(g, carry[1], carry[0])
    return (optax.apply_updates(carry[0], updates), state), None

  run = jax.jit(lambda c: jax.lax.scan(body, c, stacked)[0], donate_argnums=0)
  expected = steps(tx, 6, params)
  state = tx.init(params)
  got = run((jax.tree.map(jnp.copy, params), state))
  chex.assert_trees_all_equal(got, expected)


def orbax(state, like, path):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path / "state", state)
    checkpointer.wait_until_finished()
    return checkpointer.restore(path / "state", like)


WAYS = {
  "orbax": orbax,
  "flax": lambda state, like, _: serialization.from_bytes(like, serialization.to_bytes(state)),
  "pickle": lambda state, like, _: pickle.loads(pickle.dumps(state)),
}


@every_wrapper
@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_is_resumed_is_the_same(wrapper, way, tmp_path):
  tx = WRAPPERS[wrapper](lowmem.adamw(1e-3))
  params, state = steps(tx, 3, tree(0))
  restored = WAYS[way]((params, state), (tree(0), tx.init(tree(0))), tmp_path)
  chex.assert_trees_all_equal(restored, (params, state))
  ends = [steps(tx, 3, *each, first=3) for each in ((params, state), restored)]
  chex.assert_trees_all_equal(*ends)


@every_wrapper
def test_trains_an_nnx_model(wrapper):
  nnx = pytest.importorskip("flax.nnx")

  class Model(nnx.Module):
    def __init__(self):
      self.norm = nnx.RMSNorm(64, rngs=nnx.Rngs(0))
      self.linear = nnx.Linear(64, 128, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    def __call__(self, x):
      return self.linear(self.norm(x))

  model = Model()
  optimizer = nnx.Optimizer(model, WRAPPERS[wrapper](lowmem.adamw(1e-2)), wrt=nnx.Param)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 64)), jnp.float32)

  @nnx.jit
  def step(model, optimizer):
    loss, g = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1.0) ** 2))(model)
    optimizer.update(model, g)
    return loss

  losses = [float(step(model, optimizer)) for _ in range(12)]
  assert losses[-1] < 0.3 * losses[0]
  assert model.linear.kernel.get_value().dtype == jnp.bfloat16
  assert model.norm.scale.get_value().dtype == jnp.float32
  if wrapper != "stochastic":
    params = nnx.state(model, nnx.Param)
    masters = lowmem.master_params(params, nnx.as_pure(optimizer.opt_state))
    kernel = nnx.as_pure(masters)["linear"]["kernel"]
    assert kernel.dtype == jnp.float32
    off = np.abs(kernel - nnx.as_pure(params)["linear"]["kernel"].astype(jnp.float32))
    assert 0 < off.max() <= 2.0**-8 * np.abs(kernel).max()


@every_wrapper
def test_trains_a_linen_state(wrapper):
  linen = pytest.importorskip("flax.linen")
  train_state = pytest.importorskip("flax.training.train_state")
  model, x = linen.Dense(128, param_dtype=jnp.bfloat16), jnp.ones((4, 64))
  params = model.init(jax.random.key(0), x)
  tx = WRAPPERS[wrapper](lowmem.adamw(1e-2))
  state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

  @jax.jit
  def step(state):
    loss = lambda params: jnp.mean((state.apply_fn(params, x) - 1.0) ** 2)  # noqa: E731
    value, g = jax.value_and_grad(loss)(state.params)
    return value, state.apply_gradients(grads=g)

  losses = []
  for _ in range(12):
    value, state = step(state)
    losses.append(float(value))
  assert losses[-1] < 0.3 * losses[0]


def test_explained_as_one_kernel_with_what_is_within():
  """Of a rule that takes norms, each part is updated by itself."""
  params = tree(0)
  one = {e.parameter: e for e in lowmem.explain(WRAPPERS["8 bits"](lowmem.adamw(1e-3)), params)}
  assert one["['w']"].method == one["['lora']"].method == "kernel"
  assert one["['w']"].held["remainder"] == "int8"
  clipped = optax.chain(optax.clip_by_global_norm(1.0), lowmem.adamw(1e-3))
  parts = lowmem.explain(WRAPPERS["8 bits"](clipped), params)
  assert [e.method for e in parts] == ["kernel", "optax", "kernel"]


@every_wrapper
def test_the_kernel_gives_what_tiles_give(wrapper):
  """But for the last bit of a master, where one multiplies and adds in one step."""
  tx, params = WRAPPERS[wrapper](lowmem.adamw(1e-3)), tree(0, jnp.bfloat16)
  ends = []
  for mode in ("interpret", "xla"):
    with lowmem.kernels.using(mode):
      ends.append(steps(tx, 3, params))
  (ours, state), (theirs, other) = ends
  for k in SHAPES:
    assert np.mean(np.asarray(ours[k]) != np.asarray(theirs[k])) <= 2e-3
    if wrapper != "stochastic":
      assert np.mean(state.remainder[k] != other.remainder[k]) <= 0.02


# What is refused ----------------------------------------------------------------------------------


@every_wrapper
def test_what_does_not_fit_is_refused(wrapper):
  build = WRAPPERS[wrapper]
  tx, params = build(optax.sgd(0.1)), tree(0)
  state = tx.init(params)
  with pytest.raises(TypeError, match=r"parameter \['h'\] has dtype float16, but .* Convert"):
    tx.init({"h": jnp.zeros(3, jnp.float16)})
  with pytest.raises(TypeError, match="has dtype int32"):
    tx.init({**params, "n": jnp.zeros(3, jnp.int32)})
  with pytest.raises(TypeError, match="no parameter is bfloat16"):
    tx.init({"w": jnp.zeros(3)})
  with pytest.raises(TypeError, match=r"swap the two: `\w+\(quantized"):
    lowmem.quantized(build(optax.adam(0.1))).init(params)
  with pytest.raises(ValueError, match="needs the parameters"):
    tx.update(params, state)
  with pytest.raises(ValueError, match="the gradient of"):
    tx.update({**params, "w": jnp.zeros((2, 2))}, state, params)
  with pytest.raises(TypeError, match="Call it first"):
    build(optax.sgd)


def test_arguments_are_checked():
  wrap: Any = lowmem.master_weights
  with pytest.raises(ValueError, match="`bits` must be 16 or 8, got 4"):
    wrap(optax.sgd(0.1), bits=4)
  with pytest.raises(TypeError, match="`bits` must be a Python number"):
    wrap(optax.sgd(0.1), bits=jnp.int32(8))
  stochastic: Any = lowmem.stochastic_rounding
  with pytest.raises(TypeError, match=r"`seed` must be an integer, got 0\.5"):
    stochastic(optax.sgd(0.1), seed=0.5)
  with pytest.raises(ValueError, match=r"from 0 to 2\^32 - 1, got -1"):
    stochastic(optax.sgd(0.1), seed=-1)
  with pytest.raises(TypeError, match="`seed` must be a Python number"):
    stochastic(optax.sgd(0.1), seed=jnp.int32(1))


def test_states_of_other_bits_and_dtypes_are_refused():
  sixteen, eight = (lowmem.master_weights(optax.sgd(0.1), bits) for bits in (16, 8))
  params = tree(0)
  with pytest.raises(ValueError, match=r"is int16\[.*is to be int8.*other `bits`"):
    eight.update(params, sixteen.init(params), params)
  narrow = tree(0, jnp.bfloat16)
  with pytest.raises(ValueError, match=r"\['norm'\] is none"):
    sixteen.update(narrow, sixteen.init(params), narrow)
  with pytest.raises(ValueError, match="was made when the parameter was bfloat16"):
    sixteen.update(params, sixteen.init(narrow), params)
  four = lowmem.master_weights(lowmem.adamw(0.1, bits=4))
  with pytest.raises(ValueError, match=r"'power8' codes .*Convert it once"):
    four.update(params, lowmem.master_weights(lowmem.adamw(0.1)).init(params), params)
  few = {"w": params["w"]}
  with pytest.raises(ValueError, match="of 1 parameters, and there are 3"):
    sixteen.update(params, sixteen.init(few), params)
  with pytest.raises(ValueError, match="holds 0"):
    lowmem.master_params(params, optax.sgd(0.1).init(params))
  wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
  with pytest.raises(TypeError, match=r"must be float32, got bfloat16 at \['lora'\]"):
    lowmem.with_master_params(params, params, sixteen.init(params))
  with pytest.raises(ValueError, match="the structure and the shapes"):
    lowmem.with_master_params({"w": wide["w"]}, params, sixteen.init(params))


def test_states_are_converted_within_the_same_bits():
  """The moments' form changes and masters stay; other bits are refused, with a way that works."""
  params = tree(0)
  ours, four = (lowmem.master_weights(lowmem.adamw(1e-3, bits=b)) for b in (8, 4))
  state: Any
  params, state = steps(ours, 2, params)
  converted = lowmem.convert_state(state, ours, four, params)
  chex.assert_trees_all_equal(converted.remainder, state.remainder)
  chex.assert_trees_all_equal_structs(converted, four.init(params))
  eight = lowmem.master_weights(lowmem.adamw(1e-3), bits=8)
  with pytest.raises(ValueError, match="keeps int16 of the master weights and `to_tx` int8"):
    lowmem.convert_state(state, ours, eight, params)
  weights = lowmem.master_params(params, state)
  params, state = lowmem.with_master_params(weights, params, eight.init(params))
  for k, w in lowmem.master_params(params, state).items():
    assert np.abs(w - weights[k]).max() <= 2.0**-16 * np.abs(weights[k]).max()


# Sharded ------------------------------------------------------------------------------------------


def check_sharded(kind):
  """Results and layouts on eight devices, of both wrappers around three optimizers."""
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
  specs = {"w": P("a", "b"), "lora": P("b", None), "norm": P()}
  where = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
  gradients = [tree(100 + t) for t in range(3)]
  for wrapper, build in WRAPPERS.items():
    for inner in ("optax.adamw", "adamw"):
      tx = build(INNER[inner]())
      ends = []
      for sharded in (False, True):
        params = jax.device_put(tree(0), where) if sharded else tree(0)
        state = tx.init(params)

        @jax.jit
        def step(params, state, g, tx=tx):
          updates, state = tx.update(g, state, params)
          return optax.apply_updates(params, updates), state

        for g in gradients:
          params, state = step(params, state, jax.device_put(g, where) if sharded else g)
        ends.append((params, state))
      (expected, other), (params, state) = ends
      for k in SHAPES:
        assert params[k].sharding.is_equivalent_to(where[k], 2), (wrapper, inner, k)
        if inner == "optax.adamw":
          np.testing.assert_array_equal(params[k], expected[k])
        else:
          assert np.abs(np.float32(params[k]) - np.float32(expected[k])).mean() < 1e-4
      if wrapper != "stochastic":
        assert state.remainder["w"].sharding.is_equivalent_to(where["w"], 2)
        if inner == "optax.adamw":
          np.testing.assert_array_equal(state.remainder["w"], other.remainder["w"])
      laid = lowmem.state_shardings(tx, tree(0), where)
      if wrapper != "stochastic":
        assert laid.remainder["w"].spec == specs["w"]
      compiled = step.lower(params, state, jax.device_put(gradients[0], where)).compile()
      assert not own_process.moves_of(compiled), (wrapper, inner)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_eight_devices(kind):
  """The same results under any sharding, no collective, and remainders lie as parameters."""
  own_process.printed(__file__, kind)


if __name__ == "__main__":
  assert jax.device_count() == 8
  check_sharded(AxisType[sys.argv[1]])
