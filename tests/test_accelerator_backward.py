"""What the update in the backward pass holds, compiled for an H100 that is not here."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType

import optax_lowmem as lowmem
import own_process
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
  ordinary,
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


@pytest.mark.parametrize(("case", "most"), [("16 bits", 8.2), ("8 bits, 4-bit state", 6.2)])
def test_bytes_of_all_training_state_of_an_ordinary_step(case, most):
  """Activations and workspace apart: what SGD has beside parameters and gradients."""
  ours, sgd = (compile_for(*ordinary(CASES[name][0](), BF16)) for name in (case, "sgd"))
  beside = sgd.device_bytes / SIZE - 2 * jnp.dtype(BF16).itemsize
  assert 0 < beside < 0.15
  assert ours.device_bytes / SIZE - beside <= most


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


def test_each_of_eight_cards_fetches_its_part():
  own_process.printed(__file__)


def check_eight_cards():
  """On explicit and on automatic axes, parameters cut by rows or by columns."""
  shapes = {"up": (12, 1024, 2048), "down": (12, 2048, 1024)}

  def layer(p, x, batch):
    if AxisType.Explicit in jax.typeof(p["up"]).sharding.mesh.axis_types:
      p = jax.sharding.reshard(p, jax.P())
    return x + jnp.tanh(x @ p["up"]) @ p["down"]

  def in_place(step, where):
    def run(*args):
      value, *new = step(*args)
      return value, *jax.lax.with_sharding_constraint(tuple(new), where)

    return run

  cuts = (AxisType.Auto, jax.P(None, None, "a")), (AxisType.Explicit, jax.P(None, "a"))
  for kind, spec in cuts:
    mesh = jax.make_mesh((8,), ("a",), axis_types=(kind,))
    found = []
    for page in (lambda tx: tx, lowmem.offloaded):
      parts = (lambda outer, x: x), layer, (lambda outer, x, batch: (x**2).mean())
      tx = page(optax.adamw(1e-3))
      training = lowmem.update_in_backward(*parts, tx, outer_tx=optax.identity())
      with jax.set_mesh(mesh):
        layers = {name: jnp.ones(shape) for name, shape in shapes.items()}
        params = {"outer": {}, "layers": jax.device_put(layers, jax.NamedSharding(mesh, spec))}
        state = training.init(params)
        where = jax.tree.map(lambda a: a.sharding, (params, state))
        step = training.step if kind == AxisType.Explicit else in_place(training.step, where)
        x = jax.device_put(jnp.ones((16, 1024)), jax.NamedSharding(mesh, jax.P()))
        found.append(compile_for(step, (params, state, x), (0, 1), count=8))
    plain, paged = found
    size = 2 * 4 * sum(map(math.prod, shapes.values())) // 8
    assert paged.host_argument_bytes == size
    assert paged.device_bytes <= plain.device_bytes - size + 2 * size / 12
    assert paged.host_temp_bytes == 0
    assert not paged.traffic.host_compute
    assert paged.traffic.collectives == plain.traffic.collectives


if __name__ == "__main__":
  check_eight_cards()
