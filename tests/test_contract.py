"""The laws of memory and of numbers that every transformation of the registry keeps.

Those of plain optax are in test_composition.py, those of sharding in test_sharding.py.
"""

import contextlib
import dataclasses
import inspect
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from optax_lowmem._quantization.array import encode
from optax_lowmem._state.moments import is_quantized
from programs import statistics_of, temporaries_of
from registry import (
  BY_PHASES,
  LAWFUL,
  LOCAL,
  LR,
  REGISTRY,
  REPRESENTATIVES,
  SHAPES,
  STORED,
  adamw,
  by_method,
  every,
  every_local,
  every_rule,
  lawful,
  make,
  quantized_leaves,
  reference,
  run,
  small_tiles,
  start,
  tree,
  update_of,
)

MANY = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)


def many(name):
  """A parameter of an entry."""
  return jax.ShapeDtypeStruct(MANY.shape, LAWFUL[name].dtype)


def test_every_public_optimizer_is_in_the_registry():
  public = {
    name
    for name, f in vars(lowmem).items()
    if inspect.isfunction(f) and {"learning_rate", "bits"} <= inspect.signature(f).parameters.keys()
  }
  assert public and public <= {entry.rule for entry in REGISTRY.values()}


# Memory -----------------------------------------------------------------------------------------


def bytes_of(name, shape):
  state = jax.eval_shape(make(name).init, jax.ShapeDtypeStruct(shape, LAWFUL[name].dtype))
  return sum(lowmem.state_bytes(state).values()) / np.prod(shape)


@pytest.mark.cheap
@lawful
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 16), (4096,), (3, 5, 7, 64), (1026, 68)])
def test_state_bytes(name, shape):
  counts = 16 / np.prod(shape)  # steps taken, at most four numbers
  assert bytes_of(name, shape) <= LAWFUL[name].bytes(shape) + counts


def odd(name):
  reason = "a row of odd length fills up a byte: 1.134 for two moments, not 1.125"
  marks = [pytest.mark.xfail(strict=True, reason=reason)] if LAWFUL[name].bits == 4 else []
  return pytest.param(name, marks=marks)


@pytest.mark.cheap
@pytest.mark.parametrize("name", [odd(name) for name in REGISTRY])
def test_state_bytes_of_rows_of_odd_length(name):
  shape = (1025, 67)
  assert bytes_of(name, shape) <= LAWFUL[name].bytes(shape) + 16 / np.prod(shape)


def memory_of(name, donated):
  tx, params = make(name), many(name)
  state = jax.eval_shape(tx.init, params)
  update = jax.jit(tx.update, donate_argnums=donated)
  return statistics_of(update.lower(MANY, state, params).compile()), state


@lawful
def test_peak(name):
  """At most 0.1 B/param beyond gradients and updates, which float32 optax does not keep either."""
  memory, state = memory_of(name, (0, 1))
  assert memory.temp_size_in_bytes / MANY.size <= LAWFUL[name].peak
  # The new state lies where the old one was, and the update where the gradient was.
  kept = sum(lowmem.state_bytes(state).values()) + 4 * MANY.size
  assert memory.alias_size_in_bytes >= 0.999 * kept


@pytest.mark.parametrize("donated", [(1,), ()])
@pytest.mark.parametrize("name", ["adamw-8", "adamw-4", "sgd-8", "ademamix-4"])
def test_peak_where_less_is_donated(name, donated):
  memory, state = memory_of(name, donated)
  assert memory.temp_size_in_bytes / MANY.size <= 0.1
  kept = sum(lowmem.state_bytes(state).values()) if donated else 0
  assert memory.alias_size_in_bytes >= 0.999 * kept


@pytest.mark.parametrize("params", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", ["adamw-8", "adamw-4"])
def test_peak_in_bfloat16(name, params):
  """Of parameters in bfloat16 too, whose gradients are so, and whose update takes their place."""
  tx = make(name)
  p, g = (jax.ShapeDtypeStruct(MANY.shape, dtype) for dtype in (params, jnp.bfloat16))
  update = jax.jit(tx.update, donate_argnums=(0, 1)).lower(g, jax.eval_shape(tx.init, p), p)
  # Replaced in bfloat16, it is copied before jax 0.12, which would convert all of it for each tile.
  is_copied = params == jnp.bfloat16 and jax.__version_info__ < (0, 12)
  assert temporaries_of(update.compile()) / MANY.size <= (2.1 if is_copied else 0.1)


def test_time_in_bfloat16():
  """Replaced a tile at a time, an array is not converted as a whole for each: 16 times the time."""
  tx, times = make("adamw-8"), {}
  for dtype in (jnp.float32, jnp.bfloat16):
    p = jnp.ones((2048, 2048), dtype)
    update, state, g = jax.jit(tx.update, donate_argnums=(0, 1)), tx.init(p), 0.1 * p
    for _ in range(4):
      start = time.perf_counter()
      g, state = jax.block_until_ready(update(g, state, p))
      times[dtype] = min(times.get(dtype, 99.0), time.perf_counter() - start)
  assert times[jnp.bfloat16] <= 4 * times[jnp.float32], times


@lawful
def test_init_makes_no_dense_moment(name):
  compiled = jax.jit(make(name).init).lower(many(name)).compile()
  assert temporaries_of(compiled) / MANY.size <= 0.1


# What is stored -----------------------------------------------------------------------------------


@pytest.mark.cheap
@lawful
def test_init_sums_nothing(name):
  """Not to learn a shape or a sharding: that would cost as much as the gradient's sum."""
  shapes, dtype = {"w": (256, 256), "b": (5,)}, LAWFUL[name].dtype
  params = {k: jax.ShapeDtypeStruct(shape, dtype) for k, shape in shapes.items()}
  made = str(jax.make_jaxpr(make(name).init)(params))
  assert "reduce_sum" not in made and "dot_general" not in made


@by_method(LAWFUL)
def test_storing_what_was_loaded_changes_nothing(name, how):
  _, state = run(name, 3, how)
  stored = quantized_leaves(state)
  assert len(stored) == len(STORED) * LAWFUL[name].moments
  for q in stored:
    chex.assert_trees_all_equal(encode(q.dequantize(), q.codebook, q.block), q)


@pytest.mark.parametrize(
  ("name", "how"),
  [*((name, "whole") for name in LAWFUL), *((name, "phases") for name in BY_PHASES)],
)
def test_positive_second_moments_stay_positive(name, how):
  """Also of gradients that span 40 octaves in every block."""
  wild = jax.tree.map(lambda g: g * jnp.exp2(20 * jax.nn.tanh(g)), tree(1))
  _, state = run(name, 2, how, gradients=lambda t: wild)
  second = [q for q in quantized_leaves(state) if not q.codebook.signed]
  assert len(second) == len(STORED) * LAWFUL[name].second
  for q in second:
    assert float(q.dequantize().min()) > 0


@lawful
@pytest.mark.parametrize("scale", [1e-10, 1e-5, 1.0, 1e3, 1e6])
def test_relative_error_is_the_same_at_every_scale(name, scale):
  check_error(name, "whole", scale)


def moved(name, updates, state):
  """Updates; where parameters have masters, how far these are from where the parameters are."""
  if "remainder" not in getattr(state, "_fields", ()):
    return updates
  params, _ = start(name, "whole")
  masters = lowmem.master_params(optax.apply_updates(params, updates), state)
  return jax.tree.map(lambda w, p: w - p.astype(jnp.float32), masters, params)


@pytest.mark.parametrize("name", BY_PHASES)
@pytest.mark.parametrize("scale", [1e-10, 1e6])
def test_relative_error_is_the_same_at_every_scale_in_phases(name, scale):
  check_error(name, "phases", scale)


def check_error(name, how, scale):
  ours, exact = (
    moved(name, *run(name, 4, h, lambda t: tree(100 + t, scale))) for h in (how, "optax")
  )
  for k in STORED:
    error = np.abs(np.asarray(ours[k]) - np.asarray(exact[k])).mean()
    assert error <= LAWFUL[name].error * np.abs(np.asarray(exact[k])).mean()
  for k in SHAPES.keys() - STORED:  # dense: but for the rounding of another program
    np.testing.assert_allclose(ours[k], exact[k], rtol=1e-5, atol=0)


@lawful
def test_tiles_give_what_whole_arrays_give(name):
  (params, _), (_, state) = start(name, "whole"), run(name, 3)
  tiled = update_of(name, "tiles").trace(tree(9), state, params)
  assert str(tiled.jaxpr).count("scan[") >= len(STORED)
  ours, new = update_of(name, "tiles")(tree(9), state, params)
  whole, expected = update_of(name, "whole")(tree(9), state, params)
  # XLA may contract a product and a sum in one of the two programs: an ulp. That turns a code only
  # where it stands between two, or where it changes the hash of the value, in one of 16: 0.3 % of
  # them where a rule takes a norm of the array, else none.
  chex.assert_trees_all_equal_structs(new, expected)
  for a, b in zip(quantized_leaves(new), quantized_leaves(expected), strict=True):
    assert np.mean(a.codes != b.codes) <= 5e-3
    np.testing.assert_allclose(a.scales, b.scales, rtol=1e-6)
  for k in STORED:
    assert np.mean(np.abs(ours[k] - whole[k])) <= 1e-5 * np.mean(np.abs(whole[k]))


MATRICES = tuple(k for k, shape in SHAPES.items() if len(shape) == 2 and np.prod(shape))


def spoil(gradients, value, names=MATRICES):
  """`gradients` with another element (1, 3) of some matrices."""
  return gradients | {k: gradients[k].at[1, 3].set(value) for k in names}


def other(x):
  """Without that element."""
  return x if x.ndim != 2 else np.delete(np.asarray(x), 3 + x.shape[1])


def bad_step(name, how, bad, good, names=MATRICES):
  """A step of two from one state: of good gradients, and with a bad element in some of them."""
  params, state = start(name, "whole")
  for t in range(2):
    _, state = update_of(name, how)(spoil(tree(t), good), state, params)
  gradients = spoil(tree(5), good)
  clean = update_of(name, how)(gradients, state, params)
  spoiled = spoil(gradients, bad, names)
  # The rule itself, in float32 on the same state: where it is not finite, ours is to be.
  dense = jax.tree.map(
    lambda q: q.dequantize() if is_quantized(q) else q, state, is_leaf=is_quantized
  )
  return (
    clean,
    update_of(name, how)(spoiled, state, params),
    update_of(name, "optax")(spoiled, dense, params)[0],
  )


@by_method(LOCAL)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_element_stays_one_bad_element(name, how, bad):
  """Its update shows it where optax's does, its moments are kept, its neighbours see nothing."""
  # Small before, so that it is not the one that its block is scaled by.
  (expected, new), (updates, poisoned), shown = bad_step(name, how, bad, 1e-3)
  for k in SHAPES:
    np.testing.assert_array_equal(np.isfinite(updates[k]), np.isfinite(shown[k]))
  for k in STORED:
    np.testing.assert_array_equal(other(updates[k]), other(expected[k]))
  for a, b in zip(quantized_leaves(poisoned), quantized_leaves(new), strict=True):
    assert np.isfinite(a.dequantize()).all()
    np.testing.assert_array_equal(other(a.dequantize()), other(b.dequantize()))


@by_method([name for name, e in LAWFUL.items() if e.norms])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_element_stays_in_its_array(name, how, bad):
  """Where updates show it is the reference's; state stays finite, other arrays see nothing."""
  (expected, new), (updates, poisoned), shown = bad_step(name, how, bad, 1e-3, ["big"])
  assert not np.isfinite(updates["big"]).all()
  for k in SHAPES:
    np.testing.assert_array_equal(np.isfinite(updates[k]), np.isfinite(shown[k]))
    if k != "big":
      np.testing.assert_array_equal(updates[k], expected[k])
  assert jax.tree.structure(poisoned) == jax.tree.structure(new)
  for x in jax.tree.leaves(poisoned, is_leaf=is_quantized):
    assert np.isfinite(x.dequantize() if is_quantized(x) else x).all()


@pytest.mark.parametrize(
  ("name", "how"),
  [
    (name, how)
    for name in LOCAL
    for how in ("whole", "phases")
    if LAWFUL[name].second and (how == "whole" or name in BY_PHASES)
  ],
)
def test_an_element_whose_square_overflows_is_not_stored_in_part(name, how):
  """A finite gradient of 3e19: its first moment would be stored, its infinite second one not."""
  (_, new), (_, spoiled), _ = bad_step(name, how, 3e19, 1e-3)
  params, state = start(name, "whole")
  for t in range(2):
    _, state = update_of(name, how)(spoil(tree(t), 1e-3), state, params)
  kept = [np.asarray(q.dequantize()) for q in quantized_leaves(state)]
  clean = [np.asarray(q.dequantize()) for q in quantized_leaves(new)]
  for q, old, other_one in zip(quantized_leaves(spoiled), kept, clean, strict=True):
    x = np.asarray(q.dequantize())
    assert np.isfinite(x).all()
    if x.ndim == 2:  # all of its moments are the old ones, but for the scale of their block
      assert x[1, 3] <= 1.5 * max(abs(old[1, 3]), abs(other_one[1, 3])) + 1e-3
  updates, _ = update_of(name, how)(tree(6), spoiled, params)
  for k in MATRICES:
    largest = np.abs(np.delete(np.asarray(updates[k]).ravel(), 3 + updates[k].shape[1])).max()
    assert abs(float(updates[k][1, 3])) <= 10 * largest


@by_method([name for name, e in LAWFUL.items() if not e.accumulates])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_damaged_scale_starts_its_block_again(name, how, bad):
  """As from a checkpoint that was tampered with; of all moments, or the updates would explode."""
  params, state = start(name, "whole")
  for t in range(2):
    _, state = update_of(name, "whole")(tree(t), state, params)
  leaves, treedef = jax.tree.flatten(state, is_leaf=is_quantized)
  first = next(k for k, x in enumerate(leaves) if is_quantized(x) and x.shape == SHAPES["big"])
  scales = leaves[first].scales
  leaves[first] = dataclasses.replace(leaves[first], scales=scales.at[2, 1].set(bad))
  updates, new = update_of(name, how)(tree(5), treedef.unflatten(leaves), params)
  expected, _ = update_of(name, how)(tree(5), state, params)
  for k in SHAPES:
    assert np.isfinite(updates[k]).all()
    assert not updates[k].size or np.abs(updates[k]).max() <= 12 * np.abs(expected[k]).max()
  if not LAWFUL[name].norms:
    block = np.zeros(SHAPES["big"], bool)
    block[2, 64:] = True
    np.testing.assert_array_equal(np.asarray(updates["big"])[~block], expected["big"][~block])
  for x in jax.tree.leaves(new, is_leaf=is_quantized):
    assert np.isfinite(x.dequantize() if is_quantized(x) else x).all()


@every_local
def test_a_bad_element_that_was_to_be_the_largest_touches_its_block_only(name):
  """Without it the others of the block are rounded on another scale, as they should be."""
  (expected, new), (updates, poisoned), _ = bad_step(name, "whole", np.nan, 100.0)
  for k in STORED:
    changed = np.asarray((updates[k] != expected[k]) & np.isfinite(updates[k]))
    assert changed.sum() < 128  # blocks of 64 grow to less than twice that
  for a, b in zip(quantized_leaves(poisoned), quantized_leaves(new), strict=True):
    assert np.isfinite(a.dequantize()).all()
    assert np.sum(a.dequantize() != b.dequantize()) <= np.prod(a.block)


# Plain numbers ------------------------------------------------------------------------------------


@every_rule
def test_32_bits_is_optax(name):
  """Bit for bit, over 100 steps."""
  shapes = {"w": (65, 67), "b": (3,)}
  params, gradients = tree(0, shapes=shapes), [tree(t, shapes=shapes) for t in range(10)]
  results = []
  for tx in (make(name, bits=32), reference(name)):

    @jax.jit
    def step(g, state, params, tx=tx):
      updates, state = tx.update(g, state, params)
      return state, optax.apply_updates(params, updates)

    state, p = tx.init(params), params
    for t in range(100):
      state, p = step(gradients[t % 10], state, p)
    results.append((state, p))
  chex.assert_trees_all_equal(*results)


def in_half(name, dtype):
  """One step of 16-bit parameters and gradients, and the same in float32."""
  shapes, tx = {"w": (64, 96), "b": (3,)}, make(name)
  params, g = tree(0, 1.0, dtype, shapes), tree(1, 1e-2, dtype, shapes)
  u16, s16 = jax.jit(tx.update)(g, tx.init(params), params)
  params, g = jax.tree.map(lambda x: x.astype(jnp.float32), (params, g))
  return (u16, s16), jax.jit(tx.update)(g, tx.init(params), params)


@pytest.mark.parametrize(
  ("name", "dtype"),
  [
    *((name, jnp.bfloat16) for name in REGISTRY),
    ("adamw-8", jnp.float16),
    ("adamw-4", jnp.float16),
  ],
)
def test_moments_are_computed_in_float32_whatever_the_parameters(name, dtype):
  (u16, s16), (u32, s32) = in_half(name, dtype)
  chex.assert_trees_all_equal(s16, s32)
  for k, u in u16.items():
    assert u.dtype == dtype
    # What was rounded once: half an ulp, and one for a product that was rounded otherwise before.
    np.testing.assert_allclose(
      u.astype(jnp.float32), u32[k], rtol=float(jnp.finfo(dtype).eps), atol=1e-7
    )


# Shapes: no elements, one row, one column, odd sizes, blocks of many axes, LoRA's factors.
ODD = [
  (), (0,), (0, 5), (5, 0), (1, 1), (1, 130), (130, 1), (3, 7), (33, 1, 5), (129,), (16, 512),
  (512, 16), (2, 3, 5, 7), (4, 1), (1, 64),
]  # fmt: skip


@pytest.mark.parametrize("name", ["adamw-8", "adamw-4", "lion-4", "sgd-8"])
def test_every_shape(name):
  """With `min_size=0` also of one element."""
  shapes = {str(shape): shape for shape in ODD}
  params, tx, exact = tree(0, shapes=shapes), make(name, min_size=0), reference(name)
  state, dense = tx.init(params), exact.init(params)
  updates = theirs = params
  for t in range(3):
    g = tree(100 + t, shapes=shapes)
    updates, state = jax.jit(tx.update)(g, state, params)
    theirs, dense = jax.jit(exact.update)(g, dense, params)
  held = sum(np.prod(shape) > 0 and shape != () for shape in ODD)
  assert len(quantized_leaves(state)) == held * REGISTRY[name].moments
  ours, theirs = (np.concatenate([np.ravel(u[k]) for k in shapes]) for u in (updates, theirs))
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
  assert np.abs(ours - theirs).mean() <= REGISTRY[name].error * np.abs(theirs).mean()


@adamw
def test_the_mask_of_weight_decay_sees_names_and_ranks(name):
  def mask(params):
    return {k: p.ndim == 2 and k != "lora" for k, p in params.items()}

  params = jax.tree.map(lambda p: p + 1, tree(0))
  tx = make(name, weight_decay=0.5, mask=mask)
  grads = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  np.testing.assert_allclose(updates["big"], -LR * 0.5 * params["big"], rtol=1e-6)
  for k in ("lora", "small"):
    np.testing.assert_array_equal(updates[k], 0)


# Arguments ----------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ({"bits": 7}, r"`bits` must be one of \(32, 8, 4\), got 7"),
    ({"block_size": 33}, "`block_size` must be a positive multiple of 2, got 33"),
    ({"min_size": -1}, "`min_size` must not be negative, got -1"),
  ],
)
def test_bad_arguments_are_refused_at_construction(name, argument, message):
  with pytest.raises(ValueError, match=message):
    make(name, **argument)


@pytest.mark.cheap
@lawful
def test_integer_parameters_are_refused_by_name(name):
  with pytest.raises(TypeError, match=r"parameter \['table'\] has dtype int32"):
    make(name).init({"w": jnp.ones((4, 4)), "table": jnp.arange(4)})


@pytest.mark.parametrize(
  ("name", "how"),
  [*((name, "whole") for name in LAWFUL), *((name, "tiles") for name in REPRESENTATIVES)],
)
def test_state_is_the_same_where_jax_has_64_bits(name, how):
  """With `jax_enable_x64` no state is wider, and no program fails; see the next test for bits."""
  shapes = jax.eval_shape(lambda: tree(0, dtype=LAWFUL[name].dtype))

  def one(params):
    with small_tiles() if how == "tiles" else contextlib.nullcontext():
      return make(name).update(params, make(name).init(params), params)

  narrow = jax.eval_shape(one, shapes)
  with jax.enable_x64(True):
    wide = jax.eval_shape(one, shapes)
  assert jax.tree.structure(wide) == jax.tree.structure(narrow)
  for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape


@pytest.mark.parametrize("name", ["adamw-8", "adamw-4"])
def test_codes_are_the_same_where_jax_has_64_bits(name):
  params = {"w": tree(0)["ragged"]}

  def two():
    tx, grads = make(name), {"w": tree(1)["ragged"]}
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    return jax.jit(tx.update)(grads, state, params)

  narrow, state = two()
  with jax.enable_x64(True):
    wide, new = two()
  chex.assert_trees_all_equal(new, state)
  # optax corrects the bias in float64 there; of 1 - 0.999**2, float32 keeps 15 of its bits.
  chex.assert_trees_all_close(wide, narrow, rtol=2**-15)


@every
def test_quantize_mask_and_min_size(name):
  params, moments = tree(0), REGISTRY[name].moments

  def held(**kwargs):
    return len(quantized_leaves(jax.eval_shape(make(name, **kwargs).init, params))) / moments

  assert held() == 4
  assert held(quantize_mask={k: k != "big" for k in SHAPES}) == 3
  assert held(quantize_mask=lambda p: {k: k != "big" for k in p}) == 3
  assert held(quantize_mask=False) == 0
  assert held(min_size=7000) == 2
  with pytest.raises(ValueError, match="`quantize_mask` must have the structure"):
    make(name, quantize_mask={"nobody": True}).init(params)
