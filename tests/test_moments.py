"""Every transformation of optax: which fields are moments, of what kind, and how far rounding takes
it. The table in docs/transformations.md is the registry; each name in it has a factory here."""

import functools
import inspect
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import optax_lowmem as lowmem
from optax_lowmem._state import moments as _moments
from optax_lowmem._state.moments import Kind, field_of, is_quantized, kind_of, places
from optax_lowmem._update import engine as _engine

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "transformations.md").read_text()
LR = 1e-3

# Those that are not `optax.name(LR)` or `optax.contrib.name(LR)`.
FACTORIES = {
  "adafactor_momentum": lambda: optax.adafactor(LR, momentum=0.9),
  "apply_every": lambda: optax.apply_every(2),
  "cocob": contrib.cocob,
  "dadapt_adamw": lambda: contrib.dadapt_adamw(1.0),
  "ema": lambda: optax.ema(0.9),
  "lbfgs": optax.lbfgs,
  "mechanize": lambda: contrib.mechanize(optax.adamw(LR)),
  "momo": lambda: contrib.momo(1.0),
  "momo_adam": lambda: contrib.momo_adam(1e-2),
  "multi_steps": lambda: optax.MultiSteps(optax.adam(LR), 2).gradient_transformation(),
  "nesterov": lambda: optax.sgd(LR, 0.9, nesterov=True),
  "noisy_sgd": lambda: optax.noisy_sgd(LR, key=jax.random.key(0)),
  "normalize": contrib.normalize,
  "polyak_sgd": lambda: optax.polyak_sgd(1.0),
  "prodigy": contrib.prodigy,
  "rmsprop_bias_correction": lambda: optax.rmsprop(LR, bias_correction=True),
  "rmsprop_centered": lambda: optax.rmsprop(LR, centered=True),
  "rmsprop_momentum": lambda: optax.rmsprop(LR, momentum=0.9),
  "sam": lambda: contrib.sam(optax.adam(LR), optax.sgd(1e-2)),
  "scale_by_distance_over_gradients": optax.scale_by_distance_over_gradients,
  "sgd": lambda: optax.sgd(LR, 0.9),
  "snapshot": lambda: optax.snapshot("size", lambda updates: updates),
}


def make(name):
  if name in FACTORIES:
    return FACTORIES[name]()
  return getattr(optax if hasattr(optax, name) else contrib, name)(LR)


def rows():
  """The table: name, classes, kinds by field, by tiles, largest drift."""
  table = re.findall(r"^\| (`.*)\|$", PAGE, re.MULTILINE)
  for names, classes, held, _, tiles, drift in (re.split(r" ?\| ?", row.strip()) for row in table):
    kinds = {field: Kind[kind.upper()] for field, kind in re.findall(r"`(\w+)` (\w+)", held)}
    assert kinds or held == "none"
    for name in re.findall(r"`(\w+)`", names):
      limit = float(drift.removesuffix(" %")) / 100 if kinds else None
      yield name, re.findall(r"`(\w+)`", classes), kinds, tiles, limit


TABLE: dict[str, Any] = {name: rest for name, *rest in rows()}
STORED = [name for name in TABLE if TABLE[name][1]]
# One of each kind; the others, two seconds each, run with `-m slow`.
CLOSE = ("adamw", "adopt", "ademamix", "lion", "sgd", "adagrad", "lamb", "adafactor", "muon")


# Least squares in minibatches; inputs and outputs of very different sizes.
KEYS = jax.random.split(jax.random.key(0), 6)
INPUTS = jax.random.normal(KEYS[0], (2048, 64)) * jnp.exp(jax.random.normal(KEYS[1], (64,)))
SIZES = jnp.exp(jax.random.normal(KEYS[2], (128,)))
OUTPUTS = INPUTS @ jax.random.normal(KEYS[3], (64, 128)) * SIZES
PARAMS = {"w": 0.1 * jax.random.normal(KEYS[4], (64, 128))}


def loss(params, step):
  batch = jax.random.randint(jax.random.fold_in(KEYS[5], step), (64,), 0, 2048)
  return jnp.mean(jnp.square(INPUTS[batch] @ params["w"] - OUTPUTS[batch]))


def train(name, wrap, steps=20):
  """Parameters and state after some steps of `wrap(make(name))`."""
  tx = wrap(make(name))

  def step(t, carry):
    params, state = carry
    now = functools.partial(loss, step=t)
    value, g = jax.value_and_grad(now)(params)
    extra = {"value": value, "obj_fn": now} if name != "sam" else {}
    updates, state = tx.update(g, state, params, **extra)
    return optax.apply_updates(params, updates), state

  def run(params):
    return jax.lax.fori_loop(0, steps, step, (params, tx.init(params)))

  return jax.jit(run)(PARAMS)


def moments(name):
  """The kind of every field of the parameter's shape, and the classes of all states."""
  state = jax.eval_shape(make(name).init, PARAMS)
  found = {field_of(p): kind_of(state, p) for p in places(state, PARAMS) if p.owner is not None}
  return {field: kind for field, kind in found.items() if kind}, state


def held(state):
  """The fields that are quantized."""
  flat, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_quantized)
  places_ = zip(places(state, PARAMS), flat, strict=True)
  return {field_of(place) for place, (_, x) in places_ if is_quantized(x)}


def drift_of(name):
  """How far 20 steps lead from float32's, by how far float32's lead; and the state."""
  ours, state = train(name, lowmem.quantized)
  exact, _ = train(name, optax.with_extra_args_support)
  drift, travelled = (
    jnp.abs(ours["w"] - exact["w"]).mean(),
    jnp.abs(exact["w"] - PARAMS["w"]).mean(),
  )
  return drift / travelled, state


@pytest.mark.parametrize("name", TABLE)
def test_kinds_are_as_documented(name):
  classes, kinds, _, _ = TABLE[name]
  found, state = moments(name)
  assert found == kinds
  assert any(cls in str(state) for cls in classes)
  assert held(jax.eval_shape(lowmem.quantized(make(name)).init, PARAMS)) == set(kinds)


@pytest.mark.parametrize("name", STORED)
def test_runs_by_tiles_where_documented(name, monkeypatch):
  _, kinds, by_tiles, _ = TABLE[name]
  whole = []

  def spy(*args):
    whole.append(name)
    return on_whole_arrays(*args)

  on_whole_arrays = _engine.update_whole
  monkeypatch.setattr(_engine, "update_whole", spy)
  _, state = jax.eval_shape(lambda: train(name, lowmem.quantized))
  assert held(state) == set(kinds)
  assert ("no" if whole else "yes") == by_tiles


@pytest.mark.parametrize(
  "name", [n if n in CLOSE else pytest.param(n, marks=pytest.mark.slow) for n in STORED]
)
def test_stays_close_to_float32(name):
  *_, limit = TABLE[name]
  drift, _ = drift_of(name)
  assert 0 < drift <= limit


def test_every_class_with_moments_is_documented():
  """And none is listed that optax does not have: a renamed class would silently stay float32."""
  documented = {cls for classes, *_ in TABLE.values() for cls in classes}
  assert _moments._KINDS.keys() <= documented
  found = set()
  for name in STORED:
    state = jax.eval_shape(make(name).init, PARAMS)
    found |= {cls for cls in _moments._KINDS if f"{cls}(" in str(state)}
  assert found == _moments._KINDS.keys()


@pytest.mark.skipif(not optax.__version__.startswith("0.2.8"), reason="the page is of optax 0.2.8")
def test_every_state_of_optax_is_documented():
  classes = {
    name
    for module in (optax, contrib)
    for name, cls in inspect.getmembers(module, inspect.isclass)
    if re.fullmatch("[A-Z].*State", name) and hasattr(cls, "__annotations__")
  }
  assert {name for name in classes if f"`{name}`" not in PAGE} == set()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_code_on_the_page_runs(code):
  names = {"jnp": jnp, "lowmem": lowmem, "optax": optax}
  exec(code, names)
  if "lamb" in names:
    exact = optax.lamb(1e-3)
    u: Any
    v: Any
    u, _ = names["lamb"].update(PARAMS, names["lamb"].init(PARAMS), PARAMS)
    v, _ = exact.update(PARAMS, exact.init(PARAMS), PARAMS)
    assert jnp.abs(u["w"] - v["w"]).mean() <= 0.05 * jnp.abs(v["w"]).mean()


def test_moments_are_found_through_wrappers():
  """Chains, masks, partitions, injected hyperparameters, whatever the tree of parameters."""
  w, b = PARAMS["w"], jnp.ones(4096)
  adam = optax.adam(LR)
  cases = [
    (optax.chain(optax.clip(1.0), optax.chain(adam)), w, 2),
    (optax.named_chain(("one", adam), ("two", optax.trace(0.9))), (w, b), 6),
    (optax.masked(adam, {"mu": True, "l": [False]}), {"mu": w, "l": [b]}, 2),
    (optax.inject_hyperparams(optax.adam)(LR), [w, {"w": w}], 4),
    (optax.partition({"x": adam, "y": optax.lion(LR)}, {"a": "x", "b": "y"}), {"a": w, "b": b}, 3),
    (contrib.muon(LR), {"mu": w, "adam": b, "l": {"w": w}}, 4),
    (contrib.schedule_free(optax.adamw(LR, b1=0.0), LR), {"z": w}, 2),
    (optax.sm3(LR), [b, w, b], 3),
  ]
  for inner, params, count in cases:
    state = jax.eval_shape(lowmem.quantized(inner).init, params)
    leaves = jax.tree.leaves(state, is_leaf=is_quantized)
    assert sum(map(is_quantized, leaves)) == count


@pytest.mark.parametrize("centered", [False, True])
def test_bytes_of_rmsprop_with_momentum(centered):
  """As its docstring says: twice 1.0625, or 8 and 1.0625 where the averages stay in float32."""
  tx = lowmem.rmsprop(LR, momentum=0.9, centered=centered)
  state = jax.eval_shape(tx.init, PARAMS)
  size = sum(lowmem.state_bytes(state).values()) / PARAMS["w"].size
  assert size == (9.0625 if centered else 2.125)


@pytest.mark.parametrize("name, count", [("adagrad", 1), ("rmsprop", 1), ("ademamix", 3)])
@pytest.mark.parametrize("bits", [32, 8])
def test_aliases_keep_the_signature_and_the_state_of_optax(name, count, bits):
  theirs, ours = getattr(optax, name, None) or getattr(contrib, name), getattr(lowmem, name)
  parameters = list(inspect.signature(ours).parameters)
  assert parameters[:-4] == list(inspect.signature(theirs).parameters)
  assert parameters[-4:] == ["bits", "block_size", "min_size", "quantize_mask"]
  state = jax.eval_shape(ours(LR, bits=bits).init, PARAMS)
  assert str(state)[:20] == str(jax.eval_shape(theirs(LR).init, PARAMS))[:20]
  size = sum(lowmem.state_bytes(state).values()) / PARAMS["w"].size
  assert abs(size - count * {32: 4, 8: 1.0625}[bits]) < 0.01
  assert ours.__doc__.count(theirs.__name__) >= 2


@pytest.mark.parametrize(
  "name, bits",
  [
    ("rmsprop_8bit", 8),
    ("rmsprop_bnb_8bit", 8),
    ("RMSprop8bit", 8),
    ("adagrad", 32),
    ("adagrad_8bit", 8),
    ("ademamix", 32),
    ("ademamix_8bit", 8),
    ("AdEMAMix8bit", 8),
    ("adamw_torch_8bit", 8),
    ("adamw_torch_fused", 32),
    ("lion_32bit", 32),
    ("sgd_8bit", 8),
  ],
)
def test_create_by_the_names_people_know(name, bits):
  state = jax.eval_shape(lowmem.create(name, LR).init, PARAMS)
  assert bool(held(state)) == (bits == 8)


def test_create_says_what_it_does_not_know():
  with pytest.raises(ValueError, match=r"Did you mean 'paged_adamw_8bit'\?"):
    lowmem.create("paged_adamw_8bits", LR)
  with pytest.raises(ValueError, match=r"'adagrd' is unknown\. Did you mean 'adagrad'\?.*Known"):
    lowmem.create("adagrd", LR)


@pytest.mark.slow
@pytest.mark.parametrize("name, limit", [("adam", 0.06), ("adagrad", 0.06), ("ademamix", 0.11)])
def test_slow_averages_over_many_steps(name, limit):
  """3,000 steps of gradients of one distribution; mean drift of the sum of updates."""
  params, steps = {"w": jnp.zeros((64, 128))}, 3000
  exact = make(name)
  ours = lowmem.quantized(make(name))
  size = jnp.exp(jax.random.normal(KEYS[0], (64, 128)))
  bias = 0.3 * jax.random.normal(KEYS[1], (64, 128))

  def step(t, carry):
    (p, s), (q, r) = carry
    g = {"w": size * (bias + jax.random.normal(jax.random.fold_in(KEYS[2], t), (64, 128)))}
    u: Any
    v: Any
    u, s = exact.update(g, s, params)
    v, r = ours.update(g, r, params)
    return (p + u["w"], s), (q + v["w"], r)

  start = (params["w"], exact.init(params)), (params["w"], ours.init(params))
  (p, _), (q, _) = jax.jit(lambda start: jax.lax.fori_loop(0, steps, step, start))(start)
  assert jnp.abs(p - q).mean() <= limit * jnp.abs(p).mean()


ADAMAX = {
  "optax": (optax.with_extra_args_support, (1.001, 1.001, 1.001)),
  "8 bits": (lowmem.quantized, (1.1, 1.1, 2.5)),
  "4 bits": (functools.partial(lowmem.quantized, bits=4), (np.inf, np.inf, np.inf)),
  "4 bits, mu 8": (
    functools.partial(lowmem.quantized, bits=4, storage={"mu": lowmem.Blockwise("power8")}),
    (1.5, 3, 3),
  ),
}
OUTLIERS = (1, 30, 1000)


def largest_steps(name):
  """The largest of 8 × 60 steps of Adamax, in learning rates, for each size of one of 64 features.

  In float32 it is 1: `nu` is a maximum of |g|, which no later |mu| is above.
  """
  tx = ADAMAX[name][0](optax.adamax(LR))

  def run(keys, outlier):
    column = jnp.ones(64).at[0].set(outlier)

    def step(t, carry):
      state, largest = carry
      g = jax.random.normal(keys[t], (512, 64)) * column
      updates, state = tx.update(g, state, jnp.zeros((512, 64)))
      return state, jnp.maximum(largest, jnp.abs(updates).max() / LR)

    return jax.lax.fori_loop(0, 60, step, (tx.init(jnp.zeros((512, 64))), 0.0))[1]

  run = jax.jit(run)
  seeds = [jax.random.split(jax.random.key(k), 60) for k in range(8)]
  return [max(float(run(keys, float(x))) for keys in seeds) for x in OUTLIERS]


@pytest.mark.parametrize("name", ADAMAX)
def test_steps_of_adamax_stay_near_the_learning_rate(name):
  """As docs/transformations.md says: not in 4 bits, unless `mu` has 8."""
  found = largest_steps(name)
  for step, limit in zip(found, ADAMAX[name][1], strict=True):
    assert 0.99 <= step <= limit
  assert (max(found) > 20) == (name == "4 bits")


if __name__ == "__main__":  # the drifts, to be rounded up in docs/transformations.md
  for adamax in ADAMAX:
    print(f"| adamax, {adamax} |", *(f"{x:.2f} |" for x in largest_steps(adamax)), flush=True)
  for stored in STORED:
    print(f"| {stored} | {100 * drift_of(stored)[0]:.2f} % |", flush=True)
