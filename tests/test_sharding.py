"""Sharded parameters: the same bits as unsharded ones, and nothing is exchanged.

What needs eight devices runs in processes of their own, one for each kind of mesh: this file.
"""

import contextlib
import functools
import sys
import tempfile
import warnings
from typing import Any, cast
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_lowmem as lowmem
import own_process
from optax_lowmem._paging import offloaded as _offloaded
from optax_lowmem._programs.phases import in_phases
from optax_lowmem._sharding.layout import divide
from optax_lowmem._sharding.shards import with_automatic_sharding
from optax_lowmem._state.moments import is_quantized
from optax_lowmem._update import tile_loop as _stream
from programs import statistics_of, times_compiled
from registry import REGISTRY, by_rows, make

RULES = {
  "adamw": lowmem.adamw(1e-2),
  "adamw_4bit": lowmem.adamw(1e-2, bits=4),
  "lion": lowmem.lion(1e-2),  # its update is made inside the tile loop
  "momentum": lowmem.sgd(1e-2, momentum=0.9),
  "partly": lowmem.adamw(1e-2, quantize_mask={"w": True, "dense": False}),
  "tables": lowmem.quantized(
    optax.adam(1e-2), storage={"mu": lowmem.Blockwise("dynamic"), "nu": lowmem.Blockwise("log8")}
  ),
}
NORMED = {
  "came": lowmem.came(1e-2),
  "adafactor": lowmem.adafactor(1e-2, momentum=0.9, min_dim_size_to_factor=32),
  "by_layer": lowmem.adafactor(1e-2, min_dim_size_to_factor=32, last_two_axes=True),
  "lamb": lowmem.lamb(1e-2),
  "lars": lowmem.lars(1e-2),
}
ONE, TWO = {"a": 8}, {"a": 4, "b": 2}
# rule, mesh, shape, spec, dtype, shards of the state. Shards are large enough for a tile loop too:
# between a loop and none, XLA may contract other products and sums, and a code in 10^5 may differ.
CASES = [
  ("adamw", ONE, (512, 128), P("a"), "float32", 8),
  ("adamw", TWO, (128, 512), P("a", "b"), "bfloat16", 8),
  ("adamw", TWO, (8, 32, 256), P("b", None, "a"), "float32", 8),
  ("adamw", ONE, (4096, 16), P("a"), "float32", 8),  # blocks of several rows
  ("adamw_4bit", ONE, (64, 1024), P(None, "a"), "float32", 8),
  ("lion", ONE, (64, 1024), P(None, "a"), "float32", 8),
  ("lion", TWO, (8, 64, 128), P(None, "a", "b"), "float32", 8),
  ("momentum", TWO, (256, 256), P(("b", "a")), "bfloat16", 8),
  ("momentum", TWO, (8, 64, 128), P("a"), "float32", 4),  # the same along "b"
  ("partly", TWO, (256, 256), P("b", "a"), "float32", 8),
  ("tables", TWO, (128, 512), P("a", "b"), "float32", 8),
]
# Cut through their blocks: state lies along another axis, and gradients and updates move.
STRADDLING = [
  ("adamw", ONE, (512, 256), P(None, "a"), "float32", 8),
  ("lion", ONE, (4096, 16), P(None, "a"), "float32", 8),
  ("momentum", TWO, (8, 64, 128), P(None, "b", "a"), "float32", 8),
  ("momentum", ONE, (80_000,), P("a"), "float32", 1),  # no axis is left: the same on all devices
]


def test_axes_that_would_cut_blocks_move_to_others():
  sizes = {"a": 4, "b": 2}
  assert divide((8, 8), P("a", "b"), sizes) == P("a", "b")
  assert divide((8, 2), P(None, ("b", "a")), sizes) == P("a", "b")
  assert divide((8, 1), P("b", "a"), sizes) == P(("b", "a"), None)
  assert divide((6, 1), P("b", "a"), sizes) == P("b", None)


@pytest.mark.parametrize(
  ("kind", "every"),
  [
    pytest.param("Explicit", 0, id="quick"),
    ("Auto", 3),
    ("Explicit", 3),
    pytest.param("Auto", 1, marks=pytest.mark.slow),
    pytest.param("Explicit", 1, marks=pytest.mark.slow),
  ],
)
def test_on_eight_devices(kind, every):
  own_process.printed(__file__, kind, every)


# In the processes of eight devices ----------------------------------------------------------------


def mesh_of(axes, kind):
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def shardings(tree):
  return [x.sharding for x in jax.tree.leaves(tree)]


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def known_shardings(tx, state, params):
  """By `state_shardings`; they are those of the state."""
  known = lowmem.state_shardings(tx, params, jax.tree.map(lambda x: x.sharding, params))
  for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(known), strict=True):
    assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)
    assert x.sharding.memory_kind == sharding.memory_kind
  return known


def arrays(name, shape, dtype):
  """Parameters, a gradient, and where it starts."""
  keys = jax.random.split(jax.random.key(0), 2)
  fields = ("w", "dense") if name == "partly" else ("w",)
  return [{f: jax.random.normal(key, shape).astype(dtype) for f in fields} for key in keys]


def two_steps(tx, params, grads):
  """States and updates of two steps, and the compiled update."""
  update = jax.jit(lambda *args: tx.update(*args))
  states, updates = [tx.init(params)], []
  for _ in range(2):
    new, state = update(grads, states[-1], params)
    states.append(state)
    updates.append(new)
  return states, updates, update


def check(kind, name, axes, shape, spec, dtype, shards):
  tx, plain = RULES[name], arrays(name, shape, dtype)
  expected = two_steps(tx, *plain)[:2]
  mesh = mesh_of(axes, kind)
  params, grads = jax.device_put(plain, NamedSharding(mesh, spec))
  states, updates, update = two_steps(tx, params, grads)
  # XLA may divide by a scalar or multiply by its inverse, once there are several leaves, and does
  # so with optax's own rules too. What is stored does not depend on it.
  for new, old in zip(updates, expected[1], strict=True):
    np.testing.assert_allclose(new.pop("dense", 0), old.pop("dense", 0), rtol=1e-6)
  assert_same_bits((states, updates), expected)
  for state in states[1:]:
    for x, y in zip(shardings(state), shardings(states[0]), strict=True):
      assert x == y, (x, y)
  for x in jax.tree.leaves(updates):
    assert x.sharding.is_equivalent_to(grads["w"].sharding, x.ndim)
  assert times_compiled(update) == 1
  for x in jax.tree.leaves(states[0]):
    if x.ndim:
      assert x.addressable_shards[0].data.size * shards == x.size
  known = known_shardings(tx, states[0], params)
  made = jax.jit(tx.init, out_shardings=known)(params)
  assert shardings(made) == jax.tree.leaves(known)
  assert_same_bits(made, states[0])
  compiled = update.lower(grads, states[0], params).compile()
  return states[0], params, tx, own_process.moves_of(compiled)


def check_cases(kind, every):
  for case in CASES[::every]:
    print(*case, flush=True)
    state, params, tx, moves = check(kind, *case)
    assert not moves, moves
    with jax.set_mesh(jax.tree.leaves(params)[0].sharding.mesh):
      made = jax.jit(tx.init)(params)
    for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(state), strict=True):
      assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)
  for case in STRADDLING[::every]:
    print(*case, flush=True)
    check(kind, *case)


def check_memory(kind):
  """The law of the peak, on each device."""
  mesh = mesh_of(TWO, kind)
  for name in ("adamw", "lion"):
    tx = RULES[name]
    with jax.set_mesh(mesh):
      sharding = NamedSharding(mesh, P("b", "a"))
      p = {"w": jax.ShapeDtypeStruct((8192, 4096), jnp.float32, sharding=sharding)}
      init = jax.jit(tx.init).lower(p).compile()
      state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, p),
        init.output_shardings,
      )
      compiled = jax.jit(tx.update, donate_argnums=1).lower(p, state, p).compile()
    held = sum(
      np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state)
    )
    memory, count = statistics_of(compiled), 8192 * 4096 / 8
    assert memory.temp_size_in_bytes / count <= 0.1
    assert memory.alias_size_in_bytes >= 0.999 * held  # the new state lies where the old one was
    assert held / count <= 2.13
    assert not own_process.moves_of(compiled)


def check_transformations(kind):
  """`vmap`, `scan` and `grad` see through it, the last where nothing stored depends on it."""
  tx, (params, grads) = RULES["adamw"], arrays("", (4, 256, 256), jnp.float32)

  def one(p, g):
    _, state = tx.update(g, tx.init(p), p)
    return tx.update(g, state, p)

  def scan(p, g):
    return jax.lax.scan(lambda carry, x: (carry, one(*x)), None, (p, g))[1]

  def loss(p, g):
    updates: Any = tx.update(g, tx.init(p), p)[0]
    return (updates["w"] ** 2).sum()

  mesh = mesh_of(TWO, kind)
  with jax.set_mesh(mesh):
    args = jax.device_put((params, grads), NamedSharding(mesh, P(None, "a", "b")))
    results = [jax.jit(fn)(*args) for fn in (jax.vmap(one), scan, jax.grad(loss))]
    with pytest.raises(TypeError, match="stored in 8 or 4 bits"):
      jax.jit(jax.grad(loss, 1))(*args)
  expected = [jax.jit(fn)(params, grads) for fn in (jax.vmap(one), scan, jax.grad(loss))]
  assert_same_bits(results, expected)


def check_rules_on_whole_arrays(kind):
  tx, (params, grads) = lowmem.quantized(optax.lamb(1e-2)), arrays("", (512, 128), jnp.float32)
  expected = two_steps(tx, params, grads)[:2]
  args = jax.device_put((params, grads), NamedSharding(mesh_of(ONE, kind), P("a")))
  states, updates, _ = two_steps(tx, *args)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), updates, expected[1])
  assert [s.is_fully_replicated for s in shardings(states[2])] == [True, *[False] * 4]


def check_norms(kind, every):
  """Means cross the devices, so a last bit may differ; what has an axis lies where it lies."""
  cases = (
    (ONE, (512, 128), P("a")),
    (TWO, (128, 512), P("a", "b")),
    (TWO, (8, 64, 512), P("b", None, "a")),
  )
  for name, tx in NORMED.items():
    for axes, shape, spec in cases[::every]:
      print(name, shape, spec, flush=True)
      params, grads = arrays(name, shape, "float32")
      expected = two_steps(tx, params, grads)[1]
      mesh = mesh_of(axes, kind)
      args = jax.device_put((params, grads), NamedSharding(mesh, spec))
      states, updates, update = two_steps(tx, *args)
      known_shardings(tx, states[0], args[0])
      for ours, exact in zip(updates, expected, strict=True):
        error = np.abs(np.asarray(ours["w"]) - np.asarray(exact["w"])).mean()
        assert error <= 1e-3 * np.abs(np.asarray(exact["w"])).mean(), error
      assert times_compiled(update) == 1
      with jax.set_mesh(mesh):
        where = jax.tree.map(lambda x: x.sharding, states[0])
        made = jax.jit(tx.init, out_shardings=where)(args[0])
      update(args[1], update(args[1], made, args[0])[1], args[0])
      assert times_compiled(update) == 1  # it is 2 after jit(tx.init) in automatic mode
      parts = [axes[spec[i]] if i < len(spec) and spec[i] else 1 for i in range(len(shape))]
      for state in states:
        for q in jax.tree.leaves(state, is_leaf=is_quantized):
          if is_quantized(q):
            assert q.codes.addressable_shards[0].data.size * 8 == q.codes.size
        for field, axis in (("v_row", -1), ("v_col", -2)):
          for x in jax.tree.leaves(optax.tree.get(state, field)):
            k = [k for k in range(len(shape)) if np.delete(shape, k).tolist() == list(x.shape)]
            assert k, (name, field, x.shape)
            kept = np.prod(np.delete(parts, k[0] if len(k) == 1 else axis))
            assert x.addressable_shards[0].data.size * kept == x.size, (field, x.sharding)


def check_phases(kind):
  """What GPUs compute of rules that take norms, on shards: the same numbers, where they lay."""
  mesh, spec = mesh_of(TWO, kind), P("a", "b")
  for name in ("came", "lamb", "adafactor"):
    print("phases", name, flush=True)
    tx = NORMED[name]

    @jax.jit
    def update(grads, state, params, tx=tx):
      args = grads, state, params
      return with_automatic_sharding(functools.partial(in_phases, tx.update), args, args[:2])

    params, grads = arrays(name, (128, 512), "float32")
    expected, new = update(grads, tx.init(params), params)
    params, grads = jax.device_put((params, grads), NamedSharding(mesh, spec))
    state = tx.init(params)
    updates, after = update(grads, state, params)
    error = np.abs(np.asarray(updates["w"]) - np.asarray(expected["w"])).mean()
    assert error <= 1e-4 * np.abs(np.asarray(expected["w"])).mean(), error
    for ours, exact in zip(*map(quantized_in, (after, new)), strict=True):
      np.testing.assert_array_less(np.mean(ours.codes != exact.codes), 2e-3)
      assert ours.codes.addressable_shards[0].data.size * 8 == ours.codes.size
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
      assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)


def check_dense(kind):
  """Below `min_size`: arrays that are not quantized keep their sharding, too."""
  rules = {name: make(name) for name in REGISTRY}
  rules["radam"] = lowmem.quantized(optax.radam(1e-2))
  rules["optimistic"] = lowmem.quantized(optax.optimistic_gradient_descent(1e-2))
  mesh, plain = mesh_of(ONE, kind), arrays("", (2, 8, 4), "float16")
  with jax.set_mesh(mesh):
    params, grads = jax.device_put(plain, NamedSharding(mesh, P(None, "a")))
    for name, tx in rules.items():
      print("dense", name, flush=True)
      state = tx.init(params)
      new = jax.eval_shape(tx.update, grads, state, params)
      if kind is AxisType.Explicit:  # of which alone it names the axes
        before = jax.tree.map(jax.typeof, (grads, state))
        assert jax.tree.map(_type, new) == jax.tree.map(_type, before)
  for name in ("adagrad-8", "adan-8", "radam", "optimistic"):
    expected = two_steps(rules[name], *plain)[1]
    for ours, exact in zip(two_steps(rules[name], params, grads)[1], expected, strict=True):
      np.testing.assert_allclose(ours["w"], exact["w"], rtol=2e-3)  # a last bit of a float16


def _type(x):
  return x.shape, x.dtype, tuple(x.sharding.spec if x.sharding else ())


def quantized_in(state):
  return [x for x in jax.tree.leaves(state, is_leaf=is_quantized) if is_quantized(x)]


def check_offloaded(kind):
  """Pages lie as what they hold does, and come back as they were."""
  for name, spec in (("adamw", P("a")), ("adamw_4bit", P("a")), ("lion", P("a"))):
    print("offloaded", name, flush=True)
    params, grads = arrays(name, (512, 128), "float32")
    args = jax.device_put((params, grads), NamedSharding(mesh_of(ONE, kind), spec))
    plain, expected, _ = two_steps(RULES[name], *args)
    tx = lowmem.offloaded(RULES[name], min_bytes=64, max_bytes=0)
    states, updates, update = two_steps(tx, *args)
    known_shardings(tx, states[0], args[0])
    assert times_compiled(update) == 1
    for ours, exact in zip(updates, expected, strict=True):
      np.testing.assert_array_equal(ours["w"], exact["w"])
    for ours, exact in zip(states, plain, strict=True):
      assert lowmem.state_bytes(ours)["pinned_host"] > 0.8 * lowmem.state_bytes(exact)["device"]
      for x, y in zip(jax.tree.leaves(lowmem.unpaged(ours)), jax.tree.leaves(exact), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
  # The pool of pinned memory holds each device's copy.
  sizes = []
  with mock.patch.object(_offloaded, "check_pool", lambda _, size, __: sizes.append(size)):
    for spec in (P(), P("a")):
      x = jax.device_put(params["w"], NamedSharding(mesh_of(ONE, kind), spec))
      state = lowmem.offloaded(optax.adam(1e-2)).init({"w": x})
      assert sizes.pop() == lowmem.state_bytes(state)["pinned_host"]
  if kind is AxisType.Explicit:  # the budget is that of one device in a traced `init` too
    tx = lowmem.offloaded(optax.adam(1e-2), device_budget=2 * x.nbytes // 8)
    with jax.set_mesh(x.sharding.mesh):  # else jax 0.12 forgets how zeros of this shape would lie
      shaped = jax.eval_shape(tx.init, x)
    assert jax.tree.structure(shaped) == jax.tree.structure(tx.init(x))


def check_pages_cut_in_blocks(kind):
  """Of masters, which lie as parameters, beside moments that cannot; as a GPU runs it, too."""
  tx = lowmem.master_weights(lowmem.adamw(1e-2, min_size=64))
  params, grads = arrays("", (64, 4), "bfloat16")  # four blocks, and eight devices
  args = jax.device_put((params, grads), NamedSharding(mesh_of(ONE, kind), P("a")))
  plain, expected, _ = two_steps(tx, *args)
  paged = lowmem.offloaded(tx, min_bytes=0, max_bytes=0)
  for way in (contextlib.nullcontext, by_rows) if kind is AxisType.Explicit else (by_rows,):
    with way():
      states, updates, _ = two_steps(paged, *args)
    assert shardings(states[2]) == shardings(states[0])
    ours, exact = cast(Any, (lowmem.unpaged(states[2]), plain[2]))
    assert_same_bits((ours.inner_state, updates), (exact.inner_state, expected))
    # The last bit of a master may be another: other products and sums are contracted.
    off = ours.remainder["w"] - exact.remainder["w"]
    assert np.abs(off).max() <= 1
    assert (off != 0).mean() < 0.05


def check_quantize(kind):
  """By tables too, which lie on no mesh, and of scales whose blocks shards would cut."""
  x = jnp.sin(jnp.arange(64 * 1024.0)).reshape(64, 1024)
  forms: Any = [("nf4", P("a"), True), ("dynamic", P("a", "b"), True), ("fp4", P(None, "b"), False)]
  for codebook, spec, double in forms:
    sharded = jax.device_put(x, NamedSharding(mesh_of(TWO, kind), spec))
    q = lowmem.quantize(sharded, codebook, 64, double)
    exact = lowmem.quantize(x, codebook, 64, double)
    assert_same_bits((q, q.dequantize()), (exact, exact.dequantize()))
    assert q.codes.sharding.is_equivalent_to(sharded.sharding, 2)
    assert q.dequantize().sharding.is_equivalent_to(sharded.sharding, 2)


def check_conversions(kind):
  """Of a factor whose blocks are of several rows: JAX reshapes no such array on explicit axes."""
  params, grads = arrays("", (512, 16), "float32")
  new, rules = RULES["adamw_4bit"], (RULES["adamw"], RULES["adamw_4bit"])
  for spec in (P("a"), P(None, "a")):
    sharded = jax.device_put((params, grads), NamedSharding(mesh_of(ONE, kind), spec))
    for old in rules:
      found = []
      for p, g in ((params, grads), sharded):
        state = jax.jit(old.update)(g, old.init(p), p)[1]
        converted = lowmem.convert_state(state, old, new, p)
        found.append((lowmem.dequantized(state), converted))
      assert_same_bits(*found)
      for x, y in zip(jax.tree.leaves(converted), jax.tree.leaves(new.init(p)), strict=True):
        assert x.ndim == 0 or x.sharding.is_equivalent_to(y.sharding, x.ndim)


def check_injected(kind):
  """Updated outside of `jit`, on the mesh of the context, on which injected numbers lie then."""
  mesh = mesh_of(ONE, kind)
  params, grads = jax.device_put(arrays("", (128, 256), "float32"), NamedSharding(mesh, P("a")))
  tx = optax.inject_hyperparams(lambda learning_rate: lowmem.adamw(learning_rate))(1e-2)
  with jax.set_mesh(mesh), warnings.catch_warnings():
    warnings.filterwarnings("ignore", ".*makes the optimizer anew")
    state = tx.init(params)
    assert_same_bits(
      tx.update(grads, state, params)[0], jax.jit(tx.update)(grads, state, params)[0]
    )


def check_checkpoints(kind):
  """Saved on one mesh, restored to another one, from device or host memory."""
  for name in ("adamw", "adamw_4bit", "came", "lamb"):
    rule = (RULES | NORMED)[name]
    for tx in (rule, lowmem.offloaded(rule)):
      states = []
      for axes, spec in ((ONE, P("a")), (TWO, P("b", "a"))):
        sharding = NamedSharding(mesh_of(axes, kind), spec)
        params, grads = jax.device_put(arrays(name, (256, 512), "float32"), sharding)
        states.append(jax.jit(lambda *x, tx=tx: tx.update(*x))(grads, tx.init(params), params)[1])
      state, like = states
      template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
      )
      with tempfile.TemporaryDirectory() as path, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{path}/state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(f"{path}/state", template)
      assert shardings(restored) == shardings(like), name
      assert_same_bits(restored, state)


if __name__ == "__main__":
  assert jax.device_count() == 8
  kind, every = AxisType[sys.argv[1]], int(sys.argv[2])
  check_memory(kind)
  whole = every > 0
  every = every or len(CASES)  # the first of them
  _stream.WHOLE, _stream._SMALLEST = 1 << 12, 1 << 11  # small arrays are to be walked in tiles
  check_cases(kind, every)
  check_offloaded(kind)
  check_pages_cut_in_blocks(kind)
  check_conversions(kind)
  check_quantize(kind)
  if whole:
    check_transformations(kind)
    check_phases(kind)
    check_rules_on_whole_arrays(kind)
    check_norms(kind, every)
    check_dense(kind)
    check_checkpoints(kind)
    check_injected(kind)
