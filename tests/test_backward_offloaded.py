"""The update in the backward pass of layers whose state is in host memory."""

import pickle
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization

import optax_lowmem as lowmem
from programs import times_compiled
from test_update_in_backward import BATCH, LAYERS, PARTS, parameters

MASTERS, ADAMW, OFFLOADED = lowmem.master_weights, lowmem.adamw, lowmem.offloaded
TX = {
  "optax.adamw": (lambda page: page(optax.adamw(1e-3)), jnp.float32),
  "adamw": (lambda page: page(ADAMW(1e-3, min_size=256)), jnp.float32),
  "came": (lambda page: page(lowmem.came(1e-3, min_size=256)), jnp.float32),
  "around masters": (lambda page: page(MASTERS(ADAMW(1e-3, bits=4), bits=8)), jnp.bfloat16),
  "within masters": (lambda page: MASTERS(page(ADAMW(1e-3))), jnp.bfloat16),
  "within a chain": (
    lambda page: optax.chain(optax.clip_by_global_norm(0.1), page(optax.adamw(1e-3))),
    jnp.float32,
  ),
}


def training_of(tx, **options):
  return lowmem.update_in_backward(**PARTS, tx=tx, **options)


def pages_of(tree):
  leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, lowmem.Paged))
  return [x for x in leaves if isinstance(x, lowmem.Paged)]


def memories(tree):
  return jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding.memory_kind), tree)


@pytest.mark.parametrize("name", TX)
def test_it_is_the_step_without_pages_to_the_bit(name):
  make, dtype = TX[name]
  plain, paged = (training_of(make(page), clip_norm=1.0) for page in (lambda tx: tx, OFFLOADED))
  want = parameters(dtype)
  want = want, plain.init(want)
  got = jax.device_put(parameters(dtype), jax.devices()[0])
  got = got, paged.init(got)
  form = memories(got)
  assert pages_of(got[1]["layers"])
  chex.assert_trees_all_equal(lowmem.unpaged(got[1]), want[1])
  steps = [jax.jit(training.step, donate_argnums=(0, 1)) for training in (plain, paged)]
  for _ in range(3):
    loss, *want = steps[0](*want, BATCH)
    same, *got = steps[1](*got, BATCH)
    chex.assert_trees_all_equal((same, got[0], lowmem.unpaged(got[1])), (loss, *want))
  assert memories(tuple(got)) == form
  assert times_compiled(steps[1]) == 1


def test_what_is_paged_is_chosen_for_a_layer_and_budgeted_for_all():
  """Of 4 bytes a parameter: a norm 256 bytes in each layer, a matrix 32 KiB."""
  params = parameters()

  def paged(**options):
    tx = OFFLOADED(optax.sgd(1e-3, momentum=0.9), **options)
    state = training_of(tx, outer_tx=optax.identity()).init(params)
    return sorted(x.shape[1:] for x in pages_of(state["layers"]))

  assert paged() == [(64, 128), (128, 64)]
  assert paged(min_bytes=0) == [(64,), (64, 128), (128, 64)]
  assert paged(where="up") == [(64, 128)]
  assert len(paged(device_budget=LAYERS * 33 * 1024)) == 1
  assert not paged(device_budget=LAYERS * 65 * 1024)
  with pytest.raises(ValueError, match="names no array of the state"):
    paged(where="nowhere")


def test_shapes_and_a_compiled_init_are_those_of_init():
  training = training_of(OFFLOADED(ADAMW(1e-3, min_size=256)))
  params = parameters()
  state, shapes = training.init(params), jax.eval_shape(training.init, params)
  chex.assert_trees_all_equal(jax.jit(training.init)(params), state)
  assert jax.tree.structure(state) == jax.tree.structure(shapes)
  form = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)  # noqa: E731
  assert form(shapes) == form(state)
  assert form(jax.eval_shape(training.step, params, shapes, BATCH)[2]) == form(state)
  assert form(lowmem.unpaged(lowmem.paged(shapes))) == form(lowmem.unpaged(state))
  assert lowmem.state_bytes(shapes) == lowmem.state_bytes(state)
  large = {"w": jnp.zeros((2, 1024, 1024))}
  made = training.init({"outer": {}, "layers": large})  # one array by one
  assert lowmem.state_bytes(made)["pinned_host"] > 4 << 20


def test_runs_with_and_without_pages_go_on_from_each_other(tmp_path):
  tx, params = ADAMW(1e-3, min_size=256), parameters()
  plain, paged = training_of(tx), training_of(OFFLOADED(tx))
  steps = [jax.jit(training.step) for training in (plain, paged)]
  _, params, state = steps[1](params, paged.init(params), BATCH)
  _, want, ends = steps[1](params, state, BATCH)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "run", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "run", paged.init(params))
  assert memories(restored) == memories(state)
  chex.assert_trees_all_equal(steps[1](params, restored, BATCH)[1:], (want, ends))
  without = lowmem.unpaged(state)
  new, others = steps[0](params, without, BATCH)[1:]
  chex.assert_trees_all_equal((new, others), (want, lowmem.unpaged(ends)))
  again = lowmem.paged(without, like=paged.init(params))
  chex.assert_trees_all_equal(steps[1](params, again, BATCH)[1:], (want, ends))
  lost = pickle.loads(pickle.dumps(state))
  with pytest.raises(ValueError, match=r"is on the device, not in host memory(.|\n)*lowmem.paged"):
    steps[1](params, lost, BATCH)
  chex.assert_trees_all_equal(steps[1](params, lowmem.paged(lost), BATCH)[1:], (want, ends))


def test_what_cannot_be_paged_so_is_refused():
  tx = optax.adamw(1e-3)
  with pytest.raises(ValueError, match="accumulates gradients"):
    training_of(OFFLOADED(lowmem.multi_steps(tx, 2)))
  with pytest.raises(ValueError, match=r"Swap them: `offloaded\(optax.apply_if_finite"):
    training_of(optax.apply_if_finite(OFFLOADED(tx), 3)).init(parameters())
  training, params = training_of(OFFLOADED(tx)), parameters()
  state: Any = training.init(params)
  layers = state["layers"]
  pages: Any = OFFLOADED(tx).init(params["layers"])
  wrong = layers[0]._replace(mu=pages[0].mu, nu=pages[0].nu), *layers[1:]
  with pytest.raises(ValueError, match="is not of layers, the last of them first"):
    training.step(params, {**state, "layers": wrong}, BATCH)
  with pytest.warns(UserWarning, match="the state has no pages"):
    jax.eval_shape(training.step, params, lowmem.unpaged(state), BATCH)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    jax.eval_shape(training.step, params, state, BATCH)


def test_pages_of_the_other_order_are_refused():
  """An ordinary step would go through them in reverse, and so would a checkpoint of one."""
  tx = OFFLOADED(optax.sgd(0.1, momentum=0.9))
  training, params = training_of(tx), parameters()
  state, ordinary = training.init(params)["layers"], tx.init(params["layers"])
  for page, other in zip(pages_of(state), pages_of(ordinary), strict=True):
    assert page.shape == other.shape and page.dtype == other.dtype
    assert page.lanes[0].shape != other.lanes[0].shape  # to Orbax, other arrays
  with pytest.raises(ValueError, match=r"the last layer first\. For an ordinary step, lay"):
    tx.update(params["layers"], state, params["layers"])
  saved = serialization.to_state_dict(ordinary)
  with pytest.raises(ValueError, match="what was saved is lane0"):
    serialization.from_state_dict(state, saved)
  again = serialization.from_state_dict(state, serialization.to_state_dict(state))
  chex.assert_trees_all_equal(lowmem.unpaged(again), lowmem.unpaged(state))


def test_offloaded_within_offloaded():
  """The outer one has what the inner one leaves."""
  inner = OFFLOADED(optax.trace(0.9))
  state = training_of(OFFLOADED(optax.chain(inner, optax.scale_by_adam()))).init(parameters())
  matrices = 2  # the norm is below `min_bytes`
  assert len(pages_of(state["layers"])) == 3 * matrices


def test_quantized_around_pages_is_refused():
  with pytest.raises(ValueError, match=r"Swap the two: `offloaded\(quantized"):
    training_of(lowmem.quantized(OFFLOADED(optax.adam(1e-3)), min_size=64)).init(parameters())


def test_a_state_without_pages_warns_by_the_budget_of_all_layers():
  params = parameters()
  layer = sum(x.nbytes for x in jax.tree.leaves(params["layers"])) // LAYERS
  tx = lowmem.offloaded(optax.sgd(0.1, momentum=0.9), min_bytes=64, device_budget=2 * layer)
  training = training_of(tx)
  state = training.init(params)
  assert pages_of(state["layers"])
  with pytest.warns(
    UserWarning, match=r"like=init\(params\)\)`, with that of `update_in_backward`"
  ):
    jax.eval_shape(training.step, params, lowmem.unpaged(state), BATCH)


def test_whose_where_it_is():
  training = lowmem.update_in_backward(**PARTS, tx=OFFLOADED(optax.adam(1e-3), where="up"))
  with pytest.raises(ValueError, match="names no array") as raised:
    training.init(parameters())
  assert "`outer_tx` is for" in " ".join(raised.value.__notes__)
