"""Arguments that depend on each other, and `optax.inject_hyperparams`, over every optimizer."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from registry import ENTRIES

PARAMS = {"w": jnp.ones((64, 96)), "b": jnp.ones(4)}
RULES = {e.rule: e for e in ENTRIES if hasattr(lowmem, e.rule)}
DECAYS = {"b1", "b2", "b3", "decay", "momentum"}


def parameters_of(rule):
  return inspect.signature(getattr(lowmem, rule)).parameters


def static(rule):
  """What README and the messages say is static."""
  names = ("bits", "block_size", "min_size", "quantize_mask", "min_dim_size_to_factor")
  known = parameters_of(rule)
  return tuple(n for n in known if n in names or n.endswith("mask") or "dtype" in n)


def injected(rule, static_args, **kwargs):
  inject = optax.inject_hyperparams(getattr(lowmem, rule), static_args)
  return inject(learning_rate=1e-2, **RULES[rule].arguments, **kwargs)


# Dtypes of moments ------------------------------------------------------------------------------

DTYPES = [(r, n) for r in RULES for n in parameters_of(r) if "dtype" in n]


def test_some_take_a_dtype():
  assert {r for r, _ in DTYPES} >= {"adam", "adamw", "lion", "sgd", "ademamix", "adafactor"}


@pytest.mark.parametrize(("rule", "name"), DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_dtype_for_what_is_in_few_bits_is_refused(rule, name, bits):
  make = getattr(lowmem, rule)
  arguments = RULES[rule].arguments | {name: jnp.bfloat16, "bits": bits}
  with pytest.raises(ValueError, match=f"`{name}` bfloat16 needs `bits=32`, got {bits}.*Dense"):
    make(1e-3, **arguments)
  make(1e-3, **arguments | {name: jnp.float32})
  with pytest.raises(TypeError, match=f"`{name}` must be a dtype"):
    make(1e-3, **arguments | {name: "brain"})


@pytest.mark.parametrize(("rule", "name"), DTYPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_32_bits_honour_the_dtype(rule, name, dtype):
  """As in optax with parameters in float32, whatever theirs."""
  params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)

  def dtypes(tx, params):
    state = jax.eval_shape(tx.init, params)
    new = jax.eval_shape(tx.update, params, state, params)[1]
    return jax.tree.map(lambda x: x.dtype, (state, new))

  ours = getattr(lowmem, rule)(1e-3, **RULES[rule].arguments, bits=32, **{name: jnp.bfloat16})
  theirs = RULES[rule].theirs(1e-3, **{name: jnp.bfloat16})
  assert dtypes(ours, params) == dtypes(theirs, PARAMS)
  assert jnp.bfloat16 in jax.tree.leaves(dtypes(theirs, PARAMS))


def test_a_dtype_within_quantized_is_refused():
  inner = optax.chain(optax.clip(1.0), optax.adam(1e-3, mu_dtype=jnp.bfloat16))
  with pytest.raises(ValueError, match=r"bfloat16 for its moment 'mu'.*Dense\(jnp\.bfloat16\)"):
    lowmem.quantized(inner).init(PARAMS)
  given = lowmem.quantized(inner, storage={"mu": lowmem.Dense(jnp.bfloat16)}).init(PARAMS)
  mu, nu = optax.tree.get(given, "mu")["w"], optax.tree.get(given, "nu")["w"]
  assert mu.dtype == jnp.bfloat16 and isinstance(nu, lowmem.QuantizedArray)
  kept = lowmem.quantized(inner, 32).init(PARAMS)
  assert optax.tree.get(kept, "mu")["w"].dtype == jnp.bfloat16


# Injected hyperparameters -----------------------------------------------------------------------

MASKS = [(r, n) for r in RULES for n in parameters_of(r) if n.endswith("mask")]


def only_matrices(tree):
  return jax.tree.map(lambda x: x.ndim > 1, tree)


def everything(tree):
  return jax.tree.map(lambda x: x.ndim != 1, tree)  # True of a step's number


@pytest.mark.parametrize(("rule", "name"), MASKS)
def test_a_mask_is_never_called_as_a_schedule(rule, name):
  others = tuple(n for n in static(rule) if n != name)
  for mask in (only_matrices, everything):
    with pytest.raises(TypeError, match=rf"`{name}` must be.*static_args=\(.*'{name}'"):
      injected(rule, others, **{name: mask}).init(PARAMS)
  updates = []
  for mask in (only_matrices, only_matrices(PARAMS)):
    tx = injected(rule, static(rule), **{name: mask})
    updates.append(tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0])
  jax.tree.map(np.testing.assert_array_equal, *updates)


def test_a_static_function_may_be_called_for_a_mask():
  def rule(learning_rate, mask):
    return lowmem.adamw(learning_rate, mask=mask(PARAMS))

  tx = optax.inject_hyperparams(rule, "mask")(1e-3, only_matrices)
  tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(("rule", "name"), MASKS)
def test_arrays_are_no_masks(rule, name):
  make = getattr(lowmem, rule)
  message = rf"`{name}` must be made of Python bools, got an array.*static_args=\(.*'{name}'"
  for array in (jnp.array(True), np.array(True)):
    for mask in (array, {"w": array, "b": False}):
      with pytest.raises(TypeError, match=message):
        make(1e-3, **{name: mask})
  with pytest.raises(TypeError, match=message):
    jax.jit(lambda m: make(1e-3, **{name: m}).init(PARAMS))(jnp.array(True))
  make(1e-3, **{name: {"w": np.True_, "b": False}})


def test_arrays_are_no_masks_where_a_function_returns_them():
  mask = {"w": jnp.array(True), "b": False}
  tx = lowmem.quantized(optax.adam(1e-3), quantize_mask=lambda p: mask)
  with pytest.raises(TypeError, match="`quantize_mask` must be made of Python bools, got an array"):
    tx.init(PARAMS)
  with pytest.raises(TypeError, match="`quantize_mask` must be made of Python bools, got an array"):
    lowmem.quantized(optax.adam(1e-3), quantize_mask=mask)


@pytest.mark.parametrize("rule", [r for r in RULES if DECAYS & {*parameters_of(r)}])
def test_decays_of_16_bits_are_refused(rule):
  """`inject_hyperparams` casts them to the dtype of the parameters, and 0.999 becomes 1."""
  for dtype in (jnp.bfloat16, jnp.float16):
    half = jax.tree.map(lambda p, d=dtype: p.astype(d), PARAMS)
    with pytest.raises(ValueError, match=r"too coarse.*`hyperparam_dtype=jnp\.float32`"):
      injected(rule, static(rule)).init(half)
  inject = optax.inject_hyperparams(getattr(lowmem, rule), static(rule), jnp.float32)
  tx = inject(learning_rate=1e-2, **RULES[rule].arguments)
  updates, _ = jax.jit(tx.update)(half, tx.init(half), half)
  assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))
  injected(rule, static(rule)).init(PARAMS)


@pytest.mark.parametrize("rule", RULES)
def test_the_message_holds_the_recipe(rule):
  """What it says to be static is enough."""
  with pytest.raises(TypeError, match="must be") as error:
    injected(rule, ()).init(PARAMS)
  given = str(error.value).partition("static_args=")[2].rstrip("`.")
  assert given == str(static(rule))
  tx = injected(rule, static(rule))
  jax.eval_shape(tx.update, PARAMS, tx.init(PARAMS), PARAMS)


def test_an_injected_optimizer_outside_jit_says_that_it_is_compiled_each_time():
  params = jnp.ones((8, 8))
  tx = optax.inject_hyperparams(lambda learning_rate: lowmem.adamw(learning_rate))(1e-3)
  state = tx.init(params)
  with pytest.warns(UserWarning, match="anew in each update.*Put the step into `jax.jit`"):
    tx.update(params, state, params)
  within = lowmem.quantized(optax.inject_hyperparams(optax.adamw)(1e-3))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    jax.jit(tx.update)(params, state, params)
    within.update(params, within.init(params), params)
