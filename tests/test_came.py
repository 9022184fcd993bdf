"""CAME against the authors' code, layer stacks, bad gradients, and what it costs."""

import ast
import inspect
import pathlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from optax_lowmem._state.moments import is_quantized
from programs import temporaries_of

# came-pytorch 0.1.3 on a CPU: parameters after steps 1, 5 and 20, and the last state.
FILE = np.load(pathlib.Path(__file__).parent / "golden" / "came.npz")
CASES = ast.literal_eval(str(FILE["config"]))
PARAMS = sorted({key.split("/")[1] for key in FILE if key.startswith("p0/")})


def optimizer(case, **kwargs):
  c = CASES[case]
  arguments = (*c["betas"], *c["eps"], c["clip_threshold"], c["weight_decay"])
  return lowmem.came(c["lr"], *arguments, **kwargs)


def trajectory(tx, param):
  """Parameters after every step of the recorded gradients, and the last state."""
  params = jnp.asarray(FILE[f"p0/{param}"])

  def step(carry, g):
    params, state = carry
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  gradients = jnp.asarray(FILE[f"g/{param}"], jnp.float32)
  (_, state), path = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), gradients))(params)
  return path, state[0]


def distance(ours, theirs):
  return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("param", PARAMS)
@pytest.mark.parametrize("case", CASES)
def test_follows_the_authors(case, param):
  path, state = trajectory(optimizer(case, bits=32), param)
  for t in (1, 5, 20):
    assert distance(path[t - 1], FILE[f"{case}/{param}/p{t}"]) <= 2e-6
  fields = {
    "exp_avg": state.momentum.ema,
    "exp_avg_sq": state.v,
    "exp_avg_sq_row": state.v_row,
    "exp_avg_sq_col": state.v_col,
    "exp_avg_res_row": state.res_row,
    "exp_avg_res_col": state.res_col,
  }
  for name, ours in fields.items():
    theirs = FILE.get(f"{case}/{param}/state/{name}")
    if theirs is None:
      assert ours.shape == (1,) and not ours.any()
    else:
      assert ours.shape == theirs.shape
      assert distance(ours, theirs) <= 2e-6


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.018), (4, 0.24)])
@pytest.mark.parametrize("param", ["mat", "t3"])
def test_few_bits_stay_close(param, bits, limit):
  """Drift after 20 steps, by the distance travelled. Measured: at most 0.0121 and 0.160."""
  start = FILE[f"p0/{param}"]
  exact = trajectory(optimizer("b95", bits=32), param)[0][-1]
  ours = trajectory(optimizer("b95", bits=bits, min_size=0), param)[0][-1]
  assert 0 < jnp.abs(ours - exact).mean() <= limit * jnp.abs(exact - start).mean()


def corrected(c, param):
  """Parameters after every step, each average divided by the part of its size that is there."""
  (b1, b2, b3), (eps1, eps2) = c["betas"], c["eps"]
  p = FILE[f"p0/{param}"].astype(np.float64)
  m, averages = 0.0, [0.0, 0.0, 0.0, 0.0]
  path = []

  def average(k, x, b, t):
    averages[k] = b * averages[k] + (1 - b) * x
    return averages[k] / (1 - b**t)

  for t, g in enumerate(FILE[f"g/{param}"].astype(np.float64), 1):
    if p.ndim < 2:
      u = g / np.sqrt(average(0, g**2 + eps1, b2, t))
    else:
      col, row = (average(k, (g**2 + eps1).mean(k - 2, keepdims=True), b2, t) for k in (0, 1))
      u = g / np.sqrt(row * col / row.mean(-2, keepdims=True))
    u = u / max(1.0, np.sqrt((u**2).mean()) / c["clip_threshold"])
    m = b1 * m + (1 - b1) * u
    update = m / (1 - b1**t)
    if p.ndim >= 2:
      square = (u - m) ** 2 + eps2
      col, row = (average(k + 2, square.mean(k - 2, keepdims=True), b3, t) for k in (0, 1))
      update = update / np.sqrt(row * col / row.mean(-2, keepdims=True))
    p = p - c["lr"] * (update + c["weight_decay"] * p)
    path.append(p)
  return path


@pytest.mark.parametrize("param", PARAMS)
@pytest.mark.parametrize("case", CASES)
def test_debias_divides_averages_by_the_part_that_is_there(case, param):
  path, _ = trajectory(optimizer(case, bits=32, debias=True), param)
  exact = corrected(CASES[case], param)
  for t in (1, 2, 5, 20):
    assert distance(path[t - 1], exact[t - 1]) <= 2e-6


def test_debias_starts_at_the_size_that_it_keeps():
  """Of gradients with random signs; the paper's rule has its factor at its place."""
  p = jnp.zeros((64, 96))
  signs = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, (400, 64, 96)), 1.0, -1.0)

  def sizes(tx):
    def step(state, g):
      updates, state = tx.update(g, state)
      return state, jnp.sqrt(jnp.square(updates).mean())

    return jax.lax.scan(step, tx.init(p), signs)[1]

  ours, papers = sizes(lowmem.scale_by_came(debias=True)), sizes(lowmem.scale_by_came())
  assert 0.8 < ours[0] < 1.3 and 0.15 < ours[-1] < 0.3  # sqrt((1 - b1) / (1 + b1)) = 0.23
  t = np.arange(1, 401)
  np.testing.assert_allclose(papers / ours, (1 - 0.9**t) / np.sqrt(1 - 0.9999**t), rtol=0.03)


def test_a_stack_of_layers_is_its_layers():
  """But for the RMS, which is that of the array."""
  tx = lowmem.scale_by_came(clipping_threshold=1e9, min_size=0)
  stack = jax.random.normal(jax.random.key(0), (4, 6, 64, 70))

  def run(p) -> Any:
    state, updates = tx.init(p), p
    for t in range(3):
      updates, state = tx.update(p * (t + 1) + jnp.roll(p, t, -1), state, p)
    return updates

  layers = jnp.stack([run(layer) for layer in stack[0]])
  np.testing.assert_allclose(run(stack)[0], layers, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("bits", [8, 4])
def test_bad_gradients_show_and_leave_the_state_finite(bits, bad):
  tx = lowmem.scale_by_came(bits=bits, min_size=0)
  params = {"w": jnp.ones((64, 128)), "v": jnp.ones((64, 64)), "b": jnp.ones(5)}
  g = jax.tree.map(lambda p: 0.1 * p, params)
  _, state = tx.update(g, tx.init(params), params)
  spoiled = g | {"w": g["w"].at[3, 5].set(bad), "b": g["b"].at[1].set(bad)}
  updates: Any
  updates, new = tx.update(spoiled, state, params)
  assert not np.isfinite(updates["w"][3, 5]) and not np.isfinite(updates["b"][1])
  assert np.isfinite(updates["v"]).all()
  values = [x.dequantize() if is_quantized(x) else x for x in jax.tree.leaves(new, is_quantized)]
  chex.assert_tree_all_finite(values)


def test_rows_without_gradient_stay_finite():
  """Rows and columns of zeros, a gradient of zeros, and then one that is not."""
  tx, params = lowmem.came(1e-2), jnp.ones((64, 128))
  state = tx.init(params)
  rows = jax.random.normal(jax.random.key(0), (64, 128)).at[:32].set(0).at[:, :64].set(0)
  for g in (jnp.zeros_like(rows), rows, jnp.zeros_like(rows), rows + 1):
    updates, state = jax.jit(tx.update)(g, state, params)
    assert np.isfinite(updates).all()


@pytest.mark.parametrize(("bits", "most"), [(8, 1.07), (4, 0.57), (32, 4.004)])
def test_state_and_temporaries_of_a_matrix(bits, most):
  like, tx = jax.ShapeDtypeStruct((4096, 4096), jnp.float32), lowmem.came(1e-3, bits=bits)
  state = jax.eval_shape(tx.init, like)
  assert sum(lowmem.state_bytes(state).values()) / like.size <= most
  update = jax.jit(tx.update, donate_argnums=(0, 1)).lower(like, state, like).compile()
  # One array of the parameter's size, the normalised gradient; 8 bytes in optax.adafactor.
  assert temporaries_of(update) / like.size <= 4.1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"b1": 1.0}, r"`b1` must be in \[0, 1\), got 1.0"),
    ({"b2": -0.1}, r"`b2` must be in \[0, 1\), got -0.1"),
    ({"b3": 2}, r"`b3` must be in \[0, 1\), got 2"),
    ({"eps1": -1e-30}, "`eps1` must be zero or more, got -1e-30"),
    ({"eps2": -1}, "`eps2` must be zero or more, got -1"),
    ({"clipping_threshold": 0}, "`clipping_threshold` must be positive, got 0"),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    lowmem.came(1e-3, **arguments)


@pytest.mark.parametrize("rule", [lowmem.came, lowmem.scale_by_came])
def test_signature_names_the_storage(rule):
  named = ["bits", "block_size", "min_size", "quantize_mask"]
  assert list(inspect.signature(rule).parameters)[-4:] == named
  with pytest.raises(TypeError, match=rf"{rule.__name__}\(\).*'block_sise'"):
    rule(1e-3, block_sise=128)


def test_arrays_of_more_elements_than_an_int32_counts():
  x = jax.ShapeDtypeStruct((80, 8192, 28672), jnp.bfloat16)
  tx = lowmem.came(1e-3)
  updates, _ = jax.eval_shape(tx.update, x, jax.eval_shape(tx.init, x), x)
  assert updates.shape == x.shape
