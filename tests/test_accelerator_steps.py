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
  assert temporaries(wrap(inner()), jnp.float32) <= 0.1


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
  "inner",
  [
    optax.identity,
    pytest.param(
      adamw,
      marks=pytest.mark.xfail(strict=True, reason="2.0 B/param: room for gradient and update"),
    ),
  ],
)
def test_no_temporaries_beside_gradients_in_bfloat16(inner, bits):
  """Of parameters in float32: an update then cannot take its gradient's place."""
  assert temporaries(lowmem.multi_steps(inner(), 4, bits=bits), jnp.bfloat16) <= 0.1


def temporaries(tx, dtype):
  """Of an update of gradients in `dtype`, in bytes a parameter."""
  params, grads = ({"w": jax.ShapeDtypeStruct((WIDTH, WIDTH), d)} for d in (jnp.float32, dtype))
  state = jax.eval_shape(tx.init, params)
  return compile_for(tx.update, (grads, state, params), (0, 1)).temp_bytes / WIDTH**2
