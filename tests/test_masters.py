"""Parameters in bfloat16: masters are exact, and rounding at random has no bias."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from optax_lowmem._masters import bits
from optax_lowmem._masters.position_noise import position_noise
from optax_lowmem._quantization.positions import indices
from programs import temporaries_of
from registry import small_tiles

OPTIMIZERS = {
  "optax.adamw": lambda: optax.adamw(1e-3, weight_decay=0.1),
  "optax.lion": lambda: optax.lion(1e-3),
  "optax.adam, mu in bfloat16": lambda: optax.adam(1e-3, mu_dtype=jnp.bfloat16),
  "optax.sgd": lambda: optax.sgd(1e-2, momentum=0.9),
  "optax.adafactor": lambda: optax.adafactor(1e-3),
  "adamw": lambda: lowmem.adamw(1e-3, weight_decay=0.1),
  "adamw, 4 bits": lambda: lowmem.adamw(1e-3, bits=4),
  "lion": lambda: lowmem.lion(1e-3),
  "sgd": lambda: lowmem.sgd(1e-2, momentum=0.9),
  "adafactor": lambda: lowmem.adafactor(1e-3, momentum=0.9),
  "came": lambda: lowmem.came(1e-4),
}


def bits_of(x):
  """The bit pattern of float32, in NumPy."""
  return np.asarray(x, np.float32).view(np.uint32)


def rounded(w):
  """bfloat16 of float32, halves away from zero, written anew in NumPy."""
  return ((bits_of(w) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16).view(jnp.bfloat16)


def patterns():
  """Float32 of all kinds: every lower half at some upper ones, and any."""
  lower = np.arange(2**16, dtype=np.uint32)
  uppers = [0x0000, 0x8000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x3F81, 0xBF80, 0x7F7F, 0xFF7F, 0x7F00]
  some = [np.uint32(u << 16) | lower for u in uppers]
  drawn = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32)
  special = np.array([0x7F800000, 0xFF800000, 0x80000000, 0, 0x7F7FFFFF, 1], np.uint32)
  return np.concatenate([*some, drawn, special]).view(np.float32)


def start(weights, tx):
  params = weights.astype(jnp.bfloat16)
  return lowmem.with_master_params(weights, params, tx.init(params))


def test_parameters_and_remainders_are_the_master():
  """For every float32; a NaN is a NaN."""
  weights = patterns()
  params, state = start(jnp.asarray(weights), lowmem.master_weights(optax.identity()))
  back = np.asarray(lowmem.master_params(params, state))
  nan = np.isnan(weights)
  assert nan.any()
  np.testing.assert_array_equal(bits_of(back)[~nan], bits_of(weights)[~nan])
  assert np.isnan(back[nan]).all()
  assert np.isnan(np.asarray(params, np.float32)[nan]).all()
  p = np.asarray(params)
  np.testing.assert_array_equal(p[~nan].view(np.uint16), rounded(weights)[~nan].view(np.uint16))


def test_8_bits_are_a_master_of_24():
  weights = patterns()
  weights = weights[np.isfinite(weights)]
  params, state = start(jnp.asarray(weights), lowmem.master_weights(optax.identity(), bits=8))
  back = np.asarray(lowmem.master_params(params, state))
  assert np.isfinite(back).all()
  assert (bits_of(back) & 0xFF == 0).all()
  off = np.abs(bits_of(back).astype(np.int64) - bits_of(weights).astype(np.int64))
  below = np.abs(weights) <= np.array(0x7F7FFF7F, np.uint32).view(np.float32)
  assert off[below].max() == 128  # the nearest
  again = lowmem.with_master_params(jnp.asarray(back), params, state)
  np.testing.assert_array_equal(lowmem.master_params(*again), back)


def moved(weights, changes):
  """Parameters and master after one update by `changes`."""
  tx = lowmem.master_weights(optax.identity())
  params, state = start(weights, tx)
  updates, state = tx.update(changes, state, params)
  new = optax.apply_updates(params, updates)
  return np.asarray(new), np.asarray(lowmem.master_params(new, state))


def test_updates_land_on_the_rounded_master():
  """Masters of all sizes, changed by anything that leaves more than 2^-15 of them."""
  rng = np.random.default_rng(1)
  normal = lambda: rng.standard_normal(2**20).astype(np.float32)  # noqa: E731
  weights = normal() * np.exp2(rng.integers(-60, 100, 2**20)).astype(np.float32)
  changes = weights * normal() * np.exp2(rng.integers(-30, 14, 2**20)).astype(np.float32)
  changes[:1000] = -weights[:1000] + weights[:1000] * 2.0**-14
  target = weights + changes
  p, master = moved(jnp.asarray(weights), jnp.asarray(changes))
  usual = np.abs(target) > 2.0**-15 * np.abs(rounded(weights).astype(np.float32))
  assert usual.mean() > 0.99
  np.testing.assert_array_equal(bits_of(master)[usual], bits_of(target)[usual])
  np.testing.assert_array_equal(p[usual], rounded(target)[usual])


@pytest.mark.parametrize("factor", [-3 * 2.0**-24, 1.1 * 2.0**-17, -1.7 * 2.0**-30, 2.0**-126])
def test_where_no_update_leads_the_master_is_nearest_to_where_it_lands(factor):
  """A weight that all but vanishes: parameters and state mean one master, and it is not far."""
  rng = np.random.default_rng(2)
  p = rounded(rng.choice([-1, 1], 2**16) * rng.uniform(0.5, 2, 2**16))
  target = (factor * p.astype(np.float32) * rng.uniform(1, 2, 2**16)).astype(np.float32)

  @jax.jit
  def step(p, target):
    pattern = bits.bits_of(target)
    to = bits.float32_of(bits.upper(pattern))
    update, landed = bits.reach(p, to), bits.landing(p, to)
    low = bits.remainder_of(pattern, landed).astype(jnp.int16)
    return optax.apply_updates(p, update), landed, low

  new, landed, low = step(jnp.asarray(p), jnp.asarray(target))
  np.testing.assert_array_equal(bits_of(new), np.asarray(landed).view(np.uint32))
  master = np.asarray(bits.join(new, low))
  assert (bits_of(master) != bits_of(target)).any()  # or nothing was asked
  error = np.abs(master.astype(np.float64) - target)
  assert (error <= 2.0**-24 * np.abs(p.astype(np.float64))).all()


def test_specials_stay_what_they_are():
  inf, nan, most = np.inf, np.nan, np.finfo(np.float32).max
  weights = jnp.float32([inf, -inf, nan, most, -0.0, 0.0, 1.0, 1.0, 1.0, -0.0])
  changes = jnp.float32([0.0, 0.0, 0.0, 0.0, -0.0, -0.0, inf, nan, -1.0, 1.0])
  p, master = moved(weights, changes)
  expected = np.array([inf, -inf, nan, most, -0.0, 0.0, inf, nan, 0.0, 1.0], np.float32)
  np.testing.assert_array_equal(master, expected)
  np.testing.assert_array_equal(np.signbit(master), np.signbit(expected))
  assert p.astype(np.float32)[3] == inf  # the largest is nearest to infinity
  assert not np.isnan(np.delete(p.astype(np.float32), [2, 7])).any()


SHAPES = {"w": (48, 128), "v": (64, 80), "b": (128,)}


def weights_of(seed=0):
  normal = np.random.default_rng(seed).standard_normal
  return {k: jnp.asarray(normal(s) * 0.3, jnp.float32) for k, s in SHAPES.items()}


def loss(params, t):
  """On a batch of its own for each step."""
  key = jax.random.fold_in(jax.random.key(0), t)
  x = jnp.tanh(jax.random.normal(key, (8, 48)) @ params["w"] + params["b"])
  y = jax.random.normal(key, (8, 64)) @ params["v"]
  return jnp.mean(x**2) + jnp.mean((y - 1) ** 2)


def gradients(params, t):
  """They depend on the parameters, rounded as they are."""
  return jax.grad(loss)(params, t)


def in_bfloat16(weights):
  return jax.tree.map(
    lambda w: jax.lax.bitcast_convert_type(
      ((jax.lax.bitcast_convert_type(w, jnp.uint32) + 0x8000) >> 16).astype(jnp.uint16),
      jnp.bfloat16,
    ),
    weights,
  )


@functools.cache
def trained_in_float32(name, steps):
  """Float32 weights after some steps whose gradients are taken at their bfloat16 copy."""
  tx, weights = OPTIMIZERS[name](), weights_of()
  gradient = jax.jit(gradients)

  @jax.jit
  def step(g, state, weights):
    g = jax.tree.map(lambda g: g.astype(jnp.float32), g)
    updates, state = tx.update(g, state, weights)
    return optax.apply_updates(weights, updates), state

  state = tx.init(weights)
  for t in range(steps):
    weights, state = step(gradient(in_bfloat16(weights), t), state, weights)
  return weights, state


def trained(name, steps, bits):
  tx, gradient = lowmem.master_weights(OPTIMIZERS[name](), bits), jax.jit(gradients)

  @jax.jit
  def step(g, state, params):
    updates, state = tx.update(g, state, params)
    return optax.apply_updates(params, updates), state

  params = in_bfloat16(weights_of())
  params, state = lowmem.with_master_params(weights_of(), params, tx.init(params))
  for t in range(steps):
    params, state = step(gradient(params, t), state, params)
  return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_thousand_steps_are_those_of_float32(name):
  """Bit for bit, moments too."""
  weights, inner_state = trained_in_float32(name, 1000)
  params, state = trained(name, 1000, 16)
  ours = lowmem.master_params(params, state)
  for k in weights:
    assert np.abs(weights[k] - weights_of()[k]).mean() > 0.01
    np.testing.assert_array_equal(bits_of(ours[k]), bits_of(weights[k]))
    np.testing.assert_array_equal(np.asarray(params[k]), rounded(weights[k]))
  equal = jax.tree.map(np.array_equal, state.inner_state, inner_state)
  assert all(jax.tree.leaves(equal))


@pytest.mark.parametrize("name", ["adamw", "adamw, 4 bits", "lion"])
def test_steps_by_tiles_are_those_of_float32(name):
  """As large arrays are updated: the update that is added is rounded, as one that was stored."""
  trained_in_float32.cache_clear()
  with small_tiles():
    weights, _ = trained_in_float32(name, 5)
    ours = lowmem.master_params(*trained(name, 5, 16))
  trained_in_float32.cache_clear()
  for k in weights:
    np.testing.assert_array_equal(bits_of(ours[k]), bits_of(weights[k]))


@pytest.mark.parametrize("name", ["optax.adamw", "optax.sgd"])
def test_8_bits_stay_near_float32_for_a_thousand_steps(name):
  """1e-4 in weights, by root mean square, and 1e-4 of the loss."""
  exact, _ = trained_in_float32(name, 1000)
  ours = lowmem.master_params(*trained(name, 1000, 8))
  off = optax.tree.norm(jax.tree.map(jnp.subtract, ours, exact))
  assert off <= 1e-4 * np.sqrt(sum(w.size for w in exact.values()))
  drawn = range(5000, 5016)
  held_out = [sum(float(loss(w, t)) for t in drawn) for w in (ours, exact)]
  assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)


WRAPPERS = {
  "16 bits": lambda tx: lowmem.master_weights(tx),
  "8 bits": lambda tx: lowmem.master_weights(tx, bits=8),
  "stochastic": lambda tx: lowmem.stochastic_rounding(tx, seed=3),
}


def slowly(tx, steps, change, size=4096, begin=1.0):
  """The mean of equal parameters after so many equal changes."""
  params = jnp.full(size, begin, jnp.bfloat16)

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jnp.full(size, change), state, params)
    return (optax.apply_updates(params, updates), state), None

  (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))((params, tx.init(params)))
  return params.astype(jnp.float32)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("change", [-1e-4, 1e-4, 2.0**-17, -1e-6])
def test_what_is_less_than_a_step_of_bfloat16_is_not_lost(wrapper, change):
  """Thousands of equal steps of equal weights: the mean goes where they go."""
  steps, size = 2000, 4096
  plain = slowly(optax.identity(), steps, change)
  assert (plain == 1).all()
  end = slowly(WRAPPERS[wrapper](optax.identity()), steps, change)
  # What is drawn a step has at most half the width of the rounding as its deviation.
  width = {"16 bits": 0.0, "8 bits": 2.0**-16, "stochastic": 2.0**-7}[wrapper]
  noise = 5 * 0.5 * width * np.sqrt(steps / size)
  held = 2.0**-8 if wrapper != "stochastic" else 0.0  # the copy is rounded
  assert abs(float(end.mean()) - (1 + steps * change)) <= noise + held + 2e-5


@pytest.mark.parametrize("begin", [1.0, -1.0, 3.7e-3, 255.5])
def test_rounding_at_random_has_the_right_mean(begin):
  """One step from a bfloat16 to anywhere between it and the next."""
  begin = float(jnp.bfloat16(begin))
  size, gap = 2**20, float(2.0 ** (np.floor(np.log2(abs(begin))) - 7))
  for part in (0.001, 0.3, 0.5, 0.9):
    tx = lowmem.stochastic_rounding(optax.identity(), seed=int(1000 * part))
    params = jnp.full(size, begin, jnp.bfloat16)
    change = np.copysign(part * gap, begin)
    updates, _ = tx.update(jnp.full(size, change), tx.init(params), params)
    new: Any = optax.apply_updates(params, updates)
    steps = np.asarray((new.astype(jnp.float32) - begin) / np.copysign(gap, begin))
    assert set(np.unique(steps)) <= {0.0, 1.0}
    assert abs(steps.mean() - part) <= 5 * np.sqrt(part * (1 - part) / size) + 2**-16


def test_random_bits_are_of_seed_step_parameter_and_index():
  """No two of them are alike, and neighbours have nothing in common."""
  draw = jax.jit(position_noise, static_argnums=1)
  shape = (256, 256)
  words = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
  drawn = [np.asarray(draw(indices(shape), 16, *w), np.float64) for w in words]
  for a in drawn:
    assert abs(a.mean() / 2**16 - 0.5) < 5 / np.sqrt(12 * a.size)
    for b in (a[:, :-1].ravel(), a[:-1].ravel()):
      other = a[:, 1:] if b.size == a[:, 1:].size and b is not a[:-1].ravel() else a[1:]
      assert abs(np.corrcoef(b, other.ravel())[0, 1]) < 5 / np.sqrt(b.size)
    counts = np.bincount((a.ravel() // 256).astype(int), minlength=256)
    assert ((counts - 256) ** 2 / 256).sum() < 255 + 6 * np.sqrt(2 * 255)
  for i, a in enumerate(drawn):
    for b in drawn[:i]:
      assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_no_float32_array_beside_gradient_and_update(wrapper):
  """On a CPU, of gradients in bfloat16; of float32 `test_contract.py` asks it.

  Compiled for an H100 there is none: `tests/test_accelerator_masters.py`.
  """
  tx, width = WRAPPERS[wrapper](lowmem.adamw(1e-3)), 2048
  params = {"w": jax.ShapeDtypeStruct((width, width), jnp.bfloat16)}
  state = jax.eval_shape(tx.init, params)
  update = jax.jit(tx.update, donate_argnums=1).lower(params, state, params)
  assert temporaries_of(update.compile()) <= 0.1 * width**2
