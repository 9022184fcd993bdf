"""The laws that every public transformation keeps: one registry, one battery.

A new transformation is covered by a line in `REGISTRY`.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from optax_lowmem._blocks import encode
from optax_lowmem._moments import is_quantized

# name: (as few bits, as optax makes it, moments)
REGISTRY = {
  "adam": (lowmem.adam, optax.adam, 2),
  "adamw": (lowmem.adamw, optax.adamw, 2),
  "lion": (lowmem.lion, optax.lion, 1),
  "sgd": (
    functools.partial(lowmem.sgd, momentum=0.9),
    functools.partial(optax.sgd, momentum=0.9),
    1,
  ),
  "quantized_adabelief": (
    lambda lr, bits=8, **kw: lowmem.quantized(optax.adabelief(lr), bits, **kw),
    optax.adabelief,
    2,
  ),
  "quantized_rmsprop": (
    lambda lr, bits=8, **kw: lowmem.quantized(optax.rmsprop(lr), bits, **kw),
    optax.rmsprop,
    1,
  ),
}
LR = 1e-2
every = pytest.mark.parametrize("name", REGISTRY)
adamw = pytest.mark.parametrize("name", ["adamw"])

# One leaf that is walked in tiles, one with blocks of several rows, one with a short last block,
# and three that stay dense.
SHAPES = {
  "big": (300, 128),
  "lora": (512, 16),
  "ragged": (67, 97),
  "small": (7,),
  "no": (),
  "o": (0, 3),
}


def make(name, bits=8, lr=LR, **kwargs):
  return REGISTRY[name][0](lr, bits=bits, **kwargs)


def reference(name, lr=LR):
  return REGISTRY[name][1](lr)


def tree(seed, scale=1.0, dtype=jnp.float32, shapes=SHAPES):
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  return {
    k: (scale * jax.random.normal(key, shape)).astype(dtype)
    for key, (k, shape) in zip(keys, shapes.items(), strict=True)
  }


def quantized_leaves(state):
  return [x for x in jax.tree.leaves(state, is_leaf=is_quantized) if is_quantized(x)]


def run(tx, params, steps, scale=1.0, grads=None):
  """Parameters and state after a few steps of random gradients."""
  state = tx.init(params)

  @jax.jit
  def step(params, state, g):
    updates, state = tx.update(g, state, params)
    return optax.apply_updates(params, updates), state, updates

  updates = None
  for t in range(steps):
    params, state, updates = step(params, state, grads or tree(100 + t, scale))
  return params, state, updates


# Memory -----------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 16), (4096,), (1025, 67), (3, 5, 7, 64)])
def test_state_bytes(name, shape):
  state = jax.eval_shape(make(name).init, jax.ShapeDtypeStruct(shape, jnp.float32))
  moments = REGISTRY[name][2]
  assert sum(lowmem.state_bytes(state).values()) / np.prod(shape) <= 2.13 * moments / 2 + 0.001


@every
@pytest.mark.parametrize("donated", [True, False])
def test_peak(name, donated):
  """At most 0.1 B/param beyond gradients and updates, which float32 optax does not keep either."""
  tx, p = make(name), jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
  state = jax.eval_shape(tx.init, p)
  update = jax.jit(tx.update, donate_argnums=(0, 1) if donated else (1,))
  memory = update.lower(p, state, p).compile().memory_analysis()
  assert memory.temp_size_in_bytes / (4096 * 4096) <= 0.1
  # The new state lies where the old one was, and the update where the gradient was.
  kept = sum(lowmem.state_bytes(state).values()) + (4 * 4096 * 4096 if donated else 0)
  assert memory.alias_size_in_bytes >= 0.999 * kept


def test_init_makes_no_dense_moment():
  tx, p = make("adamw"), jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
  memory = jax.jit(tx.init).lower(p).compile().memory_analysis()
  assert memory.temp_size_in_bytes / (4096 * 4096) <= 0.1


# What is stored -----------------------------------------------------------------------------------


@every
def test_storing_what_was_loaded_changes_nothing(name):
  _, state, _ = run(make(name), tree(0), 3)
  stored = quantized_leaves(state)
  assert len(stored) == 3 * REGISTRY[name][2]
  for q in stored:
    chex.assert_trees_all_equal(encode(q.dequantize(), q.codebook, q.block), q)


@pytest.mark.parametrize("name", [n for n in REGISTRY if n not in ("lion", "sgd")])
def test_positive_second_moments_stay_positive(name):
  grads = jax.tree.map(lambda g: g * jnp.exp2(20 * jax.nn.tanh(g)), tree(1))
  _, state, _ = run(make(name), tree(0), 2, grads=grads)
  second = quantized_leaves(optax.tree.get_all_with_path(state, "nu"))
  assert len(second) == 3
  for q in second:
    assert float(q.dequantize().min()) > 0


@every
@pytest.mark.parametrize("scale", [1e-10, 1e-5, 1.0, 1e3, 1e6])
def test_relative_error_is_the_same_at_every_scale(name, scale):
  params = jax.tree.map(jnp.zeros_like, tree(0))
  _, _, exact = run(reference(name), params, 4, scale)
  _, _, ours = run(make(name), params, 4, scale)
  for k in ("big", "lora", "ragged"):
    error = np.abs(np.asarray(ours[k]) - np.asarray(exact[k]))
    # Lion's update is a sign: an error is a flip, and a flip is as large as an update.
    assert error.mean() <= 0.03 * np.abs(np.asarray(exact[k])).mean()


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_element_stays_one_bad_element(name, bad):
  tx, params = make(name), tree(0)
  _, state, _ = run(tx, params, 2)
  good = tree(5)
  spoiled = {k: g.at[(1, 3)].set(bad) if g.ndim == 2 and g.size else g for k, g in good.items()}
  update = jax.jit(tx.update)
  expected, new = update(good, state, params)
  updates, poisoned = update(spoiled, state, params)
  # The rule on the same state in float32: the bad element shows there and here, nowhere else.
  dense = jax.tree.map(
    lambda q: q.dequantize() if is_quantized(q) else q, state, is_leaf=is_quantized
  )
  shown, _ = jax.jit(reference(name).update)(spoiled, dense, params)
  for k in ("big", "lora", "ragged"):
    np.testing.assert_array_equal(np.isfinite(updates[k]), np.isfinite(shown[k]))
    neighbours = np.ones(updates[k].shape, bool)
    neighbours[1, 3] = False
    np.testing.assert_array_equal(updates[k][neighbours], expected[k][neighbours])
  for a, b in zip(quantized_leaves(poisoned), quantized_leaves(new), strict=True):
    assert np.isfinite(a.dequantize()).all()
    changed = np.asarray(a.dequantize() != b.dequantize())
    # The bad element keeps its old moment. If that was to become the largest of its block, the
    # others may be rounded on another scale; nothing outside the block changes.
    assert changed.sum() <= np.prod(a.block)


# Plain optax --------------------------------------------------------------------------------------


@every
def test_32_bits_is_optax(name):
  """Bit for bit, over 100 steps."""
  params = tree(0)
  ours, our_state, _ = run(make(name, bits=32), params, 100)
  theirs, their_state, _ = run(reference(name), params, 100)
  chex.assert_trees_all_equal(ours, theirs)
  chex.assert_trees_all_equal(our_state, their_state)


@every
def test_state_keeps_structure_shapes_and_dtypes(name):
  tx, params = make(name), tree(0, dtype=jnp.bfloat16)
  state = tx.init(params)
  updates, new = jax.jit(tx.update)(tree(1, dtype=jnp.bfloat16), state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
  chex.assert_trees_all_equal_structs(jax.eval_shape(tx.init, params), state)
  assert [a.shape for a in jax.tree.leaves(jax.eval_shape(tx.init, params))] == [
    a.shape for a in jax.tree.leaves(state)
  ]


@every
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_moments_are_computed_in_float32_whatever_the_parameters(name, dtype):
  params, grads = tree(0, dtype=dtype), tree(1, 1e-2, dtype)
  tx = make(name)
  u16, s16 = jax.jit(tx.update)(grads, tx.init(params), params)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), (grads, params))
  u32, s32 = jax.jit(tx.update)(wide[0], tx.init(wide[1]), wide[1])
  chex.assert_trees_all_equal(s16, s32)
  chex.assert_trees_all_close(u16, jax.tree.map(lambda u: u.astype(dtype), u32), rtol=1e-2)


def wrapped(kind, tx):
  quarter = {k: "a" if k in ("big", "small") else "b" for k in SHAPES}
  mask = {k: k != "lora" for k in SHAPES}
  return {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda: optax.masked(tx, mask),
    "partition": lambda: optax.partition({"a": tx, "b": optax.sgd(0.1)}, quarter),
    "multi_steps": lambda: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(tx, 3),
    "scheduled": lambda: optax.chain(tx, optax.scale_by_schedule(lambda t: 1.0 / (1 + t))),
  }[kind]()


KINDS = ["chain", "masked", "partition", "multi_steps", "apply_if_finite", "scheduled"]


@adamw
@pytest.mark.parametrize("kind", KINDS)
def test_composes(name, kind):
  params = tree(0)
  ours, state, _ = run(wrapped(kind, make(name)), params, 4)
  exact, _, _ = run(wrapped(kind, reference(name)), params, 4)
  assert quantized_leaves(state)
  for k in params:
    if params[k].size:
      travelled = np.abs(np.asarray(exact[k] - params[k])).mean()
      assert np.abs(np.asarray(ours[k] - exact[k])).mean() <= 0.03 * travelled


@every
def test_inject_hyperparams(name):
  rule = REGISTRY[name][0]
  tx = optax.inject_hyperparams(lambda lr: rule(lr))(lr=LR)
  params, grads = tree(0), tree(1)
  state = tx.init(params)
  update = jax.jit(tx.update)
  once, _ = update(grads, state, params)
  state.hyperparams["lr"] = jnp.float32(2 * LR)
  twice, _ = update(grads, state, params)
  chex.assert_trees_all_close(twice, jax.tree.map(lambda u: 2 * u, once), rtol=1e-5)
  # And inside: the learning rate is a scalar of the state, the moments are still found.
  inside = lowmem.quantized(optax.inject_hyperparams(optax.adamw)(learning_rate=LR))
  assert len(quantized_leaves(inside.init(params))) == 6


@every
def test_tree_utilities_see_the_state(name):
  tx, params = make(name), tree(0)
  state = tx.init(params)
  mapped = optax.tree.map_params(tx, lambda x: x, state)
  chex.assert_trees_all_equal(mapped, state)
  fields = [optax.tree.get_all_with_path(state, f) for f in ("mu", "nu", "trace")]
  assert len(quantized_leaves(fields)) == 3 * REGISTRY[name][2]


@every
def test_eager_jit_vmap_and_scan_agree(name):
  tx = make(name, min_size=256)
  shapes = {"w": (3, 20, 64), "b": (3, 5)}
  params, grads = tree(0, shapes=shapes), tree(1, shapes=shapes)

  def one(params, grads):
    state = tx.init(params)
    _, state = tx.update(grads, state, params)
    return tx.update(grads, state, params)

  vmapped = jax.jit(jax.vmap(one))(params, grads)
  _, scanned = jax.lax.scan(lambda c, x: (c, one(*x)), None, (params, grads))
  for i in range(3):
    p, g = jax.tree.map(lambda x, i=i: x[i], (params, grads))
    eager = one(p, g)
    for batch in (vmapped, scanned):
      chex.assert_trees_all_close(
        jax.tree.map(lambda x, i=i: x[i], batch[0]), eager[0], rtol=1e-5, atol=1e-8
      )
  assert quantized_leaves(vmapped[1])


@every
def test_compiles_once(name):
  chex.clear_trace_counter()
  tx, params = make(name), tree(0)
  update = jax.jit(chex.assert_max_traces(tx.update, n=1))
  state = tx.init(params)
  for t in range(3):
    _, state = update(tree(t), state, params)


@every
def test_donation_reuses_the_state(name):
  tx, params = make(name), tree(0)
  state = tx.init(params)
  update = jax.jit(tx.update, donate_argnums=1)
  before = quantized_leaves(state)[0].codes.unsafe_buffer_pointer()
  _, new = update(tree(1), state, params)
  assert quantized_leaves(state)[0].codes.is_deleted()
  assert quantized_leaves(new)[0].codes.unsafe_buffer_pointer() == before


@adamw
def test_the_mask_of_weight_decay_sees_names_and_ranks(name):
  def mask(params):
    return {k: p.ndim == 2 and k != "lora" for k, p in params.items()}

  params = jax.tree.map(lambda p: p + 1, tree(0))
  tx = lowmem.adamw(LR, weight_decay=0.5, mask=mask)
  grads = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  np.testing.assert_allclose(updates["big"], -LR * 0.5 * params["big"], rtol=1e-6)
  for k in ("lora", "small"):
    np.testing.assert_array_equal(updates[k], 0)


@adamw
def test_trains_in_flax(name):
  nnx, linen_state = (
    pytest.importorskip("flax.nnx"),
    pytest.importorskip("flax.training.train_state"),
  )
  model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, make(name), wrt=nnx.Param)
  x = jnp.ones((4, 64))

  @nnx.jit
  def step(model, optimizer):
    loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2))(model)
    optimizer.update(model, grads)
    return loss

  losses = [float(step(model, optimizer)) for _ in range(8)]
  assert losses[-1] < 0.5 * losses[0]
  state = linen_state.TrainState.create(apply_fn=None, params=tree(0), tx=make(name))
  new = jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, tree(1))
  assert len(quantized_leaves(new.opt_state)) == 6


@adamw
def test_orbax_saves_and_restores(name, tmp_path):
  ocp = pytest.importorskip("orbax.checkpoint")
  tx, params = make(name), tree(0)
  params = {k: v for k, v in params.items() if v.size}  # Orbax refuses arrays without elements
  state = tx.init(params)
  _, state = jax.jit(tx.update)({k: v for k, v in tree(1).items() if v.size}, state, params)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
  chex.assert_trees_all_equal(restored, state)


# Arguments ----------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ({"bits": 7}, r"`bits` must be one of \(32, 8\), got 7"),
    ({"block_size": 33}, "`block_size` must be a positive multiple of 2, got 33"),
    ({"min_size": -1}, "`min_size` must not be negative, got -1"),
  ],
)
def test_bad_arguments_are_refused_at_construction(name, argument, message):
  with pytest.raises(ValueError, match=message):
    REGISTRY[name][0](LR, **argument)


@every
def test_integer_parameters_are_refused_by_name(name):
  with pytest.raises(TypeError, match=r"parameter \['table'\] has dtype int32"):
    make(name).init({"w": jnp.ones((4, 4)), "table": jnp.arange(4)})


@every
def test_quantize_mask_and_min_size(name):
  params, moments = tree(0), REGISTRY[name][2]
  by_tree = make(name, quantize_mask={k: k != "big" for k in SHAPES}).init(params)
  by_call = make(name, quantize_mask=lambda p: {k: k != "big" for k in p}).init(params)
  assert len(quantized_leaves(by_tree)) == len(quantized_leaves(by_call)) == 2 * moments
  assert not quantized_leaves(make(name, quantize_mask=False).init(params))
  assert len(quantized_leaves(make(name, min_size=7000).init(params))) == 2 * moments
  with pytest.raises(ValueError, match="`quantize_mask` must have the structure"):
    make(name, quantize_mask={"nobody": True}).init(params)
