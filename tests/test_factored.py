"""Adafactor: optax's at 32 bits, Hugging Face's modes, and statistics that stay finite.

`adafactor.npz` was cut from what transformers 5.23.0 did on a CPU: `p0/<param>` are initial
parameters, `g/<param>` 20 gradients, `hf/<case>/<param>/p<t>` the parameter after step t.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from conftest import GOLDEN
from optax_lowmem._state.moments import is_quantized
from programs import temporaries_of
from registry import quantized_leaves

SHAPES = {
  "mat": (160, 130),
  "thin": (64, 80),  # too small to be factored, large enough to be quantized
  "stack": (4, 160, 130),
  "vec": (5000,),
  "short": (7,),
  "no": (),
}
OPTIONS = {
  "plain": {},
  "momentum": {"momentum": 0.9},
  "bf16_momentum": {"momentum": 0.9, "dtype_momentum": jnp.bfloat16},
  "decayed": {
    "weight_decay_rate": 1e-3,
    "weight_decay_mask": lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
  },
  "bare": {"clipping_threshold": None, "multiply_by_parameter_scale": False, "decay_rate": 0.5},
  "full": {"factored": False, "decay_offset": -3},
}
BARE = {"clipping_threshold": None, "multiply_by_parameter_scale": False}


def tree(seed, dtype=jnp.float32, shapes=SHAPES):
  normal = np.random.default_rng(seed).standard_normal
  return {k: jnp.asarray(normal(shape), dtype) for k, shape in shapes.items()}


def run(tx, steps=20) -> Any:
  """Parameters and the last updates and state."""
  params, updates = tree(0), None
  state, update = tx.init(params), jax.jit(tx.update)
  for t in range(steps):
    updates, state = update(tree(1 + t), state, params)
    params = optax.apply_updates(params, updates)
  return params, updates, state


def test_signature_is_optaxs_and_storage():
  ours = inspect.signature(lowmem.adafactor).parameters
  theirs = inspect.signature(optax.adafactor).parameters
  storage = ["bits", "block_size", "min_size", "quantize_mask", "last_two_axes"]
  assert list(ours) == [*theirs, *storage]
  assert all(ours[k].default == theirs[k].default for k in theirs)


@pytest.mark.parametrize(
  ("name", "lr"),
  [
    *((name, 1e-2) for name in OPTIONS),
    ("plain", None),
    ("plain", optax.linear_schedule(1e-2, 0, 30)),
  ],
)
def test_32_bits_are_optax(name, lr):
  ours = run(lowmem.adafactor(lr, **OPTIONS[name], bits=32))
  theirs = run(optax.adafactor(lr, **OPTIONS[name]))
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


# As a part of the mean update of float32; a quarter above what was measured at these gradients.
LIMITS = {8: 0.019, 4: 0.235}


@pytest.mark.parametrize("bits", LIMITS)
def test_few_bits_stay_near(bits):
  _, ours, state = run(lowmem.adafactor(1e-2, momentum=0.9, bits=bits), 4)
  _, theirs, _ = run(optax.adafactor(1e-2, momentum=0.9), 4)
  held = [k for k in SHAPES if is_quantized(state[0].v[k])]
  assert held == ["thin", "vec"]
  assert len(quantized_leaves(state)) == 2 + 4
  for k in ("mat", "thin", "stack", "vec"):
    distance = jnp.abs(ours[k] - theirs[k]).mean() / jnp.abs(theirs[k]).mean()
    assert distance <= LIMITS[bits], (k, float(distance))


def test_what_is_not_factored_is_updated_by_tiles():
  """Though there is a factored array beside it."""
  shapes = {"mat": (128, 128), "vec": (1 << 20,)}
  tx = lowmem.adafactor(1e-2, **BARE)
  params = jax.eval_shape(lambda: tree(0, shapes=shapes))
  state = jax.eval_shape(tx.init, params)

  def step(state, params):  # with gradients of its own: an argument would be copied
    grads = jax.tree.map(jnp.sin, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(state, params).compile()
  # The gradient, in whose place the update is made, and little else; measured: 4.22.
  assert temporaries_of(compiled) < 4.3 * (1 << 20)


HF_STACK = {"min_dim_size_to_factor": 1, "last_two_axes": True, "bits": 32}
RELATIVE = lowmem.relative_step_size()
CASES = {
  "rel": lowmem.adafactor(RELATIVE, **HF_STACK),
  "rel_warm": lowmem.adafactor(lowmem.relative_step_size(warmup_init=True), **HF_STACK),
  "rel_noscale": lowmem.adafactor(RELATIVE, multiply_by_parameter_scale=False, **HF_STACK),
  "lr": lowmem.adafactor(1e-3, multiply_by_parameter_scale=False, **HF_STACK),
  "lr_scale": lowmem.adafactor(1e-3, **HF_STACK),
  "lr_b1_wd": lowmem.adafactor(
    1e-3,
    multiply_by_parameter_scale=False,
    momentum=0.9,
    weight_decay_rate=1e-3 * 0.01,
    **HF_STACK,
  ),
  "rel_b1": lowmem.adafactor(RELATIVE, momentum=0.9, **HF_STACK),
  "clip05_d05": lowmem.adafactor(
    1e-3,
    multiply_by_parameter_scale=False,
    clipping_threshold=0.5,
    decay_rate=0.5,
    **HF_STACK,
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_hugging_faces_modes(case):
  """Of the parameters, and of the way they went, of which float32 keeps less."""
  golden = np.load(GOLDEN / "adafactor.npz")
  names = [k.removeprefix("p0/") for k in golden if k.startswith("p0/")]
  p0 = {k: golden[f"p0/{k}"] for k in names}
  gradients = {k: golden[f"g/{k}"].astype(np.float32) for k in names}
  tx = CASES[case]
  params: Any = jax.tree.map(jnp.asarray, p0)
  update = jax.jit(tx.update)
  state = tx.init(params)
  for t in range(20):
    updates, state = update({k: g[t] for k, g in gradients.items()}, state, params)
    params = optax.apply_updates(params, updates)
    if t + 1 not in (1, 5, 20):
      continue
    for k in names:
      theirs = golden[f"hf/{case}/{k}/p{t + 1}"]
      difference = np.abs(params[k] - theirs).max()
      assert difference <= 2e-6 * np.abs(theirs).max()  # measured: 7e-7
      # Measured: 1.5e-4 after the first step with momentum, where they went 1e-4 of their size.
      assert difference <= 3e-4 * np.abs(theirs - p0[k]).max()


def test_relative_step_size():
  rate, warm = lowmem.relative_step_size(), lowmem.relative_step_size(warmup_init=True)
  for t in (1, 2, 9_999, 10_000, 10_001, 1_000_000):
    count = jnp.asarray(t - 1)
    np.testing.assert_allclose(rate(count), min(1e-2, t**-0.5), rtol=1e-6)
    np.testing.assert_allclose(warm(count), min(1e-6 * t, t**-0.5), rtol=1e-6)


@pytest.mark.parametrize("bits", [8, 32])
def test_last_two_axes_are_each_layer_on_its_own(bits):
  tx = lowmem.adafactor(bits=bits, last_two_axes=True, **BARE)
  one = optax.adafactor(**BARE)
  params = {"w": tree(0)["stack"]}
  state: Any = tx.init(params)
  states: list[Any] = [one.init(params["w"][i]) for i in range(4)]
  assert state[0].v_row["w"].shape in ((4, 130), (4, 160))
  for t in range(3):
    grads = {"w": tree(1 + t)["stack"]}
    updates, state = jax.jit(tx.update)(grads, state, params)
    for i in range(4):
      alone: Any
      alone, states[i] = one.update(grads["w"][i], states[i], params["w"][i])
      np.testing.assert_allclose(updates["w"][i], alone, rtol=2e-6)
      np.testing.assert_allclose(state[0].v_row["w"][i], states[i][0].v_row, rtol=2e-6)


def test_last_two_axes_of_few_and_of_many_axes():
  shapes = {
    "many": (2, 3, 16, 20),
    "small": (9, 8, 80),
    "mat": (16, 20),
    "vec": (7,),
    "o": (0, 16, 20),
  }
  params, grads = tree(0, shapes=shapes), tree(1, shapes=shapes)
  tx = lowmem.adafactor(1e-2, 16, last_two_axes=True, momentum=0.9)
  state: Any = tx.init(params)
  updates, new = jax.jit(tx.update)(grads, state, params)
  assert state[0].v_row["many"].shape[:2] == (2, 3)
  assert is_quantized(state[0].v["small"]) and state[0].v["vec"].shape == (7,)
  assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
  assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
  assert all(jnp.isfinite(u).all() for u in updates.values())


@pytest.mark.parametrize("last_two_axes", [False, True])
def test_bf16_parameters_have_float32_statistics(last_two_axes):
  params, grads = tree(0, jnp.bfloat16), tree(1, jnp.bfloat16)
  tx = lowmem.adafactor(1e-2, momentum=0.9, last_two_axes=last_two_axes)
  reference = lowmem.adafactor(1e-2, momentum=0.9, last_two_axes=last_two_axes, bits=32)
  updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
  assert all(u.dtype == jnp.bfloat16 for u in updates.values())
  dense = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert dense and all(x.dtype == jnp.float32 for x in dense)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), (grads, params))
  _, exact = jax.jit(reference.update)(wide[0], reference.init(wide[1]), wide[1])
  for x, y in zip(*map(jax.tree.leaves, (state[0].v_row, exact[0].v_row)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("bits", [8, 32])
def test_zero_rows_stay_finite(bits):
  params = tree(0)
  tx = lowmem.adafactor(1e-2, momentum=0.9, bits=bits)
  state, updates = tx.init(params), params
  for t in range(3):
    grads = {k: g.at[:3].set(0) if g.ndim else 0 * g for k, g in tree(1 + t).items()}
    updates, state = jax.jit(tx.update)(grads, state, params)
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
  assert (updates["mat"][:3] == 0).all() and (updates["thin"][:3] == 0).all()


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_out_of_the_statistics(bits, bad):
  params, grads = tree(0), tree(2)
  grads = {k: jnp.ravel(g).at[0].set(bad).reshape(g.shape) for k, g in grads.items()}
  tx, theirs = (f(1e-2) for f in (lambda lr: lowmem.adafactor(lr, bits=bits), optax.adafactor))
  state, other = tx.init(params), theirs.init(params)
  _, state = jax.jit(tx.update)(tree(1), state, params)
  _, other = jax.jit(theirs.update)(tree(1), other, params)
  updates, new = jax.jit(tx.update)(grads, state, params)
  shown, _ = jax.jit(theirs.update)(grads, other, params)
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(new))
  for k in SHAPES:
    np.testing.assert_array_equal(jnp.isfinite(updates[k]), jnp.isfinite(shown[k]))
  assert all(jnp.isfinite(u).all() for u in jax.jit(tx.update)(tree(3), new, params)[0].values())


def test_composes():
  params = tree(0)
  only = {k: k != "vec" for k in SHAPES}
  inner = optax.inject_hyperparams(
    lowmem.adafactor,
    static_args=("bits", "block_size", "min_size", "min_dim_size_to_factor", "dtype_momentum"),
  )(learning_rate=1e-2, momentum=0.9)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(inner, only))
  state = tx.init(params)
  shapes = jax.eval_shape(tx.init, params)
  assert jax.tree.structure(shapes) == jax.tree.structure(state)
  updates, new = jax.jit(tx.update)(tree(1), state, params, value=0.0)
  assert jax.tree.structure(new) == jax.tree.structure(state)
  assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
  assert all(jnp.isfinite(u).all() for u in updates.values())
  with pytest.raises(ValueError, match="params"):
    lowmem.adafactor(1e-2).update(tree(1), lowmem.adafactor(1e-2).init(params))


def test_no_parameters():
  tx = lowmem.adafactor(1e-2, last_two_axes=True)
  state: Any
  updates, state = tx.update({}, tx.init({}), {})
  assert updates == {} and state[0].count == 1


def test_names():
  assert not quantized_leaves(lowmem.create("adafactor", 1e-2).init(tree(0)))
  assert len(quantized_leaves(lowmem.create("came", 1e-4).init(tree(0)))) == 4


@pytest.mark.parametrize(
  ("argument", "match"),
  [
    ({"bits": 5}, "bits"),
    ({"block_size": 3}, "block_size"),
    ({"min_size": -1}, "min_size"),
    ({"decay_rate": -0.8}, "Hugging Face's -0.8 is 0.8"),
    ({"eps": -1.0}, "eps"),
    ({"clipping_threshold": 0.0}, "clipping_threshold"),
    ({"momentum": 1.0}, "momentum"),
    ({"momentum": 0.9, "dtype_momentum": jnp.bfloat16}, "bfloat16 needs `bits=32`"),
  ],
)
def test_refuses_at_construction(argument, match):
  with pytest.raises(ValueError, match=match):
    lowmem.adafactor(1e-2, **argument)
  with pytest.raises(ValueError, match="largest"):
    lowmem.relative_step_size(largest=0.0)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_a_state_of_nnx_may_hold_a_long_vector(momentum):
  """Its second moment is quantized and has no box, as those beside it have: `update` raised."""
  nnx = pytest.importorskip("flax.nnx")
  plain = {"w": jnp.ones((64, 128)), "norm": jnp.ones(4096)}
  boxed = nnx.State({k: nnx.Param(x) for k, x in plain.items()})
  tx = lowmem.adafactor(1e-2, momentum=momentum, min_dim_size_to_factor=32)
  found = []
  for params in (plain, boxed):
    state = tx.init(params)
    updates, new = jax.jit(tx.update)(params, state, params)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    found.append(jax.tree.leaves(updates))
  for x, y in zip(found[0], jax.tree.leaves(found[1]), strict=True):
    np.testing.assert_array_equal(x, y)
