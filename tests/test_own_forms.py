"""Codebooks and storages that a user writes outside of the package, by its public names alone.

That their states survive pickle, flax and Orbax is in test_checkpoints.py ("one's own").
"""

import dataclasses
import pickle
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from programs import temporaries_of

PARAMS = {"w": jnp.ones((64, 128)), "b": jnp.ones(64)}


class Powers(lowmem.Codebook):
  """±1.1^-k in 8 bits, 1.7^-k in 4: no zero, so that second moments stay positive."""

  @property
  def _base(self):
    return 1.1 if self.bits == 8 else 1.7

  @property
  def _most(self):
    return 2 ** (self.bits - self.signed) - 1

  def encode(self, r):
    k = jnp.round(-jnp.log(jnp.maximum(jnp.abs(r), 1e-30)) / np.log(self._base))
    k = jnp.clip(k, 0, self._most) + (self._most + 1) * (r < 0)
    return k.astype(jnp.uint8)

  def decode(self, codes):
    k = (codes & self._most).astype(jnp.float32)
    size = jnp.exp(-k * np.log(self._base))
    return jnp.where(codes > self._most, -size, size)


def adam(bits: Any, min_size=4096):
  storage = {
    "mu": lowmem.Blockwise(Powers(f"powers{bits}", bits, True), 64, min_size),
    "nu": lowmem.Blockwise(Powers(f"powers{bits}u", bits, False), 64, min_size),
  }
  return lowmem.quantized(optax.adam(1e-2), storage=storage)


def steps(tx: Any, count: int = 4) -> tuple[Any, Any]:
  state, update, updates = tx.init(PARAMS), jax.jit(tx.update), None
  for k in range(count):
    normal = np.random.default_rng(k).standard_normal
    grads = jax.tree.map(lambda p: jnp.asarray(normal(p.shape), jnp.float32), PARAMS)  # noqa: B023
    updates, state = update(grads, state, PARAMS)
  return updates, state


@pytest.mark.parametrize(("bits", "error"), [(8, 0.06), (4, 0.3)])
def test_adam_in_codebooks_of_ones_own(bits, error):
  tx = adam(bits)
  updates, state = steps(tx)
  assert isinstance(state[0].mu["w"], lowmem.QuantizedArray)
  assert state[0].nu["w"].codebook.name == f"powers{bits}u"
  assert (state[0].nu["w"].dequantize() > 0).all()
  expected, _ = steps(optax.adam(1e-2))
  for x, y in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
    assert np.abs(x - y).mean() <= error * np.abs(y).mean()
  again, goes_on = pickle.loads(pickle.dumps(state)), jax.jit(tx.update)
  chex.assert_trees_all_equal(*(goes_on(PARAMS, s, PARAMS) for s in (state, again)))


@pytest.mark.parametrize("bits", [8, 4])
def test_memory(bits):
  """As of the library's own, but that XLA holds the values of a tile: 0.111 and 0.119 B/param."""
  many = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
  tx = adam(bits)
  state = jax.eval_shape(tx.init, many)
  assert sum(lowmem.state_bytes(state).values()) / many.size <= 2 * (bits / 8 + 4 / 64) + 0.001
  update = jax.jit(tx.update, donate_argnums=(0, 1)).lower(many, state, many)
  assert temporaries_of(update.compile()) / many.size <= 0.12


@pytest.mark.parametrize("bits", [8, 4])
def test_storing_what_was_loaded_changes_nothing(bits):
  storage: Any = lowmem.Blockwise(Powers("powers", bits, True), 64, 0)
  once = storage.store(jnp.asarray(np.random.default_rng(0).standard_t(2, (32, 128)), jnp.float32))
  chex.assert_trees_all_equal(storage.store(storage.load(once)), once)


# Storages -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ByRank:
  """Matrices in 4 bits, everything else in bfloat16."""

  def store(self, x):
    if x.ndim < 2:
      return x.astype(jnp.bfloat16)
    return lowmem.Blockwise("power4", 64, 0).store(x)

  def load(self, stored):
    return lowmem.dequantized(stored).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Root:
  """Arithmetic around a dtype: what the update does not do."""

  def store(self, x):
    return jnp.sqrt(x).astype(jnp.bfloat16)

  def load(self, stored):
    return jnp.square(stored.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Halved(ByRank):
  def load(self, stored):
    return super().load(stored) / 2


@dataclasses.dataclass(frozen=True)
class Pair(ByRank):
  def store(self, x):
    return x, x


def test_a_storage_of_ones_own_chooses_the_form():
  tx = lowmem.quantized(optax.sgd(0.1, momentum=0.9), storage={"trace": ByRank()})
  _, state = steps(tx)
  trace: Any = state[0].trace
  assert trace["w"].codebook.bits == 4 and trace["b"].dtype == jnp.bfloat16
  _, expected = steps(lowmem.quantized(optax.sgd(0.1, momentum=0.9), 4, min_size=4096))
  chex.assert_trees_all_equal(trace["w"], expected[0].trace["w"])
  pickled = pickle.loads(pickle.dumps(state))
  chex.assert_trees_all_equal(pickled, state)


@pytest.mark.parametrize("storage", [Root(), Halved()])
def test_a_storage_with_arithmetic_that_updates_would_leave_out_is_refused(storage):
  """Updates read a stored array by its form: its codebook, blocks and dtype."""
  with pytest.raises(ValueError, match=r"'nu'.*by its form alone.*`Codebook`"):
    lowmem.quantized(optax.adam(1e-3), storage={"nu": storage})


def test_a_storage_that_makes_something_else_is_refused():
  with pytest.raises(TypeError, match=r"'nu'.*an array or a `QuantizedArray`, got a tuple"):
    lowmem.quantized(optax.adam(1e-3), storage={"nu": Pair()})
