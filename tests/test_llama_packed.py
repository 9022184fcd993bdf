"""Several sequences in one row of the example's Llama: each must come out as it would alone."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optax_lowmem import nn
from optax_lowmem.qlora.loading.llama import Llama
from optax_lowmem.qlora.models import attention
from optax_lowmem.qlora.models.llama_config import LlamaConfig

CONFIG = LlamaConfig(64, 32, 48, 3, 4, 2, 8)
LENGTHS = ((5, 9, 1), (7, 4, 3))  # sequences of each row; what is left of 17 is padding
TIME = 17


@nnx.jit
def logits_of(model, ids, positions=None, segments=None, lengths=None):
  return model(ids, positions=positions, segments=segments, lengths=lengths)


@pytest.fixture(scope="module")
def model():
  # Weights 4 times the usual size: with small ones, attention is nearly uniform and hides errors.
  model = Llama(CONFIG, rngs=nnx.Rngs(0))
  kernels = nnx.state(model.model.layers.self_attn, nnx.Param)
  nnx.update(model.model.layers.self_attn, jax.tree.map(lambda w: 4 * w, kernels))
  return model


def packed():
  ids = np.array(jax.random.randint(jax.random.key(0), (2, TIME), 0, 64))
  segments, positions = np.zeros((2, TIME), np.int32), np.zeros((2, TIME), np.int32)
  for row, lengths in enumerate(LENGTHS):
    for i, (start, n) in enumerate(zip(np.cumsum((0, *lengths)), lengths, strict=False)):
      segments[row, start : start + n], positions[row, start : start + n] = i + 1, np.arange(n)
  return ids, positions, segments


def test_packed_sequences_are_as_they_are_alone(model):
  ids, positions, segments = packed()
  together = logits_of(model, ids, positions, segments)
  assert np.isfinite(together).all()
  for row, segment in {(r, s) for r in (0, 1) for s in (1, 2, 3)}:
    mine = segments[row] == segment
    alone = logits_of(model, ids[row, mine][None])[0]
    np.testing.assert_allclose(together[row, mine], alone, rtol=0, atol=1e-5)
  # The comparison can fail: without the mask, or with positions that run on.
  assert np.abs(logits_of(model, ids, positions) - together)[segments > 1].max() > 0.1
  running = np.arange(TIME)[None] * 2
  assert np.abs(logits_of(model, ids, running, segments) - together).max() > 0.1


def test_positions_default_to_those_of_each_segment(model):
  ids, positions, segments = packed()
  np.testing.assert_array_equal(
    np.where(segments, attention.positions_in_segments(jnp.asarray(segments)), 0), positions
  )
  given, default = logits_of(model, ids, positions, segments), logits_of(model, ids, None, segments)
  np.testing.assert_array_equal(given[segments > 0], default[segments > 0])


def test_lengths_are_segments_of_one_and_nought(model):
  ids, _, _ = packed()
  lengths = jnp.array([11, 17])
  segments = (np.arange(TIME) < lengths[:, None]).astype(np.int32)
  np.testing.assert_array_equal(
    logits_of(model, ids, lengths=lengths), logits_of(model, ids, segments=segments)
  )


@pytest.mark.parametrize("quantize", [False, True])
def test_no_gradient_crosses_a_segment(model, quantize):
  # Each segment has its own token ids, so that a row of the table belongs to one segment.
  _, positions, segments = packed()
  ids = np.arange(2 * TIME).reshape(2, TIME)
  if quantize:
    model = nn.quantize_model(nnx.clone(model))
  graph, table, rest = nnx.split(model, nnx.PathContains("embed_tokens"), ...)

  @jax.jit
  @jax.grad
  def slope(table, chosen):
    hidden = nnx.merge(graph, table, rest).hidden(ids, positions=positions, segments=segments)
    return jnp.where(chosen[..., None], hidden, 0.0).sum()

  for segment in (1, 2, 3, 0):
    (gradient,) = jax.tree.leaves(slope(table, segments == segment))
    size = np.abs(gradient).sum(axis=1)[: 2 * TIME].reshape(2, TIME)
    assert (size[segments != segment] == 0.0).all()
    assert (size[segments == segment] > 0.0).all()


def test_arguments_that_contradict_each_other(model):
  ids, positions, segments = packed()
  with pytest.raises(ValueError, match="`segments` and `lengths` were both given"):
    model(ids, segments=segments, lengths=jnp.array([3, 4]))
  with pytest.raises(ValueError, match=r"`segments` must have the shape of `input_ids`, \(2, 17\)"):
    model(ids, segments=segments[:1])
  with pytest.raises(ValueError, match=r"`positions` must be of shape \(2, 17\) or \(1, 17\)"):
    model(ids, positions=positions[0])


def test_examples_in_docstrings():
  failed, attempted = doctest.testmod(attention, extraglobs={"jnp": jnp})
  assert attempted > 0 and failed == 0
