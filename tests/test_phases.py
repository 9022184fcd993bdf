"""Functions computed in phases: the same results, and nothing computed between two phases twice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from optax_lowmem._programs.phases import in_a_phase, in_phases

X = jax.random.normal(jax.random.key(0), (96, 128))
Y = jax.random.normal(jax.random.key(1), (96, 128))
W = jax.random.normal(jax.random.key(2), (128, 128)) / 16


def confidence(x, y):
  """Rows, columns, and a norm made of both: CAME's shape."""
  row, col = jnp.square(x).mean(-1), jnp.square(x).mean(-2)
  u = x * jax.lax.rsqrt(row / row.mean())[:, None] * jax.lax.rsqrt(col)
  u = u / jnp.maximum(1.0, jnp.sqrt(jnp.square(u).mean()))
  y = 0.9 * y + 0.1 * u
  return y / jnp.sqrt(jnp.square(u - y).mean(0)), row, col


FUNCTIONS = {
  "elementwise": lambda x, y: x * y + 1,
  "norm": lambda x, y: x / jnp.linalg.norm(x) + y,
  "rows and columns": confidence,
  "maximum": lambda x, y: jnp.where(jnp.abs(x) == jnp.abs(x).max(-1, keepdims=True), y, 0.0),
  "softmax": lambda x, y: jax.nn.softmax(x, axis=-1) @ W + y,
  "argmax": lambda x, y: x.argmax(-1) + y.argmin(),
  "cumulative": lambda x, y: jnp.cumsum(x, 0) / jnp.linalg.norm(y),
  "branches": lambda x, y: jax.lax.cond(x.sum() > 0, lambda: x, lambda: y) / y.max(),
  "loop": lambda x, y: jax.lax.fori_loop(0, 3, lambda i, z: z / jnp.linalg.norm(z), x + y),
  "argument and constant": lambda x, y: (x, 3.0, jnp.arange(5), y.sum()),
  "odd sizes": lambda x, y: x[:95, :127] / jnp.linalg.norm(y[:95, :127], axis=0),
  "uniform": lambda x, y: jnp.full_like(x, y.sum()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_the_same(name):
  fn = FUNCTIONS[name]
  for got, want in zip(
    jax.tree.leaves(jax.jit(lambda x, y: in_phases(fn, x, y))(X, Y)),
    jax.tree.leaves(fn(X, Y)),
    strict=True,
  ):
    assert got.dtype == jnp.asarray(want).dtype
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def phases(fn, *args):
  """How many barriers there are: of phases one, and one behind what ends each of them."""
  return str(jax.make_jaxpr(lambda *x: in_phases(fn, *x))(*args)).count("optimization_barrier")


def test_reductions_that_can_be_known_together_are_one_phase():
  # Sums over rows of two things, and then the result.
  def two(x, y):
    return x / (jnp.square(x).sum(-1) + jnp.square(y).sum(-1))[:, None]

  def apart(x, y):
    scale = jnp.square(x).sum(-1)
    return x / jnp.square(y / scale[:, None]).sum(-1)[:, None]

  assert phases(two, X, Y) == 3
  assert phases(apart, X, Y) == 5


def test_a_reduction_waits_for_others_of_its_kind():
  """The mean over rows is asked for late: it is computed with the sum that comes later anyway."""

  def fn(x):
    col, row = jnp.square(x).mean(0), jnp.square(x).mean(-1)
    squares = jnp.square(x / jnp.sqrt(col)).sum(-1)
    return x / (squares * row)[:, None]

  assert phases(fn, X) == 5  # columns; both of rows; the result


@pytest.mark.parametrize("size", [4096, 64 * 66, 5000])
def test_parameters_do_not_wait_for_each_other(size):
  """Nothing ties two parameters together but the numbers that they share."""

  def fn(params):
    return jax.tree.map(lambda x: x / jnp.linalg.norm(x), params)

  text = str(jax.make_jaxpr(lambda p: in_phases(fn, p))({"a": jnp.ones(size), "b": jnp.ones(size)}))
  for line in text.splitlines():
    if "optimization_barrier" in line and "=" in line:
      assert line.split("=")[0].count(f"f32[{size}]") <= 1


def test_vmap_and_grad():
  fn = FUNCTIONS["rows and columns"]
  batch = jnp.stack([X, Y]), jnp.stack([Y, X])
  got = jax.vmap(lambda x, y: in_phases(fn, x, y)[0])(*batch)
  np.testing.assert_allclose(got[1], fn(Y, X)[0], rtol=1e-4, atol=1e-5)
  slopes = [
    jax.grad(lambda x, f=f: f(x, Y)[0].sum())(X) for f in (fn, lambda x, y: in_phases(fn, x, y))
  ]
  np.testing.assert_allclose(slopes[0], slopes[1], rtol=1e-3, atol=1e-4)


def test_known_while_traced():
  seen = []

  def fn(x):
    seen.append(in_a_phase())
    return x

  in_phases(fn, X)
  assert seen == [True] and not in_a_phase()


@pytest.mark.parametrize("name", ["came", "lamb", "lars", "adafactor"])
@pytest.mark.parametrize("bits", [8, 4])
def test_rules_that_take_norms_are_the_same_in_phases(name, bits):
  """Two steps of what accelerators compute, on a CPU, beside what a CPU computes."""
  momentum = {"momentum": 0.9} if name == "adafactor" else {}
  tx = getattr(lowmem, name)(1e-2, bits=bits, **momentum)
  params = {"w": X, "stack": jnp.ones((2, 64, 192)), "r": X[:, :77], "b": Y[0]}

  def run(update):
    state = tx.init(params)
    for key in (3, 4):
      keys = jax.random.split(jax.random.key(key), len(params))
      leaves, treedef = jax.tree.flatten(params)
      grads = [jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
      updates, state = jax.jit(update)(treedef.unflatten(grads), state, params)
    return updates, state

  want, _ = run(tx.update)
  got, state = run(lambda *args: in_phases(tx.update, *args))
  assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
  for name, x in want.items():
    # Where a sum is an ulp off, a moment between two codes takes the other one.
    error = jnp.linalg.norm(got[name] - x) / jnp.linalg.norm(x)
    assert error < 0.02, name


def test_any_rule_that_takes_norms():
  tx = lowmem.quantized(optax.lamb(1e-2))
  state = tx.init(X)
  want, _ = jax.jit(tx.update)(Y, state, X)
  got, _ = jax.jit(lambda *args: in_phases(tx.update, *args))(Y, state, X)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)
