"""The proof that a rule is elementwise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_lowmem._programs.elementwise import NotElementwise
from optax_lowmem._programs.program import Program
from optax_lowmem._state.moments import places

PARAMS = {"a": jnp.ones((3, 4)), "b": {"c": jnp.ones((5,)), "d": jnp.float32(1)}}


def prove(tx, params=PARAMS):
  tx = optax.with_extra_args_support(tx)
  state = tx.init(params)
  leaves, treedef = jax.tree.flatten((params, state, params))
  owners = [place.owner for place in places((params, state, params), params)]

  def update(*flat):
    return tx.update(*treedef.unflatten(flat))

  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
  return Program(update, shapes, owners), update, leaves, owners


def decay_mask(params):
  return jax.tree.map(lambda p: p.ndim > 1, params)


ELEMENTWISE = {
  "adam": optax.adam(1e-3),
  "adamw, masked": optax.adamw(1e-3, mask=decay_mask),
  "adamw, scheduled": optax.adamw(optax.cosine_decay_schedule(1e-3, 100)),
  "nadam": optax.nadam(1e-3),
  "lion": optax.lion(1e-3),
  "sgd": optax.sgd(1e-3),
  "nesterov": optax.sgd(1e-3, momentum=0.9, nesterov=True),
  "adabelief": optax.adabelief(1e-3),
  "amsgrad": optax.amsgrad(1e-3),
  "yogi": optax.yogi(1e-3),
  "radam": optax.radam(1e-3),
  "adan": optax.adan(1e-3),
  "rmsprop": optax.rmsprop(1e-3, centered=True),
  "adagrad": optax.adagrad(1e-3),
  "adamax": optax.adamax(1e-3),
  "clip": optax.chain(optax.clip(1.0), optax.adam(1e-3)),
  "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
  "ademamix": optax.contrib.ademamix(1e-3),
  "adopt": optax.contrib.adopt(1e-3),
  "schedule-free": optax.contrib.schedule_free_adamw(1e-3),
  "partition": optax.partition(
    {"x": optax.adam(1e-3), "y": optax.sgd(0.1)}, {"a": "x", "b": {"c": "y", "d": "x"}}
  ),
}
NOT_ELEMENTWISE = {
  "clip by global norm": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
  "clip by block rms": optax.chain(optax.clip_by_block_rms(1.0), optax.adam(1e-3)),
  "lamb": optax.lamb(1e-3),
  "lars": optax.lars(1e-3),
  "novograd": optax.novograd(1e-3),
  "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=2),
  "noise": optax.add_noise(0.01, 0.55, jax.random.key(0)),
  "centralize": optax.chain(optax.centralize(), optax.sgd(1e-3)),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_rules_are_accepted_and_run_leaf_by_leaf(name):
  program, update, leaves, owners = prove(ELEMENTWISE[name])
  key = jax.random.key(0)
  values = [
    jax.random.uniform(jax.random.fold_in(key, i), x.shape)
    if jnp.issubdtype(x.dtype, jnp.floating) and owners[i] is not None
    else x
    for i, x in enumerate(leaves)
  ]
  expected = jax.tree.leaves(update(*values))
  env = program.run_shared(values)
  for leaf in range(3):
    mine = {k: v for k, v in enumerate(values) if owners[k] == leaf}
    results = [k for k, owner in enumerate(program.owners) if owner == leaf]
    # On the whole leaf, and on its elements one row at a time, flattened.
    whole = program.run_leaf(leaf, env, mine, results)
    halves = [
      program.run_leaf(leaf, env, {k: v.reshape(-1)[part] for k, v in mine.items()}, results)
      for part in (slice(0, 2), slice(2, None))
    ]
    for position, owner in enumerate(program.owners):
      if owner == leaf:
        np.testing.assert_allclose(whole[position], expected[position], rtol=1e-6)
        pieces = jnp.concatenate([half[position] for half in halves])
        np.testing.assert_allclose(pieces, expected[position].reshape(-1), rtol=1e-6)
  for position, owner in enumerate(program.owners):
    if owner is None:
      result = program.shared_result(position, env)
      np.testing.assert_allclose(result, expected[position], rtol=1e-6)


@pytest.mark.parametrize("name", NOT_ELEMENTWISE)
def test_rules_that_look_beyond_an_element_are_refused(name):
  with pytest.raises(NotElementwise):
    prove(NOT_ELEMENTWISE[name])


@pytest.mark.parametrize(
  "rule",
  [
    lambda g: jnp.cumsum(g, 0),
    lambda g: g[::-1],
    lambda g: g.T.reshape(3, 4),
    lambda g: g - g.mean(),
    lambda g: g + jnp.arange(4.0),  # a constant that differs from element to element
    lambda g: jax.lax.sort(g),
    lambda g: g @ jnp.eye(4),
    lambda g: jax.lax.cond(g.sum() > 0, lambda x: x, lambda x: -x, g),
    lambda g: jnp.where(jnp.arange(4) > 1, g, 0.0),
    lambda g: jnp.roll(g, 1),
  ],
)
def test_functions_that_are_not_elementwise_are_refused(rule):
  with pytest.raises(NotElementwise):
    Program(lambda g: [rule(g)], [jax.ShapeDtypeStruct((3, 4), jnp.float32)], [0])


def test_leaves_that_mix_are_refused():
  shape = jax.ShapeDtypeStruct((3,), jnp.float32)
  with pytest.raises(NotElementwise, match="'add' mixes two leaves"):
    Program(lambda a, b: [a + b, b], [shape, shape], [0, 1])


def test_results_are_made_of_given_ones():
  """An update made of the new moments needs neither the old ones nor the gradient."""
  program, _, leaves, owners = prove(optax.scale_by_adam())
  grad, mu, nu, _ = (k for k, owner in enumerate(owners) if owner == 0)  # and the parameter
  assert program.arguments_of(0, [grad], ()) == {grad, mu, nu}
  assert program.arguments_of(0, [grad], [mu, nu]) == set()
  one = jnp.ones(leaves[grad].shape)
  env = program.run_shared([jnp.zeros(x.shape, x.dtype) for x in leaves])
  update = program.run_leaf(0, env, {grad: one}, [grad], given={mu: 0.2 * one, nu: 0.004 * one})
  np.testing.assert_allclose(update[grad], (0.2 / 0.1) / np.sqrt(0.004 / 0.001), rtol=1e-5)


def test_arguments_that_are_handed_through_are_known():
  program = Program(
    lambda g, old: (g - old, g, old), [jax.ShapeDtypeStruct((2, 3), jnp.float32)] * 2, [0, 0]
  )
  assert [program.returns_argument(k) for k in range(3)] == [None, 0, 1]
