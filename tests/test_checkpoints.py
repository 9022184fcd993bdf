"""States are saved and restored as they are, by what users save states with, or refused by name."""

import functools
import pickle
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

import optax_lowmem as lowmem
from registry import REGISTRY, every, make, tree, update_of
from registry import start as started

SHAPES = {
  "w": (64, 128),
  "kernel": (3, 3, 8, 64),
  "b": (5,),
  "no": (),
}  # Orbax saves none of (0, 3)


class Cubes(lowmem.Codebook):
  """A codebook that is not the library's: codes are cube roots."""

  def encode(self, r):
    return (jnp.round(jnp.cbrt(r) * 127) + 128).astype(jnp.uint8)

  def decode(self, codes):
    return ((codes.astype(jnp.float32) - 128) / 127) ** 3


def in_cubes():
  return lowmem.quantized(optax.adam(1e-3), storage={"mu": Cubes("cubes", 8, True)})


FORMS = {
  "power8": lambda: lowmem.adam(1e-3),
  "log8": lambda: in_codes("log8"),
  "linear": lambda: in_codes("linear"),
  "one's own": in_cubes,
  "4 bits": lambda: lowmem.adam(1e-3, bits=4),
  "32 bits": lambda: optax.adam(1e-3),
  "blocks of 256": lambda: lowmem.adam(1e-3, block_size=256),
  "paged": lambda: lowmem.offloaded(lowmem.adam(1e-3), min_bytes=0),
}


def in_codes(name):
  nu = name if name == "linear" else f"{name}_unsigned"
  storage = {"mu": lowmem.Blockwise(name), "nu": lowmem.Blockwise(cast(Any, nu))}
  return lowmem.quantized(optax.adam(1e-3), storage=storage)


def orbax(state, like, path):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path / "state", state)
    checkpointer.wait_until_finished()
    return checkpointer.restore(path / "state", abstract(like))


def abstract(like):
  def one(x):
    sharding = x.sharding if isinstance(x, jax.Array) else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(one, like)


WAYS = {
  "orbax": orbax,
  "flax": lambda state, like, _: serialization.from_bytes(like, serialization.to_bytes(state)),
  "pickle": lambda state, like, _: pickle.loads(pickle.dumps(state)),
}
by_every_way = pytest.mark.parametrize("way", WAYS)


def trained(tx):
  params = tree(0, shapes=SHAPES)
  return jax.jit(tx.update)(tree(1, shapes=SHAPES), tx.init(params), params)[1]


@functools.cache
def of_entry(name):
  """The state of an entry, trained, and as it starts."""
  tx = make(name)
  return trained(tx), tx.init(tree(0, shapes=SHAPES))


@functools.cache
def of_form(form):
  """A transformation, a state that is trained, and one that starts."""
  tx = FORMS[form]()
  return tx, trained(tx), tx.init(tree(0, shapes=SHAPES))


@functools.cache
def next_updates(form):
  tx, state, _ = of_form(form)
  return jax.jit(tx.update)(tree(9, shapes=SHAPES), state, tree(0, shapes=SHAPES))[0]


@every
@by_every_way
def test_every_state_survives(name, way, tmp_path):
  state, like = of_entry(name)
  restored = WAYS[way](state, like, tmp_path)
  chex.assert_trees_all_equal(restored, state)
  assert jax.tree.structure(restored) == jax.tree.structure(state)


@by_every_way
@pytest.mark.parametrize("form", FORMS)
def test_every_form_survives_and_goes_on(form, way, tmp_path):
  tx, state, like = of_form(form)
  restored = WAYS[way](state, like, tmp_path)
  if form == "paged":
    restored = lowmem.paged(restored, like)
  updates, _ = jax.jit(tx.update)(tree(9, shapes=SHAPES), restored, tree(0, shapes=SHAPES))
  chex.assert_trees_all_equal(updates, next_updates(form))


def test_flax_leaves_pages_in_host_memory():
  _, state, like = of_form("paged")
  restored = WAYS["flax"](state, like, None)
  assert lowmem.state_bytes(restored) == lowmem.state_bytes(state)


OTHERS = [(a, b) for a in FORMS for b in FORMS if a != b and "paged" not in (a, b)]


@pytest.mark.parametrize(
  ("saved", "wanted", "way"),
  # flax asks nobody what it puts in the place of an array; a dict is no state of optax's.
  [(a, b, way) for a, b in OTHERS for way in ("orbax", "flax") if (way, b) != ("flax", "32 bits")],
)
def test_another_form_is_refused_by_name(saved, wanted, way, tmp_path):
  """It was read as what it is not: errors of 1.7 to 2.0."""
  state, like = of_form(saved)[1], of_form(wanted)[2]
  with pytest.raises(ValueError, match=r"codes_|tree structures do not match"):
    WAYS[way](state, like, tmp_path)


@pytest.mark.parametrize("wanted", FORMS)
@pytest.mark.parametrize("given", FORMS)
def test_states_are_converted_between_forms(given, wanted):
  from_tx, state, _ = of_form(given)
  to_tx, _, like = of_form(wanted)
  new = lowmem.convert_state(state, from_tx, to_tx, tree(0, shapes=SHAPES))
  chex.assert_trees_all_equal_structs(new, like)
  assert lowmem.state_bytes(new) == lowmem.state_bytes(like)
  old, new = (optax.tree.get(lowmem.dequantized(x), "mu") for x in (state, new))
  coarse = 0.12 if "4 bits" in (given, wanted) else 0.02
  for k in SHAPES:
    assert np.abs(old[k] - new[k]).mean() <= coarse * np.abs(old[k]).mean()
    if given == wanted:
      np.testing.assert_array_equal(old[k], new[k])


def nnx_state(tx):
  """The state that an `nnx.Optimizer` holds after a step, in boxes, and its model."""
  model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  optimizer.update(model, jax.tree.map(jnp.cos, nnx.state(model, nnx.Param)))
  return cast(Any, optimizer.opt_state), model


BOXED = ("power8", "32 bits", "paged", "paged 32")


def boxed(form):
  return lowmem.offloaded(optax.adam(1e-3), min_bytes=0) if form == "paged 32" else FORMS[form]()


@pytest.mark.parametrize("form", BOXED)
def test_states_of_nnx_optimizers_are_read_in_their_boxes(form):
  """A page whose arrays were in boxes was an error of JAX's."""
  state, _ = nnx_state(boxed(form))
  pure = nnx.as_pure(state)
  for fn in (lowmem.unpaged, lowmem.dequantized):
    found = fn(state)
    chex.assert_trees_all_equal(nnx.as_pure(found), fn(pure))
    assert all(isinstance(x, nnx.Variable) for x in in_boxes(found))
  if "paged" in form:
    again = lowmem.paged(lowmem.unpaged(state), like=state)
    chex.assert_trees_all_equal_structs(again, state)
    chex.assert_trees_all_equal(lowmem.unpaged(nnx.as_pure(again)), lowmem.unpaged(pure))
    assert lowmem.state_bytes(again) == lowmem.state_bytes(state)


def in_boxes(tree):
  return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


@pytest.mark.parametrize("given, wanted", [*zip(BOXED, (*BOXED[1:], BOXED[0]), strict=True)])
def test_states_of_nnx_optimizers_are_converted(given, wanted):
  """They were said to be none of `from_tx`."""
  from_tx, to_tx = boxed(given), boxed(wanted)
  state, model = nnx_state(from_tx)
  params = nnx.state(model, nnx.Param)
  new = lowmem.convert_state(state, from_tx, to_tx, params)
  chex.assert_trees_all_equal_structs(new, to_tx.init(params))
  want = lowmem.convert_state(nnx.as_pure(state), from_tx, to_tx, nnx.as_pure(params))
  chex.assert_trees_all_equal(*(nnx.as_pure(lowmem.unpaged(x)) for x in (new, want)))
  # As the docstring says:
  optimizer = nnx.Optimizer(model, to_tx, wrt=nnx.Param)
  nnx.update(optimizer.opt_state, nnx.state(nnx.as_pure(new)))
  held: Any = optimizer.opt_state
  chex.assert_trees_all_equal(nnx.as_pure(lowmem.unpaged(held)), lowmem.unpaged(want))
  assert lowmem.state_bytes(held) == lowmem.state_bytes(new)
  optimizer.update(model, jax.tree.map(jnp.cos, nnx.state(model, nnx.Param)))


def test_conversion_needs_the_same_rules():
  params = tree(0, shapes=SHAPES)
  with pytest.raises(ValueError, match=r"`from_tx` and `to_tx` do not belong together: .*nu"):
    lowmem.convert_state(optax.adam(1e-3).init(params), optax.adam(1e-3), lowmem.lion(1e-3), params)
  with pytest.raises(
    ValueError, match=r"`state` and `from_tx` do not belong together.*codes_power8"
  ):
    lowmem.convert_state(
      lowmem.adam(1e-3).init(params), optax.adam(1e-3), lowmem.adam(1e-3), params
    )
  scheduled = optax.adam(optax.constant_schedule(1e-3))
  with pytest.raises(ValueError, match="A schedule has a count in its state, where a number has"):
    lowmem.convert_state(scheduled.init(params), scheduled, lowmem.adam(1e-3), params)


@every
def test_a_state_in_another_form_is_refused(name):
  """That of 32 bits was used as it is, for ever: nothing was saved, and nothing said."""
  entry, params = REGISTRY[name], tree(0, shapes=SHAPES)
  full = make(name, bits=32).init(params)
  eight = make(name).init(params)
  other = make(name, bits=12 - entry.bits)
  for tx, state, held in (
    (make(name), full, "in float32"),
    (make(name, bits=32), eight, f"in 'power{entry.bits}"),
    (other, eight, f"in 'power{entry.bits}"),
    (make(name, block_size=256), eight, "blocks of 64"),
  ):
    with pytest.raises(ValueError, match=rf"the state holds .* {held}.*`convert_state"):
      jax.eval_shape(tx.update, params, state, params)


@every
@pytest.mark.parametrize("kind", [jnp.number, jnp.floating], ids=["all", "floating"])
def test_codes_and_scales_that_were_cast_are_refused(name, kind):
  """As checkpointers do that cast all leaves to 16 bits."""
  tx, params = make(name), tree(0, shapes=SHAPES)

  def cast(x):
    return x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, kind) else x

  state = jax.tree.map(cast, tx.init(params))
  with pytest.raises(ValueError, match=r"(codes|scales) in bfloat16: .* were cast"):
    jax.eval_shape(tx.update, params, state, params)


def test_masked_and_small_moments_are_no_other_form():
  params = tree(0, shapes=SHAPES)
  tx = lowmem.adam(1e-3, quantize_mask=lambda p: {k: k != "w" for k in p})
  jax.eval_shape(tx.update, params, tx.init(params), params)
  _, state = started("adamw-8", "whole")
  update_of("adamw-8", "whole")(tree(1), state, tree(0))


# QuantizedArray as a value ------------------------------------------------------------------------


def test_converts_prints_and_refuses_casts():
  x = jnp.linspace(-1, 1, 256).reshape(2, 128)
  q = lowmem.quantize(x, "power8", block_size=64)
  np.testing.assert_array_equal(np.asarray(q), q.dequantize())
  np.testing.assert_array_equal(jnp.asarray(q), q.dequantize())
  assert np.asarray(q, np.float64).dtype == np.float64
  assert repr(q) == "QuantizedArray(float32[2,128], codebook='power8', block=64)"
  assert "\n" not in repr(jax.tree.map(lambda _: "spec", q))
  with pytest.raises(TypeError, match=r"cannot be cast to .*bfloat16.*`dequantize\(dtype\)`"):
    q.astype(jnp.bfloat16)


@pytest.mark.parametrize("form", FORMS)
def test_dequantized_gives_numbers(form):
  params = tree(0, shapes=SHAPES)
  values = lowmem.dequantized(of_form(form)[1])
  chex.assert_trees_all_equal_shapes_and_dtypes(optax.tree.get(values, "mu"), params)
  norm = optax.tree.norm(optax.tree.get(values, "mu"))
  exact = optax.tree.norm(optax.tree.get(of_form("32 bits")[1], "mu"))
  np.testing.assert_allclose(norm, exact, rtol=0.05)
