"""The update in the backward pass is the ordinary step over a list of layers."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_lowmem as lowmem
from optax_lowmem._backward.layer_loops import squares
from programs import temporaries_of

LAYERS, WIDTH, ROWS = 3, 64, 8
OPTIMIZERS = {
  "adamw": lowmem.adamw,
  "lion": lowmem.lion,
  "adafactor": lambda lr, **kw: lowmem.adafactor(lr, momentum=0.9, **kw),
  "came": lowmem.came,
  "sgd": lambda lr, **kw: lowmem.sgd(lr, momentum=0.9, **kw),
}


def embed(outer, batch):
  return outer["table"][batch["tokens"]]


def layer(p, x, batch, scale=1.0):
  del batch
  h = (x * p["norm"]).astype(x.dtype)
  return x + scale * (jnp.tanh(h @ p["up"]) @ p["down"])


def head(outer, x, batch):
  logits = x @ outer["table"].T  # tied
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def parameters(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)

  def normal(key, *shape):
    return (jax.random.normal(key, shape) / np.sqrt(shape[-2])).astype(dtype)

  return {
    "outer": {"table": normal(keys[0], 32, WIDTH)},
    "layers": {
      "norm": jnp.ones((LAYERS, WIDTH)),
      "up": normal(keys[1], LAYERS, WIDTH, 2 * WIDTH),
      "down": normal(keys[2], LAYERS, 2 * WIDTH, WIDTH),
    },
  }


BATCH = {"tokens": jnp.arange(ROWS), "labels": jnp.arange(ROWS)[::-1]}


def unstacked(params):
  """The same parameters as a list of layers."""
  each = [jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in range(LAYERS)]
  return {"layers": each, "outer": params["outer"]}


def stacked(params):
  layers = jax.tree.map(lambda *a: jnp.stack(a), *params["layers"])
  return {"outer": params["outer"], "layers": layers}


def given_layer(p, x, batch, factors):
  """A layer whose gradients are its factors, whatever its parameters: in every program alike."""
  del batch
  return x + sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), p, factors)))


def given_head(outer, x, batch):
  return x + (outer["table"] * batch["factors"]).sum()


FACTORS = jax.tree.map(
  lambda a: jax.random.normal(jax.random.key(a.size), a.shape) * 0.3, parameters()["layers"]
)


class Ordinary:
  """A step over a list of layers."""

  def __init__(self, tx, embed=embed, layer=layer, head=head, inputs=None):
    self.tx, self.embed, self.layer, self.head, self.inputs = tx, embed, layer, head, inputs

  def loss(self, params, batch):
    x = self.embed(params["outer"], batch)
    for i, p in enumerate(params["layers"]):
      own = [] if self.inputs is None else [jax.tree.map(lambda a, i=i: a[i], self.inputs)]
      x = self.layer(p, x, batch, *own)
    return self.head(params["outer"], x, batch)

  def run(self, params, batch, steps):
    @jax.jit
    def step(params, state):
      loss, grads = jax.value_and_grad(self.loss)(params, batch)
      updates, state = self.tx.update(grads, state, params)
      return loss, optax.apply_updates(params, updates), state

    params, losses = unstacked(params), []
    state = self.tx.init(params)
    for _ in range(steps):
      loss, params, state = step(params, state)
      losses.append(loss)
    return losses, stacked(params)


def run(training, params, batch, steps, inputs=None):
  step, state, losses = jax.jit(training.step), training.init(params), []
  for _ in range(steps):
    loss, params, state = step(params, state, batch, inputs)
    losses.append(loss)
  return losses, params


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_ordinary_step(name):
  tx = OPTIMIZERS[name](1e-2, bits=32)
  want = Ordinary(tx).run(parameters(), BATCH, 3)
  got = run(lowmem.update_in_backward(embed, layer, head, tx), parameters(), BATCH, 3)
  chex.assert_trees_all_close(got, want, rtol=2e-5, atol=2e-6)


def run_given(tx, params, steps=2):
  """Both ways, of gradients that are the same to the bit."""
  batch = {"factors": jnp.ones((32, WIDTH))}
  parts = (lambda outer, batch: jnp.zeros(())), given_layer, given_head
  want = Ordinary(tx, *parts, FACTORS).run(params, batch, steps)[1]
  got = run(lowmem.update_in_backward(*parts, tx), params, batch, steps, FACTORS)[1]
  return got, want


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_quantized_state_is_the_ordinary_one(name, bits):
  """But for a code in a thousand: where XLA multiplies and adds in one step it may be the next."""
  got, want = run_given(OPTIMIZERS[name](1e-2, bits=bits, min_size=256), parameters())
  alike = jax.tree.map(lambda a, b: np.isclose(a, b, rtol=1e-6, atol=1e-7).ravel(), got, want)
  assert np.concatenate(jax.tree.leaves(alike)).mean() >= 0.999


WRAPPERS = {
  "masters 16": lambda tx: lowmem.master_weights(tx),
  "masters 8": lambda tx: lowmem.master_weights(tx, bits=8),
  "rounding": lambda tx: lowmem.stochastic_rounding(tx, seed=3),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_bfloat16_is_the_ordinary_one(name):
  """So is what is rounded at random: no two layers share their noise."""
  tx = WRAPPERS[name](lowmem.adamw(1e-3))
  got, want = run_given(tx, parameters(jnp.bfloat16))
  chex.assert_trees_all_equal(got, want)


@pytest.mark.parametrize("name", ["masters 8", "rounding"])
def test_equal_layers_are_rounded_differently(name):
  params = parameters(jnp.bfloat16)
  same = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), (params["layers"], FACTORS))
  params["layers"], factors = same
  batch = {"factors": jnp.ones((32, WIDTH))}
  parts = (lambda outer, batch: jnp.zeros(())), given_layer, given_head
  training = lowmem.update_in_backward(*parts, WRAPPERS[name](lowmem.sgd(1e-4)))
  _, params, state = jax.jit(training.step)(params, training.init(params), batch, factors)
  own = {"masters 8": lambda: state["layers"].remainder, "rounding": lambda: params["layers"]}
  up = own[name]()["up"]
  assert float((up[0] != up[1]).mean()) > 0.01


def test_inputs_aux_and_the_norm_of_all_gradients():
  inputs = jnp.array([0.5, 1.0, 0.25])
  tx = optax.sgd(0.1)

  def with_aux(outer, x, batch):
    return head(outer, x, batch), x.mean()

  training = lowmem.update_in_backward(embed, layer, with_aux, tx, clip_norm=0.5, has_aux=True)
  (losses, params) = run(training, parameters(), BATCH, 2, inputs)
  clipped = optax.chain(optax.clip_by_global_norm(0.5), tx)
  want = Ordinary(clipped, inputs=inputs).run(parameters(), BATCH, 2)
  assert (
    optax.tree.norm(jax.grad(Ordinary(tx, inputs=inputs).loss)(unstacked(parameters()), BATCH))
    > 0.5
  )
  chex.assert_trees_all_close(([loss for loss, _ in losses], params), want, rtol=1e-5, atol=1e-6)
  assert all(jnp.isfinite(aux) for _, aux in losses)


def test_a_norm_within_is_that_of_one_layer():
  tx = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))
  params = parameters()
  training = lowmem.update_in_backward(embed, layer, head, tx)
  _, new, _ = jax.jit(training.step)(params, training.init(params), BATCH)
  grads = jax.grad(Ordinary(tx).loss)(unstacked(params), BATCH)
  each = [*grads["layers"], grads["outer"]]
  moved = [tx.update(g, tx.init(g))[0] for g in each]
  want = optax.apply_updates(unstacked(params), {"layers": moved[:-1], "outer": moved[-1]})
  chex.assert_trees_all_close(new, stacked(want), rtol=1e-5, atol=1e-6)


class Agreement(NamedTuple):
  last: Any
  dot: jax.Array


def test_what_is_replaced_is_read_before():
  """Of all arrays a number, made of the state that each of them is replaced in."""

  def init(params):
    return Agreement(jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))

  def update(updates, state: Any, params=None):
    del params
    dots = map(jnp.vdot, jax.tree.leaves(state.last), jax.tree.leaves(updates))
    steps = jax.tree.map(lambda g: -0.1 * g, updates)
    return steps, Agreement(updates, jnp.sum(jnp.stack([*dots])))

  tx = optax.GradientTransformation(init, update)
  training = lowmem.update_in_backward(**PARTS, tx=tx)
  step, params = jax.jit(training.step), parameters()
  _, params, state = step(params, training.init(params), BATCH)
  np.testing.assert_array_equal(state["layers"].dot, jnp.zeros(LAYERS))
  _, _, new = step(params, state, BATCH)
  products = jax.tree.map(jnp.multiply, state["layers"].last, new["layers"].last)
  want = sum(x.reshape(LAYERS, -1).sum(1) for x in jax.tree.leaves(products))
  np.testing.assert_allclose(new["layers"].dot, want, rtol=1e-5)


def test_a_step_is_compiled_once_and_keeps_its_form():
  training = lowmem.update_in_backward(embed, layer, head, lowmem.adamw(1e-3))
  step = jax.jit(chex.assert_max_traces(training.step, n=1), donate_argnums=(0, 1))
  params = parameters()
  state = training.init(params)
  form = jax.tree.map(lambda a: (a.shape, a.dtype), (params, state))
  for _ in range(3):
    _, params, state = step(params, state, BATCH)
  chex.assert_trees_all_equal(jax.tree.map(lambda a: (a.shape, a.dtype), (params, state)), form)
  assert jax.tree.leaves(state["layers"])[0].tolist() == [3] * LAYERS  # each counts


def test_the_loss_is_given_to_rules_that_want_it():
  tx = optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1))
  training = lowmem.update_in_backward(embed, layer, head, tx)
  params = parameters()
  loss, _, state = jax.jit(training.step)(params, training.init(params), BATCH)
  np.testing.assert_allclose(state["layers"][1].best_value, jnp.full(LAYERS, loss), rtol=1e-6)


def test_what_cannot_work_is_refused():
  def make(**kw):
    return lowmem.update_in_backward(**(PARTS | kw))

  tx = optax.sgd(0.1)
  sums = optax.MultiSteps(tx, 2).gradient_transformation()
  with pytest.raises(ValueError, match="accumulates gradients"):
    make(tx=optax.MultiSteps(lowmem.adamw(1e-3), 4).gradient_transformation())
  with pytest.raises(ValueError, match="accumulates gradients"):
    make(tx=optax.chain(optax.clip(1.0), lowmem.master_weights(sums)))
  with pytest.raises(ValueError, match="`outer_tx` accumulates"):
    make(tx=tx, outer_tx=sums)
  with pytest.raises(ValueError, match="accumulates gradients"):
    make(tx=lowmem.multi_steps(tx, 2))
  with pytest.raises(ValueError, match="whether a step is skipped depends"):
    make(tx=lowmem.loss_scaling(tx))
  with pytest.raises(ValueError, match="searches along a line"):
    make(tx=optax.lbfgs())
  with pytest.raises(TypeError, match="`layer` must be a function"):
    make(tx=tx, layer=3)
  with pytest.raises(TypeError, match="`tx` must be an optax transformation"):
    make(tx=0.1)
  with pytest.raises(ValueError, match="`clip_norm` must be positive"):
    make(tx=tx, clip_norm=0)
  training = make(tx=tx)
  with pytest.raises(ValueError, match='keys "outer" and "layers"'):
    training.init({"layers": {}})
  with pytest.raises(ValueError, match=r"layers\['b'\]` must have an axis over the layers"):
    training.init({"outer": {}, "layers": {"a": jnp.zeros((3, 2)), "b": jnp.zeros((2, 2))}})
  params = parameters()
  with pytest.raises(ValueError, match="`inputs` must have an axis over the layers"):
    training.step(params, training.init(params), BATCH, jnp.zeros(2))
  cast = make(tx=tx, layer=lambda p, x, batch: x.astype(jnp.bfloat16))
  with pytest.raises(TypeError, match="returns bfloat16"):
    cast.step(params, training.init(params), BATCH)


def test_a_loss_that_is_none_is_refused():
  params, tx = parameters(), optax.sgd(0.1)
  heads = {
    r"float32\[8, 64\]": lambda outer, x, batch: x,
    "got int32": lambda outer, x, batch: jnp.sum(batch["tokens"]),
    "has_aux=True": lambda outer, x, batch: (head(outer, x, batch), x),
  }
  for message, this in heads.items():
    training = lowmem.update_in_backward(embed, layer, this, tx)
    with pytest.raises(TypeError, match=message):
      training.step(params, training.init(params), BATCH)


def test_layers_and_states_that_do_not_fit_are_refused():
  training = lowmem.update_in_backward(**PARTS, tx=lowmem.adamw(1e-3))
  params = parameters()
  layers = params["layers"]
  with pytest.raises(ValueError, match=r"layers\['n'\]` is int32, and only floats are trained"):
    training.init({**params, "layers": {**layers, "n": jnp.arange(LAYERS)}})
  with pytest.raises(ValueError, match="has no layers"):
    training.init({**params, "layers": jax.tree.map(lambda a: a[:0], layers)})
  with pytest.raises(ValueError, match="has no arrays"):
    training.init({**params, "layers": {}})
  state = training.init(params)
  with pytest.raises(ValueError, match='`state` must be a dict with the keys "outer" and "layers"'):
    training.step(params, state["layers"], BATCH)
  with pytest.raises(ValueError, match="must have an axis over the 2 layers"):
    training.step({**params, "layers": jax.tree.map(lambda a: a[:2], layers)}, state, BATCH)


def test_the_norm_of_complex_and_wide_gradients():
  """Of a complex gradient both parts count, and float64 is summed in float64."""
  assert float(squares({"a": jnp.array([3 + 4j, 1j]), "b": jnp.array([2.0])})) == 30
  with jax.enable_x64(True):
    total = squares([jnp.array([1e-5, 1.0], jnp.float64), jnp.ones(1, jnp.float32)])
    assert total.dtype == jnp.float64
    assert float(total) > 2


PARTS = {"embed": embed, "layer": layer, "head": head}


@pytest.mark.parametrize("name", ["optax.adamw", "adamw", "came"])
def test_memory_on_a_cpu(name):
  """A few gradients of a layer, where an ordinary step has those of all twelve."""
  tx, most = {
    "optax.adamw": (optax.adamw(1e-3), 4),
    "adamw": (lowmem.adamw(1e-3), 4),
    "came": (lowmem.came(1e-3), 7),
  }[name]
  shapes = {"up": (12, 256, 1024), "down": (12, 1024, 256)}
  layers = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in shapes.items()}

  def body(p, x, batch):
    return x + jnp.tanh(x @ p["up"]) @ p["down"]

  parts = (lambda outer, x: x), body, (lambda outer, x, batch: (x**2).mean())
  training = lowmem.update_in_backward(*parts, tx, outer_tx=optax.identity())
  params, x = {"outer": {}, "layers": layers}, jax.ShapeDtypeStruct((4, 256), jnp.float32)
  step = jax.jit(training.step, donate_argnums=(0, 1))
  lowered = step.lower(params, jax.eval_shape(training.init, params), x)
  assert temporaries_of(lowered.compile()) <= most * 2 * 256 * 1024 * 4


def test_a_run_goes_on_from_a_checkpoint(tmp_path):
  training = lowmem.update_in_backward(
    embed, layer, head, lowmem.master_weights(lowmem.adamw(1e-3, min_size=256), bits=8)
  )
  step, params = jax.jit(training.step), parameters(jnp.bfloat16)
  kept = step(params, training.init(params), BATCH)[1:]
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "run", kept)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "run", jax.tree.map(jnp.zeros_like, kept))
  chex.assert_trees_all_equal(step(*restored, BATCH), step(*kept, BATCH))
