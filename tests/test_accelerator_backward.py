"""What the update in the backward pass holds, compiled for an H100 that is not here."""

import functools
import re

import jax.numpy as jnp
import optax
import pytest

import optax_lowmem as lowmem
from compiled import compile_for, missing
from compiled.hlo import nbytes
from compiled.layers import (
  LAYER_SIZE,
  LAYERS,
  MATRICES,
  SIZE,
  WORKSPACE,
  activations,
  in_backward,
)
from host_copies import loops, overlaps

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


PAGED = ["float32", "16 bits", "8 bits, 4-bit state", "stochastic", "came", "adafactor"]


@functools.cache
def paged_step(case):
  """With the layers' state in host memory, and the bytes of that."""
  make, dtype, _ = CASES[case]
  given = in_backward(lowmem.offloaded(make()), dtype)
  return compile_for(*given), lowmem.state_bytes(given[1][1])["pinned_host"]


@pytest.mark.parametrize("case", PAGED)
def test_paged_state_of_two_layers_is_on_the_device(case):
  paged, state = paged_step(case)
  assert paged.device_bytes <= step(case).device_bytes - state + 2 * state / LAYERS
  assert paged.host_temp_bytes == 0
  assert not paged.traffic.host_compute


@pytest.mark.parametrize("case", ["float32", "16 bits"])
def test_copies_go_both_ways_beside_computation(case):
  """Each array of the state is fetched and stored, and something is computed meanwhile."""
  paged, _ = paged_step(case)
  (lines,) = loops(paged.text)
  fetched, stored = (
    [op for op, kind in lines if kind == "fusion-start" and op.startswith(name)]
    for name in ("dynamic-slice", "dynamic-update-slice")
  )
  assert len(fetched) >= len(stored) >= 2 * len(MATRICES)
  assert overlaps(lines)


def test_each_layer_is_copied_from_where_xla_says():
  """A layer further each trip: the last comes first."""
  paged, _ = paged_step("16 bits")
  found = re.findall(
    rf" = (\w+)\[(?:1,)*{LAYERS},([\d,]+)\]\S*S\(5\)\}} dynamic-update-slice\(.*"
    r'dynamic_slice_config":\{.*"byte_offset":"0","byte_stride":"(\d+)"',
    paged.text,
  )
  assert len(found) >= 2 * len(MATRICES)
  for dtype, shape, stride in found:
    assert int(stride) == nbytes(f"{dtype}[{shape}]")
