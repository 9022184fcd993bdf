"""What parameters in bfloat16 cost, compiled for an H100 that is not here."""

import functools

import jax.numpy as jnp
import optax
import pytest

import optax_lowmem as lowmem
from compiled import compile_for, missing
from compiled.steps import parameters, training_step

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"not installed: {missing()}")
MATRICES, WIDTH, ROWS = 16, 2048, 256
SIZE = MATRICES * WIDTH**2

# What is trained, and the most bytes a parameter of all its state, parameters and gradients
# included: 2 for a bfloat16, 2.125 or 1.125 for AdamW, 2, 1 or none for the remainder, and a
# gradient.
CASES = {
  "16 bits": (lambda: lowmem.master_weights(lowmem.adamw(1e-5)), 8.2),
  "8 bits": (lambda: lowmem.master_weights(lowmem.adamw(1e-5), bits=8), 7.2),
  "8 bits, 4-bit state": (lambda: lowmem.master_weights(lowmem.adamw(1e-5, bits=4), bits=8), 6.2),
  "stochastic": (lambda: lowmem.stochastic_rounding(lowmem.adamw(1e-5), seed=0), 6.2),
  "16 bits, lion": (lambda: lowmem.master_weights(lowmem.lion(1e-5)), 7.2),
  "16 bits, came": (lambda: lowmem.master_weights(lowmem.came(1e-5)), 7.2),
  "16 bits, optax.adamw": (lambda: lowmem.master_weights(optax.adamw(1e-5)), 14.1),
}
PLAIN = {
  "adamw": lambda: lowmem.adamw(1e-5),
  "adamw, 4 bits": lambda: lowmem.adamw(1e-5, bits=4),
  "lion": lambda: lowmem.lion(1e-5),
  "came": lambda: lowmem.came(1e-5),
}
every_case = pytest.mark.parametrize("case", CASES)


@functools.cache
def step(case):
  tx = CASES[case][0]() if case in CASES else PLAIN[case]()
  return compile_for(*training_step(tx, parameters(MATRICES, WIDTH, jnp.bfloat16), ROWS))


@every_case
def test_bytes_of_all_training_state(case):
  assert step(case).device_bytes / SIZE <= CASES[case][1]


@every_case
def test_temporaries(case):
  """No more than 0.1 B/param beside those of bfloat16 alone: no float32 masters, no noise."""
  more = step(case).temp_bytes - step("adamw").temp_bytes
  assert more / SIZE <= 0.1


# What it is compared with, without a wrapper, and the bytes a parameter that it may move beside:
# the remainder both ways, the parameter, which `apply_updates` reads once more, and of what draws,
# where each block starts. Of CAME more than one pass reads masters.
MOVED = {
  "16 bits": ("adamw", 2 + 2 + 2),
  "8 bits": ("adamw", 1 + 1 + 2 + 0.07),
  "8 bits, 4-bit state": ("adamw, 4 bits", 1 + 1 + 2 + 0.07),
  "stochastic": ("adamw", 2 + 0.4),
  "16 bits, lion": ("lion", 2 + 2 + 2),
  "16 bits, came": ("came", 9.8),
}


@pytest.mark.parametrize("case", MOVED)
def test_traffic(case):
  """Masters are joined, updated and split in the kernel that updates the moments."""
  alone, most = MOVED[case]
  more = step(case).traffic.hbm - step(alone).traffic.hbm
  assert more / SIZE <= most + 0.01


@pytest.mark.parametrize("case", ["16 bits", "8 bits", "stochastic"])
def test_launches(case):
  assert (step(case).kernels - step("adamw").kernels) / MATRICES <= 3
