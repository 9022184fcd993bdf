"""`loss_scaling`: gradients of the loss as it is, and no step of those that are not finite."""

import functools
import pickle
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_lowmem as lowmem
import own_process
from programs import temporaries_of, times_compiled
from registry import tree

# Their states have fields that `optax`'s types do not know.
loss_scaling: Any = lowmem.loss_scaling
multi_steps: Any = lowmem.multi_steps
FEW = {"big": (60, 128), "lora": (512, 16), "small": (7,)}
few = functools.partial(tree, shapes=FEW)
INNER = {
  "optax.adamw": lambda: optax.adamw(1e-3),
  "adamw": lambda: lowmem.adamw(1e-3),
  "came": lambda: lowmem.came(1e-3),
  "masters": lambda: lowmem.master_weights(lowmem.adamw(1e-3)),
  "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), lowmem.adamw(1e-3)),
  "multi_steps": lambda: multi_steps(lowmem.adamw(1e-3), 1, bits=8),
}
every_inner = pytest.mark.parametrize("inner", INNER)


def params_of(inner):
  dtype = jnp.bfloat16 if inner == "masters" else jnp.float32
  return few(0, dtype=dtype)


def scaled(g, by):
  return jax.tree.map(lambda x: x * by, g)


def broken(g, value=np.nan):
  return {**g, "lora": g["lora"].at[3, 5].set(value)}


@every_inner
def test_it_is_the_inner_transformation(inner):
  """Of powers of two to the last bits, whatever the scale."""
  tx, alone, params = loss_scaling(INNER[inner]()), INNER[inner](), params_of(inner)
  a, b = tx.init(params), alone.init(params)
  chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params), a)
  update, p, q = jax.jit(tx.update), params, params
  for t in range(2):
    g = few(100 + t)
    ours, a = update(scaled(g, a.scale), a, p)
    theirs, b = jax.jit(alone.update)(g, b, q)
    p, q = optax.apply_updates(p, ours), optax.apply_updates(q, theirs)
    got, wanted = (ours, a.inner_state), (theirs, b)
    if inner == "masters":  # an ulp of a master may turn the last bit of its bfloat16
      got = lowmem.master_params(p, a.inner_state), a.inner_state.inner_state
      wanted = lowmem.master_params(q, b), b.inner_state
    chex.assert_trees_all_close(got, wanted, rtol=2e-6, atol=1e-9)
  assert times_compiled(update) == 1
  assert int(a.good_steps) == 2


@every_inner
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_is_skipped(inner, value):
  """State and parameters are as they were, bit for bit, and the scale is halved."""
  tx, params = loss_scaling(INNER[inner](), 64.0), params_of(inner)
  update = jax.jit(tx.update)
  _, state = update(few(1), tx.init(params), params)
  updates, new = update(broken(few(2), value), state, params)
  chex.assert_trees_all_equal(new.inner_state, state.inner_state)
  chex.assert_trees_all_equal(optax.apply_updates(params, updates), params)
  assert (float(new.scale), int(new.good_steps), int(new.skipped_steps)) == (32.0, 0, 1)
  updates, new = update(few(3), new, params)
  assert all(np.isfinite(u).all() and np.any(u) for u in jax.tree.leaves(updates))
  assert (float(new.scale), int(new.good_steps), int(new.skipped_steps)) == (32.0, 1, 1)
  assert times_compiled(update) == 1
  chex.assert_trees_all_equal(tx.update(broken(few(2), value), state, params)[0]["big"] == 0, True)


def scales(tx, pattern):
  """The scales after good steps (1) and bad ones (0)."""
  params, found = jnp.zeros(3), []
  state: Any = tx.init(params)
  update = jax.jit(tx.update)
  for good in pattern:
    g = jnp.ones(3) if good else jnp.full(3, jnp.inf)
    _, state = update(g, state, params)
    found.append(float(state.scale))
  return found


def test_the_scale_grows_and_shrinks():
  tx = loss_scaling(optax.sgd(0.1), 8.0, growth_interval=2, max_scale=32.0, min_scale=4.0)
  assert scales(tx, [1, 1, 1, 0, 1, 1]) == [8, 16, 16, 8, 8, 16]
  assert scales(tx, [1] * 7) == [8, 16, 16, 32, 32, 32, 32]
  assert scales(tx, [0, 0, 0]) == [4, 4, 4]
  other = loss_scaling(
    optax.sgd(0.1), 9.0, growth_interval=1, growth_factor=3, backoff_factor=1 / 3
  )
  np.testing.assert_allclose(scales(other, [1, 0, 0]), [27, 9, 3])


def test_a_static_scale_skips_too():
  tx = loss_scaling(optax.sgd(0.1), 100.0, growth_interval=None)
  assert scales(tx, [1, 0, 1]) == [100, 100, 100]
  params = jnp.ones(3)
  updates, state = tx.update(jnp.array([1.0, jnp.nan, 1.0]), tx.init(params), params)
  assert not np.any(updates)
  assert int(state.skipped_steps) == 1


def loss16(params, x):
  """A loss in float16 with gradients below its smallest number."""
  p = params.astype(jnp.float16)
  return ((p * x.astype(jnp.float16)) * jnp.float16(1e-4)).astype(jnp.float32).mean() * 1e-3


def test_float16_gradients_that_would_be_zero_are_there():
  params, x = jnp.ones(1000), jnp.ones(1000)
  assert not np.any(jax.grad(loss16)(params, x))
  tx = loss_scaling(optax.sgd(1.0), 2.0**15)
  state = tx.init(params)
  g = jax.grad(lambda p: lowmem.scale_loss(loss16(p, x), state))(params)
  updates, _ = tx.update(g, state, params)
  np.testing.assert_allclose(updates, -1e-10, rtol=2e-2)


def test_it_finds_a_scale_that_does_not_overflow():
  """From the largest one down, in one program, donated; then it trains."""
  tx = loss_scaling(lowmem.adamw(1e-2), 2.0**24, growth_interval=1000)
  params, x = jnp.ones(4096), jnp.linspace(0.5, 1.5, 4096)

  def loss(p):
    return ((p.astype(jnp.float16) * x.astype(jnp.float16)).astype(jnp.float32) ** 2).sum()

  def body(carry, _):
    params, state = carry
    value, g = jax.value_and_grad(lambda p: lowmem.scale_loss(loss(p), state))(params)
    updates, new = tx.update(g, state, params)
    return (optax.apply_updates(params, updates), new), value / state.scale

  run = jax.jit(lambda c: jax.lax.scan(body, c, length=40), donate_argnums=0)
  (_, state), losses = run((params, tx.init(params)))
  assert int(state.skipped_steps) == np.log2(2.0**24 / float(state.scale)) > 5
  skipped = int(state.skipped_steps)
  assert np.all(losses[: skipped + 1] == losses[0])
  assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("order", ["around", "within"])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_with_multi_steps(order, bits):
  """Around it, a bad micro-batch is left out; within it, its step is."""
  if order == "around":
    tx = loss_scaling(multi_steps(optax.sgd(1.0), 2, bits=bits), 64.0)
  else:
    inner = loss_scaling(optax.sgd(1.0), 64.0)
    tx = multi_steps(inner, 2, bits=bits)
  if order == "within" and bits == 32:
    pytest.skip("optax keeps what is not finite for ever")
  params, update = few(0), jax.jit(tx.update)
  state: Any = tx.init(params)
  seen: Any = []
  for t, bad in enumerate([0, 1, 0, 0, 0]):
    scale = lowmem.scale_loss(1.0, state)
    g = scaled(few(t), scale)
    updates, state = update(broken(g) if bad else g, state, params)
    seen.append(np.asarray(updates["small"]))
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
  mean = lambda i, j: -(few(i)["small"] + few(j)["small"]) / 2  # noqa: E731
  steps = {2: mean(0, 2), 4: mean(3, 4)} if order == "around" else {3: mean(2, 3)}
  for t, u in enumerate(seen):
    np.testing.assert_allclose(u, steps.get(t, np.zeros(7)), rtol=1e-5, atol=1e-6)
  assert float(lowmem.scale_loss(1.0, state)) == 32.0


def test_the_state_is_found_wherever_it_is():
  params = few(0)
  base = loss_scaling(lowmem.adamw(1e-3), 64.0)
  for tx in (
    base,
    optax.chain(optax.identity(), base),
    optax.masked(base, {"big": True, "lora": True, "small": False}),
    multi_steps(base, 2),
    optax.apply_if_finite(base, 3),
  ):
    assert float(lowmem.scale_loss(0.5, tx.init(params))) == 32.0
  assert float(optax.tree.get(base.init(params), "scale")) == 64.0
  with pytest.raises(ValueError, match="it holds 0"):
    lowmem.scale_loss(1.0, optax.adam(1e-3).init(params))
  with pytest.raises(ValueError, match="it holds 2"):
    lowmem.scale_loss(1.0, (base.init(params), base.init(params)))


def test_trains_an_nnx_model_in_float16():
  model = nnx.Linear(64, 128, dtype=jnp.float16, rngs=nnx.Rngs(0))
  tx = loss_scaling(lowmem.adamw(1e-2), 2.0**24)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  x = jnp.ones((4, 64))

  @nnx.jit
  def step(model, optimizer):
    def loss(model):
      value = ((model(x).astype(jnp.float32) - 1) ** 2).mean()
      return lowmem.scale_loss(value, optimizer.opt_state), value

    (_, value), g = nnx.value_and_grad(loss, has_aux=True)(model)
    optimizer.update(model, g)
    return value

  losses = [float(step(model, optimizer)) for _ in range(24)]
  state: Any = nnx.as_pure(optimizer.opt_state)
  assert 0 < int(state.skipped_steps) < 12
  assert losses[-1] < 0.5 * losses[0]
  assert np.isfinite(model.kernel[...]).all()


def test_composes_and_is_resumed():
  params = few(0)
  tx = lowmem.offloaded(loss_scaling(lowmem.adamw(1e-3), 64.0), min_bytes=64)
  plain = loss_scaling(lowmem.adamw(1e-3), 64.0)
  a: Any = tx.init(params)
  b: Any = plain.init(params)
  for t in range(3):
    g = broken(few(t)) if t == 1 else few(t)
    x, a = jax.jit(tx.update)(g, a, params)
    y, b = jax.jit(plain.update)(g, b, params)
    chex.assert_trees_all_close(x, y, rtol=1e-5, atol=1e-8)
    b = pickle.loads(pickle.dumps(b))
  assert type(b) is lowmem.LossScalingState
  assert int(a.skipped_steps) == int(b.skipped_steps) == 1
  with pytest.raises(ValueError, match=r"Swap them: `offloaded\(lowmem.loss_scaling"):
    loss_scaling(lowmem.offloaded(lowmem.adamw(1e-3), min_bytes=64)).init(params)


@pytest.mark.parametrize("inner", [lowmem.adamw, optax.adamw])
def test_no_array_of_float32_beside_gradient_and_update(inner):
  """On a CPU; compiled for an H100: `tests/test_accelerator_steps.py`."""
  tx, side = loss_scaling(inner(1e-3)), 2048
  params = {"w": jax.ShapeDtypeStruct((side, side), jnp.float32)}
  state = jax.eval_shape(tx.init, params)
  update = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params)
  assert temporaries_of(update.compile()) <= 0.1 * side**2


REFUSED = {
  "zero": ({"initial_scale": 0.0}, ValueError, "`initial_scale` must be positive and finite"),
  "beyond float32": (
    {"initial_scale": 1e39, "max_scale": 1e40},
    ValueError,
    "`initial_scale` must be positive and finite in float32",
  ),
  "text": ({"initial_scale": "dynamic"}, TypeError, "`initial_scale` must be a number"),
  "array": ({"initial_scale": jnp.ones(())}, TypeError, "`initial_scale` must be a Python number"),
  "above": ({"initial_scale": 2.0**30}, ValueError, "from `min_scale` to `max_scale`"),
  "shrinks": ({"growth_factor": 0.5}, ValueError, "`growth_factor` must be at least 1"),
  "grows": ({"backoff_factor": 2.0}, ValueError, "`backoff_factor` must be at most 1"),
  "never": ({"growth_interval": 0}, ValueError, "`growth_interval` must be at least 1"),
  "half": ({"growth_interval": 1.5}, TypeError, "`growth_interval` must be an integer"),
  "least": ({"min_scale": -1.0}, ValueError, "`min_scale` must be positive"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
  arguments, error, message = REFUSED[case]
  with pytest.raises(error, match=message):
    loss_scaling(optax.sgd(0.1), **arguments)


def test_refuses_what_is_no_gradient():
  tx = loss_scaling(optax.sgd(0.1))
  with pytest.raises(TypeError, match="takes floating ones"):
    tx.update(jnp.arange(3), tx.init(jnp.ones(3)), jnp.ones(3))
  with pytest.raises(TypeError, match="`inner` must be an optax transformation"):
    loss_scaling(optax.sgd)


# Sharded ------------------------------------------------------------------------------------------


def check_sharded(kind):
  """One device's element that is not finite is all devices' bad step; the scale is on all."""
  mesh = jax.make_mesh((8,), ("a",), axis_types=(kind,))
  where = {k: NamedSharding(mesh, P("a") if k != "small" else P()) for k in ("lora", "small")}
  params = {k: few(0)[k] for k in where}
  tx = loss_scaling(lowmem.adamw(1e-3), 64.0)
  update = jax.jit(tx.update)
  ends = []
  for sharded in (False, True):
    lay = (lambda t: jax.device_put(t, where)) if sharded else (lambda t: t)
    state, updates = tx.init(lay(params)), None
    for t in range(3):
      g = broken(few(t)) if t == 1 else few(t)
      updates, state = update(lay({k: g[k] for k in where}), state, lay(params))
    assert int(state.skipped_steps) == 1
    assert float(state.scale) == 32.0
    assert state.scale.sharding.is_fully_replicated
    ends.append(updates)
  chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_eight_devices(kind):
  own_process.printed(__file__, kind)


if __name__ == "__main__":
  assert jax.device_count() == 8
  check_sharded(AxisType[sys.argv[1]])
