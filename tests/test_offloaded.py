"""State that rests in host memory: the same training, a bound on what is fetched, no abort."""

import collections
import functools
import os
import re
import subprocess
import sys
import textwrap
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from cuda_cases import lowered_for_cuda
from optax_lowmem._host_memory import capacity as _host
from optax_lowmem._host_memory import pages as _pages
from optax_lowmem._paging import offloaded as _offloaded
from programs import times_compiled
from registry import LR, REGISTRY, by_rows, every_rule, make, trained_linen, trained_nnx, tree

HOST = jax.memory.Space.Host
FEW = {"w": (48, 96), "lora": (512, 16), "b": (5,)}
RULES = {
  "32 bits": lambda: optax.adamw(LR),
  "8 bits": lambda: lowmem.adamw(LR),
  "4 bits": lambda: lowmem.adamw(LR, bits=4),
}
every_width = pytest.mark.parametrize("width", RULES)


def pages(state):
  return [x for x in jax.tree.leaves(state, is_leaf=_pages.is_paged) if _pages.is_paged(x)]


def on_device(state):
  """Bytes of what is not paged."""
  rest = jax.tree.map(lambda x: None if _pages.is_paged(x) else x, state, is_leaf=_pages.is_paged)
  return sum(_pages.nbytes(x) for x in jax.tree.leaves(rest))


def trained(tx, params, steps, seed=0):
  """Parameters and state after steps of random gradients, in one scan."""

  def step(carry, grads):
    params, state = carry
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  normal = np.random.default_rng(seed).standard_normal
  grads = {k: normal((steps, *p.shape), np.float32) for k, p in params.items()}
  run = jax.jit(lambda c, grads: jax.lax.scan(step, c, grads)[0])
  return run((params, tx.init(params)), grads)


@every_width
def test_a_thousand_steps_are_bit_equal(width):
  """Step by step, as one trains: within `lax.scan` XLA rounds optax's own AdamW otherwise."""
  grads = [tree(100 + t, shapes=FEW) for t in range(10)]
  results = []
  for tx in (RULES[width](), lowmem.offloaded(RULES[width](), max_bytes=0)):
    step = jax.jit(step_of(tx), donate_argnums=(0, 1))
    params = tree(0, shapes=FEW)
    state = tx.init(params)
    for t in range(1000):
      params, state = step(params, state, grads[t % 10])
    results.append((params, state))
  assert pages(state)
  exact, (ours, state) = results
  chex.assert_trees_all_equal((ours, lowmem.unpaged(state)), exact)


@every_rule
def test_every_rule_is_the_same_offloaded(name):
  params = tree(0, shapes=FEW)
  tx = lowmem.offloaded(make(name), min_bytes=1024, max_bytes=20_000)
  state, exact = tx.init(params), make(name).init(params)
  moments = REGISTRY[name].moments
  assert len(pages(state)) >= 2 * moments  # codes, at least, of two arrays
  assert {p.lanes[0].sharding.memory_kind for p in pages(state)} == {"pinned_host"}
  update, theirs = jax.jit(tx.update, donate_argnums=1), jax.jit(make(name).update)
  for t in range(2):
    grads = tree(100 + t, shapes=FEW)
    before = jax.tree.map(jax.typeof, state)
    updates, state = update(grads, state, params)
    assert jax.tree.map(jax.typeof, state) == before
    expected, exact = theirs(grads, exact, params)
    chex.assert_trees_all_equal((updates, lowmem.unpaged(state)), (expected, exact))


# The bound ----------------------------------------------------------------------------------------


def step_of(tx):
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step


def abstract(tx, params):
  """A state's shapes, its pages in host memory."""
  host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")

  def one(x):
    if not _pages.is_paged(x):
      return x
    return jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=host), x)

  return jax.tree.map(one, jax.eval_shape(tx.init, params), is_leaf=_pages.is_paged)


def program_for_gpus(tx, params):
  """The operations of a step as they are given to the compiler of a GPU.

  On a CPU, where host and device are one memory, nothing of the transfers is left.
  """
  lowered = lowered_for_cuda(step_of(tx), params, abstract(tx, params), params)
  return lowered.compiler_ir("stablehlo")


def size_of(value):
  text = str(value.type).removeprefix("tensor<").removesuffix(">")
  *axes, dtype = text.split("x")
  bits = {"f32": 32, "ui8": 8, "i32": 32, "bf16": 16, "i1": 8}[dtype]
  return int(np.prod([int(n) for n in axes])) * bits // 8


def moved(module):
  """Bytes that go between memories, by the loop in which they go: to the device and back."""
  functions = {f.attributes["sym_name"].value: f.operation for f in module.body.operations}
  found = collections.Counter()

  def walk(operation, loop):
    for op in (x.operation for r in operation.regions for b in r.blocks for x in b.operations):
      if op.name == "stablehlo.custom_call":
        placed = op.attributes["call_target_name"].value == "annotate_device_placement"
        # Outside of loops, it is said of each result where it is.
        if placed and (
          loop or '"pinned_host"' not in str(op.attributes["mhlo.frontend_attributes"])
        ):
          found[loop] += size_of(op.results[0])
      if op.name in ("func.call", "stablehlo.composite"):
        walk(functions[op.attributes["callee"].value], loop)
      walk(op, op if op.name == "stablehlo.while" else loop)

  walk(functions["main"], None)
  return found


MIB = 1 << 20
TREES = {
  "64 of 16 MiB": {f"w{k:02}": jax.ShapeDtypeStruct((2048, 2048), jnp.float32) for k in range(64)},
  "one of 1 GiB": {"w": jax.ShapeDtypeStruct((16384, 16384), jnp.float32)},
}


@every_width
@pytest.mark.parametrize("shapes", TREES)
def test_no_more_state_is_on_the_device_than_allowed(shapes, width):
  """A trip of a loop is all that there can be: `tests/test_accelerator_paging.py` has the rest."""
  params = TREES[shapes]
  tx = lowmem.offloaded(RULES[width]())
  total = sum(
    _pages.nbytes(p) for p in jax.tree.leaves(jax.eval_shape(RULES[width]().init, params))
  )
  assert on_device(jax.eval_shape(tx.init, params)) <= 0.01 * total
  found = moved(program_for_gpus(tx, params))
  assert found.pop(None, 0) == 0
  assert len(found) == len(params)
  assert max(found.values()) <= 32 * MIB


def test_norms_do_not_tie_parameters_together():
  params = TREES["64 of 16 MiB"]
  tx = lowmem.offloaded(optax.chain(optax.scale_by_adam(), optax.clip_by_global_norm(1.0)))
  found = moved(program_for_gpus(tx, params))
  assert found.pop(None, 0) == 0
  assert max(found.values()) <= 32 * MIB


# By rows, on a CPU --------------------------------------------------------------------------------


ROWS = {
  "two lanes": {"w": (256, 192), "stack": (3, 128, 96)},
  "one lane": {"w": (50, 192), "lora": (512, 16), "flat": (4096,), "odd": (33, 131)},
}
BY_ROWS = {
  "adamw": lambda: optax.adamw(LR),
  "adamw 8": lambda: lowmem.adamw(LR),
  "adamw 4": lambda: lowmem.adamw(LR, bits=4),
  "lion 8": lambda: lowmem.lion(LR),
  "lamb": lambda: optax.lamb(LR),
  "came 8": lambda: lowmem.came(LR),
  "multi_steps": lambda: optax.MultiSteps(lowmem.adamw(LR), 2).gradient_transformation(),
  "apply_if_finite": lambda: optax.apply_if_finite(lowmem.adamw(LR), 2),
  "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), lowmem.adamw(LR)),
}


@pytest.mark.parametrize(
  ("name", "shapes"),
  [(name, "two lanes") for name in BY_ROWS]
  + [(name, "one lane") for name in ("adamw", "adamw 4", "lamb", "came 8")],
)
def test_by_rows_it_is_the_same(name, shapes):
  params = tree(0, shapes=ROWS[shapes])
  tx, plain = lowmem.offloaded(BY_ROWS[name](), max_bytes=40_000), BY_ROWS[name]()
  state, exact = tx.init(params), plain.init(params)
  assert {len(p.lanes) for p in pages(state)} >= {2 if shapes == "two lanes" else 1}
  with by_rows():
    update = jax.jit(tx.update)
    found = str(update.trace(params, state, params).jaxpr)
    assert "optimization_barrier" in found or shapes == "one lane"
    ours = []
    for t in range(2):
      updates, state = update(tree(100 + t, shapes=ROWS[shapes]), state, params)
      ours.append(updates)
  theirs = jax.jit(plain.update)
  for t in range(2):
    expected, exact = theirs(tree(100 + t, shapes=ROWS[shapes]), exact, params)
    chex.assert_trees_all_close(ours[t], expected, rtol=1e-5, atol=1e-7)


# Donation -----------------------------------------------------------------------------------------

OBVIOUS = """
  import jax, jax.numpy as jnp, numpy as np, optax, sys
  import optax_lowmem as lowmem
  kind, *orders = sys.argv[1:]
  Space = jax.memory.Space
  tx = optax.adamw(1e-3)
  params = {k: jnp.ones((64, 64)) for k in "abc"} | {"conv": jnp.ones((1, 1, 64, 64))}
  if kind == "naive":
    def move(state, space):
      return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, state)
    def update(g, state, p):
      u, state = tx.update(g, move(state, Space.Device), p)
      return u, move(state, Space.Host)
    state = move(tx.init(params), Space.Host)
  else:
    where = {"all": None, "part": "mu/[ab]|nu/c", "bits": None}[kind]
    if kind == "bits":
      tx = lowmem.adamw(1e-3)
    tx = lowmem.offloaded(tx, where=where, min_bytes=0)
    update, state = tx.update, tx.init(params)
  def step(params, state, order):
    u, state = update(params, state, params)
    new = optax.apply_updates(params, u)
    return {"updates first": (u, state), "params first": (new, state), "state first": (state, new),
            "both": (u, new, state)}[order]
  for order in orders:
    donated = (0, 1) if order == "state first" else (1,)
    given = jax.tree.map(lambda x: x.copy(), params), tx.init(params) if kind != "naive" else state
    out = jax.jit(step, donate_argnums=donated, static_argnums=2)(*given, order)
    print(sum(np.asarray(x, float).sum() for x in jax.tree.leaves(out)), flush=True)
"""


ORDERS = ("updates first", "params first", "state first", "both")


def obvious(kind, *orders):
  code = textwrap.dedent(OBVIOUS)
  environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=os.pathsep.join(sys.path))
  return subprocess.run(
    [sys.executable, "-c", code, kind, *orders], capture_output=True, text=True, env=environment
  )


def test_the_obvious_loop_aborts_without_pages():
  """If this fails, JAX has learned it, and pages can have the shapes of their arrays."""
  result = obvious("naive", "updates first")
  assert result.returncode < 0
  assert "memory kind does not match" in result.stderr


@pytest.mark.parametrize("kind", ["all", "part", "bits"])
def test_the_obvious_loop_runs(kind):
  orders = ("state first",) if kind == "bits" else ORDERS  # no update has the dtype of codes
  result = obvious(kind, *orders)
  assert result.returncode == 0, result.stdout + result.stderr[-2000:]
  plain = [obvious_result(kind, order) for order in orders]
  assert [float(line) for line in result.stdout.split()] == pytest.approx(plain, rel=1e-6)


def obvious_result(kind, order):
  tx = lowmem.adamw(1e-3) if kind == "bits" else optax.adamw(1e-3)
  params = {k: jnp.ones((64, 64)) for k in "abc"} | {"conv": jnp.ones((1, 1, 64, 64))}
  u, state = jax.jit(tx.update)(params, tx.init(params), params)
  new = optax.apply_updates(params, u)
  parts = {
    "updates first": (u, state),
    "params first": (new, state),
    "state first": (state, new),
    "both": (u, new, state),
  }[order]
  return sum(np.asarray(x, float).sum() for x in jax.tree.leaves(parts))


# Composition --------------------------------------------------------------------------------------


def every_other(step: Any, **_: Any) -> Any:
  return step % 2 == 0


AROUND = {
  "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(0.5)),
  "masked": lambda tx: optax.masked(tx, {"w": True, "lora": False, "b": True}),
  "partition": lambda tx: optax.partition(
    {"a": tx, "b": optax.sgd(0.1)}, {"w": "a", "lora": "b", "b": "a"}
  ),
  "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
  "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
  "conditionally": lambda tx: optax.conditionally_transform(tx, every_other),
  "inject": lambda tx: optax.chain(tx, optax.inject_hyperparams(optax.scale)(step_size=0.5)),
}


@pytest.mark.parametrize("inside", [False, True], ids=["outermost", "within"])
@pytest.mark.parametrize("kind", AROUND)
def test_composes(kind, inside):
  if inside and kind in CHOOSE:
    pytest.skip("refused: test_refuses_to_be_chosen_between")
  around, inner = AROUND[kind], lowmem.adamw(LR)
  tx = around(lowmem.offloaded(inner)) if inside else lowmem.offloaded(around(inner))
  ours, state = trained(tx, tree(0, shapes=FEW), 5)
  assert pages(state)
  chex.assert_trees_all_equal((ours, lowmem.unpaged(state)), trained_without(kind))


CHOOSE = {
  "apply_if_finite": "optax.apply_if_finite",
  "multi_steps": "optax.MultiSteps",
  "conditionally": "optax.conditionally_transform",
}


@pytest.mark.parametrize("kind", CHOOSE)
def test_refuses_to_be_chosen_between(kind):
  """Old and new pages would be chosen between on the host, or copied there."""
  around, params = AROUND[kind], tree(0, shapes=FEW)
  tx = around(lowmem.offloaded(lowmem.adamw(LR)))
  swap = re.escape(f"Swap them: `offloaded({CHOOSE[kind]}(tx, …))`")
  with pytest.raises(ValueError, match=swap):
    tx.init(params)
  state = lowmem.offloaded(around(lowmem.adamw(LR)), where="mu|nu").init(params)
  with pytest.raises(ValueError, match=swap):
    jax.jit(tx.update)(params, state, params)


@functools.cache
def trained_without(kind):
  return trained(AROUND[kind](lowmem.adamw(LR)), tree(0, shapes=FEW), 5)


def test_hyperparameters_are_injected():
  def plain(learning_rate):
    return lowmem.adamw(learning_rate)

  def rule(learning_rate):
    return lowmem.offloaded(plain(learning_rate))

  params = tree(0, shapes=FEW)
  ours, state = trained(optax.inject_hyperparams(rule)(learning_rate=LR), params, 3)
  exact, _ = trained(optax.inject_hyperparams(plain)(learning_rate=LR), params, 3)
  chex.assert_trees_all_equal(ours, exact)
  assert pages(state)


def test_what_is_passed_to_update_may_be_a_function():
  params = {"w": jnp.linspace(-1, 1, 4096).reshape(64, 64)}
  f = lambda p: (p["w"] ** 2).sum()  # noqa: E731
  ends = []
  for tx in (optax.lbfgs(), lowmem.offloaded(optax.lbfgs())):
    p, state = params, tx.init(params)
    for _ in range(2):
      value, grad = jax.value_and_grad(f)(p)
      updates, state = tx.update(grad, state, p, value=value, grad=grad, value_fn=f)
      p = optax.apply_updates(p, updates)
    ends.append(p)
  chex.assert_trees_all_close(*ends, rtol=1e-6)


@pytest.mark.parametrize("call", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_what_is_passed_to_update_may_be_a_flag(call):
  def update(updates, state, params=None, *, reset):
    assert reset is True  # a traced one could not be branched upon
    return updates, jax.tree.map(lambda x: 0 * x if reset else x, state)

  init = lambda params: jax.tree.map(jnp.ones_like, params)  # noqa: E731
  # optax's own type knows no keyword that must be given.
  rule = optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
  tx = lowmem.offloaded(rule)
  params = {"w": jnp.ones((32, 64))}
  _, state = call(lambda s: tx.update(params, s, params, reset=True))(tx.init(params))
  assert not lowmem.unpaged(state)["w"].any()


def test_random_keys_stay_on_the_device():
  inner = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.adam(LR))
  tx, params = lowmem.offloaded(inner, max_bytes=0), {"w": jnp.ones((32, 64))}
  before = jax.tree.map(jax.typeof, tx.init(params))
  _, state = jax.jit(tx.update)(params, tx.init(params), params)
  assert jax.tree.map(jax.typeof, state) == before
  assert len(pages(state)) == 2


def test_what_is_paged_already_stays_so():
  inner = optax.chain(lowmem.offloaded(optax.adam(LR), where="mu"), optax.trace(0.9))
  plain = optax.chain(optax.adam(LR), optax.trace(0.9))
  params = {"w": jnp.ones((32, 64))}
  for max_bytes in (0, "1MB"):
    tx = lowmem.offloaded(inner, max_bytes=max_bytes)
    state = tx.init(params)
    assert {p.shape for p in pages(state)} == {(32, 64)} and len(pages(state)) == 3
    before = jax.tree.map(jax.typeof, state)
    updates, state = jax.jit(tx.update, donate_argnums=1)(params, state, params)
    assert jax.tree.map(jax.typeof, state) == before
    expected, exact = jax.jit(plain.update)(params, plain.init(params), params)
    chex.assert_trees_all_equal((updates, lowmem.unpaged(state)), (expected, exact))


def test_committed_parameters_compile_once():
  tx = lowmem.offloaded(optax.adamw(LR))
  params = jax.device_put({"w": jnp.ones((64, 96)), "b": jnp.ones(5)}, jax.devices()[0])
  step, state = jax.jit(step_of(tx), donate_argnums=1), tx.init(params)
  for _ in range(3):
    params, state = step(params, state, params)
  assert times_compiled(step) == 1


def test_runs_outside_jit():
  params = tree(0, shapes=FEW)
  tx = lowmem.offloaded(lowmem.adamw(LR))
  updates, state = tx.update(params, tx.init(params), params)
  expected, exact = lowmem.adamw(LR).update(params, lowmem.adamw(LR).init(params), params)
  chex.assert_trees_all_equal((updates, lowmem.unpaged(state)), (expected, exact))
  assert {p.lanes[0].sharding.memory_kind for p in pages(state)} == {"pinned_host"}


def test_tree_utilities_see_the_state():
  tx, params = lowmem.offloaded(optax.adamw(LR)), tree(0, shapes=FEW)
  state = tx.init(params)
  chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, state), state)
  assert set(optax.tree.get(state, "mu")) == set(FEW)
  shaped = jax.eval_shape(tx.init, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(shaped, state)
  assert lowmem.state_bytes(shaped) == lowmem.state_bytes(state)


@pytest.mark.parametrize("rule", ["8 bits", "32 bits"])
def test_trains_an_nnx_model(rule):
  losses, state = trained_nnx(lowmem.offloaded(RULES[rule]()))
  assert losses[-1] < 0.5 * losses[0]
  assert lowmem.state_bytes(state)["pinned_host"] > 10_000


def test_trains_a_linen_state():
  losses, *_ = trained_linen(lowmem.offloaded(lowmem.adamw(LR)))
  assert losses[-1] < 0.5 * losses[0]


# Checkpoints --------------------------------------------------------------------------------------


def test_orbax_restores_to_host_memory_with_and_without_pages(tmp_path):
  ocp = pytest.importorskip("orbax.checkpoint")
  params = tree(0, shapes=FEW)
  inner = lowmem.adamw(LR)
  tx = lowmem.offloaded(inner)
  _, plain = jax.jit(inner.update)(params, inner.init(params), params)
  _, ours = jax.jit(tx.update)(params, tx.init(params), params)
  like = tx.init(params)
  shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "paged", ours)
    checkpointer.save(tmp_path / "plain", plain)
    checkpointer.wait_until_finished()
    same = lowmem.paged(checkpointer.restore(tmp_path / "paged", shapes), like)
    crossed = checkpointer.restore(tmp_path / "plain", lowmem.unpaged(shapes))
  chex.assert_trees_all_equal(same, ours)
  assert jax.tree.map(jax.typeof, same) == jax.tree.map(jax.typeof, ours)
  kinds = {x.sharding.memory_kind for x in jax.tree.leaves(crossed)}
  assert kinds == {"pinned_host", "device"}  # never all on the device
  chex.assert_trees_all_equal(lowmem.paged(crossed, like), ours)
  assert jax.tree.map(jax.typeof, lowmem.paged(crossed, like)) == jax.tree.map(jax.typeof, ours)
  chex.assert_trees_all_equal(lowmem.unpaged(same), plain)


def test_states_of_another_run_are_refused():
  like = lowmem.offloaded(optax.adam(LR)).init(jnp.zeros((64, 64)))
  with pytest.raises(ValueError, match="where `like` has"):
    lowmem.paged(optax.adam(LR).init(jnp.zeros((64, 65))), like)
  with pytest.raises(ValueError, match="`state` has 2 arrays"):
    lowmem.paged(optax.sgd(LR, 0.9).init((jnp.zeros((64, 64)),) * 2), like)


# What is paged ------------------------------------------------------------------------------------


def paths(tx, params):
  found = jax.tree_util.tree_flatten_with_path(tx.init(params), is_leaf=_pages.is_paged)[0]
  return {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, x in found
    if _pages.is_paged(x)
  }


def test_where_min_bytes_and_budget_choose():
  params = {"a": jnp.zeros((64, 64)), "b": jnp.zeros((32, 64)), "c": jnp.zeros(7)}
  tx = optax.adam(LR)
  choose = functools.partial(lowmem.offloaded, tx)
  both = {"0/mu/a", "0/nu/a", "0/mu/b", "0/nu/b"}
  assert paths(choose(), params) == both
  assert paths(choose(min_bytes=16384), params) == {"0/mu/a", "0/nu/a"}
  assert paths(choose(min_bytes=0), params) == both | {"0/mu/c", "0/nu/c"}
  assert paths(choose(where="nu/"), params) == {"0/nu/a", "0/nu/b"}
  assert paths(choose(where=lambda path: path.endswith("a")), params) == {"0/mu/a", "0/nu/a"}
  # 2 x (16384 + 8192 + 28) and a count: the largest goes first, and only as many as must.
  assert paths(choose(device_budget=49_212), params) == set()
  assert paths(choose(device_budget=49_211), params) == {"0/mu/a"}
  assert paths(choose(device_budget="20KB"), params) == {"0/mu/a", "0/nu/a"}
  assert paths(choose(device_budget=0), params) == both


@pytest.mark.parametrize("inner", [optax.adamw(LR), lowmem.adamw(LR), optax.sgd(LR, 0.9)])
def test_large_states_are_made_one_array_at_a_time(inner, monkeypatch):
  """In one trace: one for each array took 37 s for 40 of them."""
  params, traced = tree(0, shapes=FEW), []

  def init(params):
    traced.append(params)
    return inner.init(params)

  made = []
  monkeypatch.setattr(_offloaded, "store", lambda x, axis: made.append(x) or _pages.store(x, axis))
  tx = lowmem.offloaded(optax.GradientTransformation(init, inner.update), max_bytes=0)
  chex.assert_trees_all_equal(lowmem.unpaged(tx.init(params)), inner.init(params))
  assert len(traced) == 1 and len(made) > 1


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"min_bytes": -1}, "`min_bytes` must be an integer"),
    ({"where": "("}, "`where` must be a regular expression"),
    ({"where": b"mu"}, "`where` must be a regular expression"),
    ({"device_budget": "4 parsecs"}, "`device_budget` must be a number of bytes"),
    ({"max_bytes": -3}, "`max_bytes` must be a number of bytes"),
    ({"fallback": "disk"}, "`fallback` must be"),
  ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
  with pytest.raises(ValueError, match=message):
    lowmem.offloaded(optax.adam(LR), **arguments)


def test_a_state_larger_than_the_pool_names_the_variable():
  with pytest.raises(ValueError, match="XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=112"):
    _host.check_pool("gpu", 100 * 10**9, {})
  _host.check_pool("gpu", 100 * 10**9, {"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "112"})
  _host.check_pool("cpu", 100 * 10**9, {})


class _Bare:
  """A device as some plugins have it: one memory. No such backend runs here."""

  platform = "bare"

  class _Memory:
    def __init__(self, kind):
      self.kind = kind

  def __init__(self, process_index=0, kinds=("device",)):
    self.process_index, self._kinds = process_index, kinds

  def addressable_memories(self):
    return [self._Memory(kind) for kind in self._kinds]

  def __str__(self):
    return "bare:0"


def test_a_backend_without_host_memory_is_refused_unless_asked_for():
  with pytest.raises(ValueError, match=r'bare:0 has only device.*fallback="device"'):
    _host.has_host_memory([_Bare()], None)
  assert not _host.has_host_memory([_Bare()], "device")


def test_each_process_asks_a_device_of_its_own_for_host_memory(monkeypatch):
  """XLA gives memories to a process' own GPUs only: every process but the first was refused."""
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  another, own = _Bare(0, ()), _Bare(1, ("device", "pinned_host"))
  assert _host.has_host_memory([another, own], None)


def test_paged_names():
  params = jnp.zeros((64, 64))
  state = lowmem.create("paged_adamw_8bit", LR).init(params)
  chex.assert_trees_all_equal(state, lowmem.offloaded(lowmem.adamw(LR)).init(params))
  state = lowmem.create("paged_adamw_32bit", LR, weight_decay=0.1).init(params)
  assert lowmem.state_bytes(state) == {"device": 4, "pinned_host": 2 * 4 * 64 * 64}


@pytest.mark.parametrize("width", ["32 bits", "8 bits"])
def test_several_runs_under_vmap(width):
  """Compiled too: their rows would be gathered from host memory, which JAX refuses."""
  tx = RULES[width]()
  params = jnp.linspace(-1, 1, 3 * 96 * 64).reshape(3, 96, 64)
  found = []
  for one in (tx, lowmem.offloaded(tx)):
    state = jax.vmap(one.init)(params)
    found.append(jax.jit(jax.vmap(one.update))(params, state, params)[0])
  chex.assert_trees_all_equal(*found)
