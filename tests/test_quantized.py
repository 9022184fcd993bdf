"""`quantized` beyond the contract: rules on whole arrays, storages by field."""

import warnings
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from optax_lowmem._state.moments import is_quantized
from registry import small_tiles


def params():
  return {"w": jax.random.normal(jax.random.key(0), (300, 128)), "b": jnp.ones(5)}


@pytest.mark.parametrize(
  "inner",
  [
    optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    optax.lamb(1e-2),
    optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(0)), optax.adam(1e-2)),
  ],
)
def test_rules_that_are_not_elementwise_run_on_whole_arrays(inner):
  """Never tiled: a norm over a tile would be silently wrong."""
  tx, p = lowmem.quantized(inner), params()
  ours, exact = tx.init(p), inner.init(p)
  assert sum(map(is_quantized, jax.tree.leaves(ours, is_leaf=is_quantized))) == 2
  for t in range(3):
    g = jax.tree.map(lambda x, t=t: jax.random.normal(jax.random.key(t), x.shape), p)
    u, ours = jax.jit(tx.update)(g, ours, p)
    v, exact = jax.jit(inner.update)(g, exact, p)
    difference = np.abs(np.asarray(u["w"] - v["w"])).mean()
    assert difference <= 0.03 * np.abs(np.asarray(v["w"])).mean()
    np.testing.assert_allclose(u["b"], v["b"], rtol=2e-3)


def test_a_storage_for_a_field():
  dynamic = {
    "mu": lowmem.Blockwise("dynamic", 256),
    "nu": lowmem.Dense(jnp.bfloat16),
  }
  state = lowmem.quantized(optax.adam(1e-3), storage=dynamic).init(params())
  mu, nu = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
  assert mu["w"].codebook.name == "dynamic"
  assert mu["b"].dtype == jnp.float32
  assert nu["w"].dtype == jnp.bfloat16
  with pytest.raises(ValueError, match="names the field 'v'; this state has mu, nu"):
    lowmem.quantized(optax.adam(1e-3), storage={"v": lowmem.Dense()}).init(params())


def test_moments_held_in_bf16_are_still_computed_in_float32():
  tx = lowmem.quantized(optax.adam(1e-3), 32, storage={"mu": lowmem.Dense(jnp.bfloat16)})
  p = params()
  g, state = jax.tree.map(lambda x: x * 1e-3, p), tx.init(p)
  mu = jnp.zeros_like(p["w"])
  for _ in range(5):
    _, state = jax.jit(tx.update)(g, state, p)
    mu = (0.9 * mu + 0.1 * g["w"]).astype(jnp.bfloat16).astype(jnp.float32)
  held = optax.tree.get(state, "mu")["w"]
  assert held.dtype == jnp.bfloat16
  assert float((held.astype(jnp.float32) != mu).mean()) < 1e-3  # but for a tie broken by an ulp


def test_a_field_that_is_not_known_is_left_alone_and_can_be_given_a_storage():
  """The `z` of schedule-free is a copy of the parameters: 8 bits would ruin it."""
  tx = lowmem.quantized(optax.contrib.schedule_free_adamw(1e-2, warmup_steps=2))
  state: Any = tx.init(params())
  np.testing.assert_array_equal(state.z["w"], params()["w"])
  given = lowmem.quantized(optax.adan(1e-3), storage={"m": lowmem.Blockwise("log8")})
  assert is_quantized(optax.tree.get(given.init(params()), "m")["w"])


def test_a_state_of_which_nothing_is_quantized_warns():
  """With the field to name; not of integers, which no storage of a moment holds."""

  def holding(dtype):
    def init(params):
      return Held(jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params))

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))

  with pytest.warns(UserWarning, match=r'storage=\{"seen": Blockwise\("power8"\)\}'):
    lowmem.quantized(holding(jnp.float32)).init(params())
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    lowmem.quantized(holding(jnp.int32)).init(params())


@pytest.mark.parametrize(
  "inner, message",
  [
    (optax.flatten(optax.adam(1e-3)), r"`optax\.flatten\(lowmem\.quantized\(tx\)\)`"),
    (optax.contrib.galore(1e-3, rank=32), "have the shape of no parameter"),
  ],
)
def test_a_state_that_has_the_shape_of_no_parameter_warns(inner, message):
  """It had the bytes of float32, without a word."""
  large = {"w": jnp.zeros((128, 128))}
  with pytest.warns(UserWarning, match="nothing of this state is quantized.*" + message):
    lowmem.quantized(inner).init(large)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    lowmem.quantized(inner).init({"w": jnp.zeros((16, 16))})  # too small to be quantized anyway
    lowmem.quantized(inner, bits=32).init(large)
    remedied = optax.flatten(lowmem.quantized(optax.adam(1e-3))).init(large)
  assert sum(map(is_quantized, jax.tree.leaves(remedied, is_leaf=is_quantized))) == 2


class Held(NamedTuple):
  seen: Any


@pytest.mark.parametrize("make", [lowmem.adamw, lowmem.came])
def test_a_nan_stays_in_moments_of_float32_alone(make):
  """As docs/how_it_works.md says, and what helps: skipped steps, or small arrays quantized too."""
  params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
  bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), params)

  def spoiled(tx):
    """Of which parameters updates are not finite in a good step after a bad one."""
    _, state = tx.update(bad, tx.init(params), params)
    updates, _ = tx.update(params, state, params)
    return {k for k in params if not jnp.isfinite(updates[k]).all()}

  assert spoiled(make(1e-3)) == {"b"}
  assert not spoiled(make(1e-3, min_size=0))
  assert not spoiled(optax.apply_if_finite(make(1e-3), max_consecutive_errors=3))


def test_state_that_starts_above_zero():
  """Adagrad's accumulator starts at 0.1: what is stored is that, not zero."""
  state = lowmem.quantized(optax.adagrad(1e-2)).init(params())
  sums = optax.tree.get(state, "sum_of_squares")["w"]
  assert is_quantized(sums)
  np.testing.assert_allclose(sums.dequantize(), 0.1, rtol=1e-6)


def test_updates_are_as_wide_as_the_wider_of_gradient_and_parameter():
  tx = lowmem.adamw(1e-3)
  p = params()
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)
  for g, q, dtype in [(half, p, jnp.float32), (p, half, jnp.float32), (half, half, jnp.bfloat16)]:
    u, _ = jax.jit(tx.update)(g, tx.init(q), q)
    assert {x.dtype for x in jax.tree.leaves(u)} == {jnp.dtype(dtype)}


def test_extra_arguments_reach_the_rule():
  def update(updates, state, params=None, *, value, **_):
    del params
    return jax.tree.map(lambda g: g * value, updates), state

  # optax's own type knows no keyword that must be given.
  scale = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)  # pyright: ignore[reportArgumentType]
  tx = lowmem.quantized(optax.chain(optax.scale_by_adam(), scale))
  p = params()
  u1, _ = jax.jit(tx.update)(p, tx.init(p), p, value=jnp.float32(1))
  u2, _ = tx.update(p, tx.init(p), p, value=2.0)
  chex.assert_trees_all_close(u2, jax.tree.map(lambda u: 2 * u, u1), rtol=1e-6)


def test_eager_steps_trace_the_rule_once():
  """Outside `jit`, too: retracing and recompiling the loops would take seconds a step."""
  adam, traces = optax.adam(1e-3), []

  def update(*args, **kwargs):
    traces.append(1)
    return adam.update(*args, **kwargs)

  tx, p = lowmem.quantized(optax.GradientTransformation(adam.init, update)), params()
  state = tx.init(p)
  for _ in range(4):
    _, state = tx.update(p, state, p)
  assert len(traces) == 1


def test_inject_hyperparams_needs_static_bits():
  params = {"w": jnp.ones((64, 128))}
  static = ("bits", "block_size", "min_size", "mask", "quantize_mask")
  tx = optax.inject_hyperparams(lowmem.adamw, static_args=static)(learning_rate=1e-3, bits=4)
  state = tx.init(params)
  assert optax.tree.get(state, "mu")["w"].codebook.bits == 4
  updates, _ = jax.jit(tx.update)(params, state, params)
  assert (updates["w"] < 0).all()
  injected = optax.inject_hyperparams(lowmem.adamw)(learning_rate=1e-3)
  names = r"'mask', 'bits', 'block_size', 'min_size', 'quantize_mask'"
  with pytest.raises(TypeError, match=rf"static_args=\(.*{names}\)"):
    injected.init(params)


@pytest.mark.parametrize("rule", ["adam", "adamw", "lion", "sgd", "rmsprop", "adagrad", "ademamix"])
def test_create_knows_4_bits(rule):
  for name in (f"{rule}_4bit", f"{rule}4bit"):
    state = lowmem.create(name, 1e-3).init({"w": jnp.ones((64, 128))})
    held = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, lowmem.QuantizedArray))
    held = [x for x in held if isinstance(x, lowmem.QuantizedArray)]
    assert held and all(x.codebook.bits == 4 for x in held)


def test_moments_of_8_and_4_bits_in_one_rule():
  """Halves of 4-bit blocks beside whole ones of 8 bits, in tiles and as a whole."""
  tx = lowmem.quantized(optax.adam(1e-2), 4, storage={"mu": lowmem.Blockwise("log8")})
  exact, p = optax.adam(1e-2), jax.random.normal(jax.random.key(0), (128, 128))
  grads = jax.random.normal(jax.random.key(1), (4, 128, 128))

  def run(tx):
    def step(carry, g):
      p, state = carry
      updates, state = tx.update(g, state, p)
      return (p + updates, state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), grads)[0][0])(p)

  expected = run(exact)
  travelled = jnp.abs(expected - p).mean()
  whole = run(tx)
  with small_tiles():
    tiled = run(tx)
  for ours in (whole, tiled):
    assert jnp.abs(ours - expected).mean() < 0.2 * travelled
  assert jnp.abs(whole - tiled).mean() < 0.01 * travelled


@pytest.mark.parametrize("rule", [optax.adafactor, lowmem.adafactor])
def test_rows_and_columns_are_no_reason_to_warn(rule):
  """Without momentum nothing is quantized, and there is nothing to."""
  tx = rule(1e-3) if rule is lowmem.adafactor else lowmem.quantized(rule(1e-3))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    jax.eval_shape(tx.init, {"w": jnp.zeros((4096, 8192))})
