"""LAMB and LARS: optax's at 32 bits, near it quantized, with a ratio that is real."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from registry import quantized_leaves

SHAPES = {"mat": (160, 130), "thin": (64, 80), "stack": (4, 40, 32), "vec": (9,), "no": ()}
RULES = {
  "lamb": {},
  "lamb_decayed": {"weight_decay": 0.1, "mask": lambda p: jax.tree.map(lambda x: x.ndim > 1, p)},
  "lars": {},
  "lars_decayed": {"weight_decay": lambda t: 0.1 / (1 + t), "nesterov": True, "eps": 1e-6},
  "lars_masked": {"trust_ratio_mask": lambda p: jax.tree.map(lambda x: x.ndim > 1, p)},
}
every = pytest.mark.parametrize("name", RULES)
both = pytest.mark.parametrize("rule", ["lamb", "lars"])


def make(name, home=lowmem, lr=1e-2, **kwargs):
  return getattr(home, name.split("_")[0])(lr, **RULES[name], **kwargs)


def tree(seed, scale=1.0, dtype=jnp.float32):
  normal = np.random.default_rng(seed).standard_normal
  return {k: jnp.asarray(scale * normal(shape), dtype) for k, shape in SHAPES.items()}


def run(tx, steps=20, params=None) -> Any:
  """Parameters and the last updates and state."""
  params = tree(0) if params is None else params
  state, update = tx.init(params), jax.jit(tx.update)
  updates = None
  for t in range(steps):
    updates, state = update(tree(1 + t), state, params)
    params = optax.apply_updates(params, updates)
  return params, updates, state


@both
def test_signature_is_optaxs_and_storage(rule):
  ours = inspect.signature(getattr(lowmem, rule)).parameters
  theirs = inspect.signature(getattr(optax, rule)).parameters
  assert list(ours) == [*theirs, "bits", "block_size", "min_size", "quantize_mask"]
  assert all(ours[k].default == theirs[k].default for k in theirs)


@every
def test_32_bits_are_optax(name):
  ours, theirs = run(make(name, bits=32)), run(make(name, optax))
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


# As a part of the mean update of float32; a quarter above what was measured at these gradients.
LIMITS = {"lamb-8": 0.02, "lamb-4": 0.25, "lars-8": 0.016, "lars-4": 0.2}


@pytest.mark.parametrize("case", LIMITS)
def test_few_bits_stay_near(case):
  rule, bits = case.split("-")
  _, ours, state = run(make(rule, bits=int(bits)), 4)
  _, theirs, _ = run(make(rule, optax), 4)
  assert len(quantized_leaves(state)) == 3 * (2 if rule == "lamb" else 1)
  for k in ("mat", "thin", "stack"):
    distance = jnp.abs(ours[k] - theirs[k]).mean() / jnp.abs(theirs[k]).mean()
    assert distance <= LIMITS[case], (k, float(distance))
  for k in ("vec", "no"):
    np.testing.assert_allclose(ours[k], theirs[k], rtol=1e-4)


@both
@pytest.mark.parametrize("bits", [8, 4])
def test_the_trust_ratio_is_real(rule, bits):
  """Not so bitsandbytes' LAMB8bit."""
  tx = make(rule, bits=bits)
  _, small, _ = run(tx, 1)
  _, large, _ = run(tx, 1, jax.tree.map(lambda p: 10 * p, tree(0)))
  for k in SHAPES:
    # Measured: 2.5e-7, two ulp; no code falls to the other side of a tie.
    np.testing.assert_allclose(large[k], 10 * small[k], rtol=3.7e-7)


def test_lambs_step_is_as_long_as_its_parameter():
  params, updates, _ = run(make("lamb"), 3)
  for k in SHAPES:
    before = params[k] - updates[k]
    ratio = jnp.linalg.norm(updates[k]) / jnp.linalg.norm(before)
    np.testing.assert_allclose(ratio, 1e-2, rtol=1e-4)


@both
def test_composes(rule):
  params = tree(0)
  only = {k: len(shape) > 1 for k, shape in SHAPES.items()}
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(make(rule), only))
  state = tx.init(params)
  shapes = jax.eval_shape(tx.init, params)
  assert jax.tree.structure(shapes) == jax.tree.structure(state)
  updates, new = jax.jit(tx.update)(tree(1), state, params, value=0.0)
  assert jax.tree.structure(new) == jax.tree.structure(state)
  assert all(jnp.isfinite(u).all() for u in updates.values())


@both
def test_bf16_parameters_have_float32_state(rule):
  params = tree(0, dtype=jnp.bfloat16)
  tx = make(rule)
  updates, state = jax.jit(tx.update)(tree(1, dtype=jnp.bfloat16), tx.init(params), params)
  assert all(u.dtype == jnp.bfloat16 for u in updates.values())
  dense = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert dense and all(x.dtype == jnp.float32 for x in dense)


@both
def test_quantize_mask_and_names(rule):
  mask = {k: k == "mat" for k in SHAPES}
  assert len(quantized_leaves(make(rule, quantize_mask=mask).init(tree(0)))) == (
    2 if rule == "lamb" else 1
  )
  for name, bits in ((rule, 32), (f"{rule}_8bit", 8), (f"{rule}8bit", 8), (f"{rule}_4bit", 4)):
    held = quantized_leaves(lowmem.create(name, 1e-2).init(tree(0)))
    assert {q.codebook.bits for q in held} == ({bits} if bits < 32 else set())


@both
def test_refuses_at_construction(rule):
  bad: dict[str, Any]
  for bad in ({"bits": 5}, {"block_size": 3}, {"min_size": -1}):
    with pytest.raises(ValueError, match=next(iter(bad))):
      make(rule, **bad)
