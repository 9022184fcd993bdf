"""Packing and buckets: nothing is lost, nothing meets what it should not, nothing is recompiled."""

import doctest
from functools import partial

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optax_lowmem.qlora.data import batches, packing
from optax_lowmem.qlora.data.batches import Batches, Row
from optax_lowmem.qlora.loading.llama import load_llama
from optax_lowmem.qlora.models import attention
from optax_lowmem.qlora.run.recipe import adapted
from optax_lowmem.qlora.run.settings import Settings
from optax_lowmem.qlora.training import step as training
from qlora_cases import save_model


def numbered(lengths):
  """Rows of tokens that say which row they are of, and where in it; all but the first count."""
  return [Row(100 * i + np.arange(n + 1), np.arange(n + 1) > 0) for i, n in enumerate(lengths, 1)]


LENGTHS = [3, 8, 5, 2, 7, 10, 1, 4, 4, 9, 6, 2, 3]


def test_doctests():
  for module in (packing, attention):
    result = doctest.testmod(module)
    assert result.attempted >= 1 and result.failed == 0


@given(st.lists(st.integers(1, 20), max_size=60))
def test_first_fit_decreasing_is_a_partition_that_fits(lengths):
  bins = packing.first_fit_decreasing(lengths, 20)
  assert sorted(i for bin in bins for i in bin) == list(range(len(lengths)))
  loads = [sum(lengths[i] for i in bin) for bin in bins]
  assert all(load <= 20 for load in loads)
  assert sum(load <= 10 for load in loads) <= 1  # two half-empty bins would have been one


def test_a_row_longer_than_a_bin_is_refused():
  with pytest.raises(ValueError, match="length of 21 does not fit into a bin of 20"):
    packing.first_fit_decreasing([3, 21], 20)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 4))
def test_bucket_lengths_pad_least(lengths, count):
  from itertools import combinations

  def padded(buckets):
    return sum(min(b for b in buckets if b >= n) for n in lengths)

  got = packing.bucket_lengths(lengths, count, 40, multiple=8)
  assert len(got) <= count and got[-1] == 40 and got == sorted(set(got))
  every = [(*c, 40) for k in range(count) for c in combinations(range(8, 40, 8), k)]
  assert padded(got) == min(map(padded, every))


class TestPacked:
  def units(self, batch):
    """The packed rows of a batch: their inputs and targets, in order."""
    found = []
    flat = [x.reshape(-1, x.shape[-1]) for x in (batch.inputs, batch.targets, batch.segments)]
    for inputs, targets, segments in zip(*flat, strict=True):
      for number in range(1, segments.max() + 1):
        found.append((inputs[segments == number].tolist(), targets[segments == number].tolist()))
    return found

  def test_no_token_is_lost_and_no_target_crosses(self):
    rows = numbered(LENGTHS)
    stream = Batches(rows, 2, 1, 16, 0, seed=1, packing=True)
    seen, epochs = [], 3
    for step in range(9):
      batch = stream.at(step)
      assert batch.inputs.shape == (1, 2, 16)
      seen += self.units(batch)
      assert (batch.lengths == (batch.segments > 0).sum(-1)).all()
      assert (batch.learned <= (batch.segments > 0)).all()
      for positions, segments in zip(batch.positions[0], batch.segments[0], strict=True):
        for number in range(1, segments.max() + 1):
          where = positions[segments == number]
          assert where.tolist() == list(range(len(where)))
    whole = [(row.ids[:-1].tolist(), row.ids[1:].tolist()) for row in rows]
    for epoch in range(epochs - 1):
      assert sorted(seen[epoch * 13 : epoch * 13 + 13]) == whole
    packed = np.concatenate([stream.at(step).lengths.ravel() for step in range(4)])
    assert packed.mean() > 12  # of 16; 4.9 without packing

  def test_a_batch_depends_on_seed_and_step_only(self):
    make = partial(Batches, numbered(LENGTHS), 2, 1, 16, 0, packing=True)
    one = make(seed=1)
    for step in (7, 0, 9, 3):
      for a, b in zip(one.at(step), make(seed=1).at(step), strict=True):
        assert a.tobytes() == b.tobytes()
    assert (one.at(0).inputs != make(seed=2).at(0).inputs).any()

  def test_once_holds_every_row_once(self):
    rows = numbered(LENGTHS)
    whole = [(row.ids[:-1].tolist(), row.ids[1:].tolist()) for row in rows]
    found = Batches(rows, 3, 2, 16, 0, 1, packing=True).once(rows)
    assert sorted(unit for batch in found for unit in self.units(batch)) == whole


class TestBuckets:
  def make(self, seed=1, count=3):
    return Batches(numbered(LENGTHS * 5), 2, 1, 16, 0, seed=seed, buckets=count)

  def test_an_epoch_holds_every_row_once(self):
    stream = self.make()
    stream.lengths = [4, 8, 16]
    firsts = []
    for step in range(2 * 33):
      batch = stream.at(step)
      assert batch.inputs.shape[-1] in stream.lengths
      longest = batch.lengths.max()
      assert batch.inputs.shape[-1] == min(n for n in stream.lengths if n >= longest)
      firsts += batch.inputs[..., 0][batch.lengths > 0].tolist()
    every = [100 * i for i in range(1, 66)]
    assert sorted(firsts[:65]) == sorted(firsts[65:]) == every
    assert firsts[:65] != firsts[65:]

  def test_a_batch_depends_on_seed_and_step_only(self):
    one = self.make()
    for step in (40, 0, 33, 7):
      assert one.at(step).inputs.tobytes() == self.make().at(step).inputs.tobytes()
    assert any((one.at(i).inputs != self.make(2).at(i).inputs).any() for i in range(3))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """Model, optimizer and rows of 6 to 60 tokens, the last half of each learned."""
  folder = save_model(tmp_path_factory.mktemp("tiny") / "model")
  rng = np.random.default_rng(0)
  lengths = [6, 11, 7, 60, 33, 9, 14, 21, 8, 12]
  rows = [Row(rng.integers(0, 270, n).astype(np.int32), np.arange(n) > n // 2) for n in lengths]
  model = adapted(load_llama(folder), Settings(rank=4))
  tx = optax.sgd(1.0)
  return *training.split(model, tx.init), tx, rows


def test_packed_rows_give_the_loss_and_gradient_of_padded_ones(tiny):
  graph, state, frozen, tx, rows = tiny
  size = len(rows)
  padded = batches.pad(rows, size, 64, 0)
  groups = [
    [rows[i] for i in g] for g in packing.first_fit_decreasing([len(r.ids) for r in rows], 96)
  ]
  packed = batches.pack(groups, len(groups), 96, 0)
  assert packed.learned.sum() == padded.learned.sum() and len(groups) < size / 2
  step = jax.jit(partial(training.train_step, graph, tx))
  found = [
    step(state, frozen, jax.tree.map(lambda x: x[None], batch)) for batch in (padded, packed)
  ]
  (one, measured), (other, measured_packed) = found
  assert float(measured_packed["loss"]) == pytest.approx(float(measured["loss"]), rel=1e-5)
  for a, b in zip(jax.tree.leaves(one.trained), jax.tree.leaves(other.trained), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_one_program_a_bucket(tiny):
  graph, state, frozen, tx, rows = tiny
  stream = Batches(rows, 2, 1, 64, 0, 0, buckets=2)
  assert len(stream.lengths) == 2
  compiled = []

  def listener(event, duration_secs, **_):
    if "backend_compile" in event:
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    train = training.Steps(partial(training.train_step, graph, tx))
    state = jax.tree.map(lambda x: x.copy(), state)  # the step takes it
    shapes = set()
    for step in range(len(rows)):  # two epochs
      batch = stream.at(step)
      before = len(compiled)
      state, _ = train(state, frozen, batch)
      assert (len(compiled) > before) == (batch.inputs.shape not in shapes)
      shapes.add(batch.inputs.shape)
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
  assert len(shapes) == len(train.programs) == 2
  assert train.temporaries() > 0
