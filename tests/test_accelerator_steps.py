"""What accumulation and loss scaling cost, compiled for an H100 that is not here."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_lowmem as lowmem
from compiled import compile_for, missing
from compiled.steps import parameters, training_step

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"not installed: {missing()}")
MATRICES, WIDTH = 16, 2048
SIZE = MATRICES * WIDTH**2


def adamw():
  return lowmem.adamw(1e-3)


# The most bytes a parameter beside those of the same training step without accumulation.
TRAINING = {
  "8 bits": (lambda: lowmem.multi_steps(adamw(), 4, bits=8), 1.2),
  "16 bits": (lambda: lowmem.multi_steps(adamw(), 4), 2.3),
  "float32": (lambda: lowmem.multi_steps(adamw(), 4, bits=32), 4.1),
}


@functools.cache
def step(case):
  tx = TRAINING[case][0]() if case in TRAINING else adamw()
  return compile_for(*training_step(tx, parameters(MATRICES, WIDTH)))


@pytest.mark.parametrize("case", TRAINING)
def test_bytes_of_all_training_state(case):
  """A parameter is updated when its gradient is there: there are never all means at once."""
  assert (step(case).device_bytes - step("adamw").device_bytes) / SIZE <= TRAINING[case][1]


@pytest.mark.parametrize("inner", [adamw, lambda: optax.adamw(1e-3)])
@pytest.mark.parametrize(
  "wrap",
  [
    lambda tx: lowmem.multi_steps(tx, 4, bits=8),
    lambda tx: lowmem.multi_steps(tx, 4, bits=16),
    lowmem.loss_scaling,
  ],
)
def test_no_temporaries_beside_gradient_and_update(inner, wrap):
  tx, params = wrap(inner()), {"w": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)}
  state = jax.eval_shape(tx.init, params)
  assert compile_for(tx.update, (params, state, params), (0, 1)).temp_bytes <= 0.1 * WIDTH**2
