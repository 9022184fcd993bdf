"""What optax's own tests ask of its aliases, asked of every transformation: docs/optax_tests.md."""

import ast
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import optax_lowmem as lowmem
from registry import LR, REGISTRY, every, make, tree

FEW = {"w": (48, 96), "lora": (512, 16), "b": (5,)}
SHAPES_ONLY = {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in FEW.items()}
OURS = [rule for rule in dict.fromkeys(e.rule for e in REGISTRY.values()) if hasattr(lowmem, rule)]
held = pytest.mark.parametrize("wrap", [lambda tx: tx, lowmem.offloaded], ids=["device", "paged"])


# Parameters of which only the shapes are known ----------------------------------------------------


@every
@held
@pytest.mark.parametrize("bits", [8, 32])
def test_init_of_shapes_is_that_of_arrays(name, wrap, bits):
  """As optax's, it makes arrays: its state starts from no values."""
  tx = wrap(make(name, bits=bits))
  state, expected = tx.init(SHAPES_ONLY), tx.init(tree(0, shapes=FEW))
  chex.assert_trees_all_equal(state, expected)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


@pytest.mark.parametrize("rule", ["dog", "cocob", "madgrad", "schedule_free_sgd", "prodigy"])
def test_init_of_shapes_says_where_values_are_needed(rule):
  arguments = {} if rule == "cocob" else {"learning_rate": LR}
  tx = lowmem.quantized(getattr(contrib, rule)(**arguments))
  with pytest.raises(TypeError, match=r"starts from the values.*`jax\.eval_shape\(tx\.init"):
    tx.init(SHAPES_ONLY)  # pyright: ignore[reportArgumentType]
  chex.assert_trees_all_equal_shapes_and_dtypes(
    jax.eval_shape(tx.init, SHAPES_ONLY), tx.init(tree(0, shapes=FEW))
  )


def test_constants_of_a_state_are_arrays():
  """Muon's coefficients were of JAX's own kind; with them, no eager step was compiled."""
  state = lowmem.quantized(contrib.muon(LR)).init(tree(0, shapes=FEW))
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


# `optax.tree.map_params` --------------------------------------------------------------------------


@every
@held
@pytest.mark.parametrize("bits", [None, 32])
def test_map_params_gives_each_moment_whole(name, wrap, bits):
  """With a further tree, and without: codes and scales are one leaf, so are the lanes of a page."""
  entry = REGISTRY[name]
  tx, params = wrap(make(name, bits=bits or entry.bits)), tree(0, shapes=FEW)
  state, labels, seen = tx.init(params), {k: k.upper() for k in FEW}, []

  def label(moment, label, param):
    seen.append((moment, param))
    return label

  mapped = optax.tree.map_params(
    tx, label, state, labels, params, is_leaf=lowmem.is_stored, transform_non_params=lambda _: 0
  )
  quantized = [(m, p) for m, p in seen if isinstance(m, lowmem.QuantizedArray)]
  assert len(quantized) == (0 if bits else 2 * entry.moments)
  whole = [m for m, p in seen if m.shape == p.shape and p.size > 4096]
  assert len(whole) >= 2 * entry.moments
  assert wrap is not lowmem.offloaded or any(map(lowmem.is_stored, whole))
  assert set(jax.tree.leaves(mapped)) - {0} == {"W", "LORA", "B"}
  for is_leaf in (None, lowmem.is_stored):
    same = optax.tree.map_params(tx, lambda x: x, state, is_leaf=is_leaf)
    chex.assert_trees_all_equal(same, state)


def test_map_params_of_what_is_masked():
  tx = optax.masked(lowmem.adam(LR), {"w": True, "lora": False, "b": True})
  state = tx.init(tree(0, shapes=FEW))

  def is_leaf(x):
    return lowmem.is_stored(x) or isinstance(x, optax.MaskedNode)

  mapped = optax.tree.map_params(tx, lambda x, k: k, state, {k: k for k in FEW}, is_leaf=is_leaf)
  assert optax.tree.get(mapped, "mu") == {k: k for k in FEW}


# Under `inject_hyperparams` -----------------------------------------------------------------------


@pytest.mark.parametrize("rule", OURS)
def test_inject_hyperparams_is_told_what_is_static(rule):
  """The message names what it takes, and with that it works, all numbers injected."""
  factory, arguments = getattr(lowmem, rule), {"learning_rate": LR}
  if rule == "adafactor":
    arguments |= {"momentum": 0.9, "min_dim_size_to_factor": 16}
  params = {"w": tree(0, shapes=FEW)["w"]}
  tx = optax.inject_hyperparams(factory)(**arguments)
  with pytest.raises(TypeError, match=r"`\w+` must be .*static_args") as refused:
    tx.init(params)
  with pytest.raises(TypeError, match=re.escape(str(refused.value))):
    jax.eval_shape(tx.init, params)
  static = re.search(r"static_args=(\(.*?\))", str(refused.value))
  assert static
  tx = optax.inject_hyperparams(factory, static_args=ast.literal_eval(static[1]))(**arguments)
  updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
  plain = factory(**arguments)
  expected, _ = jax.jit(plain.update)(params, plain.init(params), params)
  chex.assert_trees_all_close(updates, expected, rtol=1e-3, atol=1e-6)


def test_adafactor_without_momentum_needs_no_static_dtype():
  """As in optax's own test; its default is a function, which is injected as a schedule is."""
  static = ("bits", "block_size", "min_size", "min_dim_size_to_factor")
  tx = optax.inject_hyperparams(lowmem.adafactor, static_args=static)(learning_rate=LR)
  params = {"w": tree(0, shapes=FEW)["w"]}
  updates, _ = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
  plain = lowmem.adafactor(LR)
  expected, _ = jax.jit(plain.update)(params, plain.init(params), params)
  chex.assert_trees_all_close(updates, expected, rtol=1e-3)


# What is refused ----------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("bits", [8, 32])
def test_what_is_in_few_bits_is_not_quantized_again(name, bits):
  inner = optax.chain(optax.clip(1.0), make(name))
  with pytest.raises(ValueError, match=r"quantized already\. Leave `quantized` out"):
    lowmem.quantized(inner, bits).init(tree(0, shapes=FEW))
  paged = lowmem.offloaded(make(name, bits=32))
  with pytest.raises(ValueError, match=r"`offloaded\(quantized\(tx"):
    lowmem.quantized(paged, bits).init(tree(0, shapes=FEW))


@every
@pytest.mark.parametrize("bits", [8, 32])
def test_complex_parameters_are_refused(name, bits):
  z = jax.tree.map(lambda x: x + 1j, tree(0, shapes=FEW))
  tx = make(name, bits=bits)
  with pytest.raises(TypeError, match=r"\['b'\] has dtype complex64.*split_real_and_imaginary"):
    tx.init(z)
  contrib.split_real_and_imaginary(tx).init(z)


@pytest.mark.parametrize("name", ["adamw-8", "came-8"])
def test_complex_parameters_are_two_real_ones(name):
  """As the message says: the updates are those of real and imaginary parts side by side."""
  x, y, g, h = ({"w": tree(seed, shapes=FEW)["w"]} for seed in range(4))
  z, gz = (jax.tree.map(lambda a, b: a + 1j * b, *pair) for pair in ((x, y), (g, h)))
  tx = make(name)
  split = contrib.split_real_and_imaginary(tx)
  ours, _ = jax.jit(split.update)(gz, split.init(z), z)
  real, imaginary = jax.jit(tx.update)((g, h), tx.init((x, y)), (x, y))[0]
  np.testing.assert_allclose(ours["w"].real, real["w"], rtol=1e-6, atol=1e-9)
  np.testing.assert_allclose(ours["w"].imag, imaginary["w"], rtol=1e-6, atol=1e-9)


MOMENT_DTYPES = {"adamw": "mu_dtype", "lion": "mu_dtype", "sgd": "accumulator_dtype"}


@pytest.mark.parametrize("rule", MOMENT_DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_dtype_for_a_moment_in_few_bits_is_refused(rule, bits):
  """It was left unheeded; where nothing is quantized it is optax's."""
  params, arguments = tree(0, shapes=FEW), {MOMENT_DTYPES[rule]: jnp.bfloat16}
  if rule == "sgd":
    arguments["momentum"] = 0.9
  make = getattr(lowmem, rule)
  with pytest.raises(ValueError, match=r"dtype` bfloat16 needs `bits=32`"):
    make(LR, bits=bits, **arguments)
  state = make(LR, **arguments, bits=32).init(params)
  assert jnp.dtype(jnp.bfloat16) in {x.dtype for x in jax.tree.leaves(state)}
