"""What the update in the backward pass holds, compiled for an H100 that is not here."""

import functools

import jax.numpy as jnp
import optax
import pytest

import optax_lowmem as lowmem
from compiled import compile_for, missing
from compiled.layers import LAYER_SIZE, SIZE, WORKSPACE, activations, in_backward

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"not installed: {missing()}")
MASTERS, BF16, F32 = lowmem.master_weights, jnp.bfloat16, jnp.float32

# What is trained, in what, and the most bytes a parameter of all its state, parameters and
# gradients included: parameters and state, and a few gradients of one layer of 24.
CASES = {
  "16 bits": (lambda: MASTERS(lowmem.adamw(1e-5)), BF16, 6.3),
  "8 bits": (lambda: MASTERS(lowmem.adamw(1e-5), bits=8), BF16, 5.3),
  "8 bits, 4-bit state": (lambda: MASTERS(lowmem.adamw(1e-5, bits=4), bits=8), BF16, 4.3),
  "stochastic": (lambda: lowmem.stochastic_rounding(lowmem.adamw(1e-5), seed=0), BF16, 4.3),
  "lion": (lambda: MASTERS(lowmem.lion(1e-5)), BF16, 5.3),
  "came": (lambda: MASTERS(lowmem.came(1e-5)), BF16, 5.3),
  "adafactor": (lambda: MASTERS(lowmem.adafactor(1e-5)), BF16, 4.2),
  "float32": (lambda: optax.adamw(1e-5), F32, 12.3),
  "sgd": (lambda: optax.sgd(1e-5), BF16, 2.2),
}
every_case = pytest.mark.parametrize("case", CASES)


@functools.cache
def step(case):
  make, dtype, _ = CASES[case]
  return compile_for(*in_backward(make(), dtype))


@every_case
def test_bytes_of_all_training_state(case):
  assert step(case).device_bytes / SIZE <= CASES[case][2]


@every_case
def test_temporaries_are_two_gradients_of_a_layer(case):
  """Activations and the workspace of XLA's matrix products apart."""
  dtype = CASES[case][1]
  held = step(case).temp_bytes - activations(dtype) - WORKSPACE
  assert held <= 2 * LAYER_SIZE * jnp.dtype(dtype).itemsize


def test_the_norm_of_all_gradients_costs_time_and_not_memory():
  make, dtype, most = CASES["8 bits"]
  assert compile_for(*in_backward(make(), dtype, clip_norm=1.0)).device_bytes / SIZE <= most
