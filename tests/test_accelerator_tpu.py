"""On a TPU: the kernel's bits, and what XLA makes of an update, compiled for a v5e."""

import functools
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compiled
import optax_lowmem as lowmem
from compiled.steps import apply_step, parameters, training_step
from guard_cases import card
from optax_lowmem import kernels
from optax_lowmem.kernels import _choice, _tpu

HERE = pathlib.Path(__file__).parent
NAME = "optax_lowmem_update"
SETTINGS = [(dtype, bits) for dtype in ("float32", "bfloat16") for bits in (8, 4)]

needs_libtpu = pytest.mark.skipif(
  compiled.missing("v5e") is not None, reason=f"needs {compiled.missing('v5e')}"
)


def optimizer(bits):
  return lowmem.adamw(1e-3, bits=bits) if bits else optax.adamw(1e-3)


@functools.cache
def of_array(bits, dtype="float32", shape=(4096, 4096)):
  """Update and apply of one array, everything donated; `bits` 0 is optax."""
  params = {"w": jax.ShapeDtypeStruct(shape, dtype)}
  return compiled.compile_for(*apply_step(optimizer(bits), params), card="v5e")


@functools.cache
def of_training(bits, dtype):
  """A training step of 16 matrices of 2048 x 2048."""
  params = parameters(16, 2048, dtype)
  return compiled.compile_for(*training_step(optimizer(bits), params), card="v5e")


# ------------------------------------------------------------------------------------- laws


@needs_libtpu
@pytest.mark.parametrize(("dtype", "bits"), SETTINGS)
def test_an_array_needs_what_it_needs_with_optax(dtype, bits):
  ours, optaxs, size = of_array(bits, dtype), of_array(0, dtype), 4096**2
  assert ours.text.count("tpu_custom_call") == 1
  assert ours.temp_bytes <= optaxs.temp_bytes + 0.1 * size
  assert ours.traffic.hbm <= optaxs.traffic.hbm


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bits"), SETTINGS)
def test_a_training_step_moves_less_than_with_optax(dtype, bits):
  ours, optaxs, size = of_training(bits, dtype), of_training(0, dtype), 16 * 2048**2
  assert ours.text.count("tpu_custom_call") == 16
  assert ours.traffic.hbm <= optaxs.traffic.hbm
  # XLA runs optax's update within the matrix product that makes a gradient, so that no gradient is
  # ever in memory. A kernel reads its own from there, and in bfloat16 XLA makes two at a time.
  gradients = (1 if dtype == "float32" else 2) * 2048**2 * jnp.dtype(dtype).itemsize
  assert ours.temp_bytes <= optaxs.temp_bytes + gradients + 0.1 * size
  assert ours.device_bytes < optaxs.device_bytes - (4 if dtype == "float32" else 1) * size


@needs_libtpu
@pytest.mark.parametrize("shape", [(4096, 16), (16, 4096)])
@pytest.mark.parametrize("bits", [8, 4])
def test_factors_of_lora_need_what_they_need_with_optax(shape, bits):
  ours, optaxs = of_array(bits, shape=shape), of_array(0, shape=shape)
  assert ours.temp_bytes <= optaxs.temp_bytes + 0.1 * 65536
  assert ours.traffic.hbm <= optaxs.traffic.hbm


@needs_libtpu
@pytest.mark.parametrize("rule", ["lion", "rmsprop", "ademamix", "adagrad"])
def test_other_rules_have_a_kernel(rule):
  params = {"w": jax.ShapeDtypeStruct((1024, 2048), jnp.float32)}
  tx = getattr(lowmem, rule)(1e-3)
  program = compiled.compile_for(*apply_step(tx, params), card="v5e")
  assert program.text.count("tpu_custom_call") == 1
  assert program.temp_bytes <= 0.1 * 1024 * 2048


@needs_libtpu
@pytest.mark.parametrize("block_size", [None, 80, 96])
def test_under_vmap_and_with_blocks_that_are_no_power_of_two(block_size):
  tx = lowmem.adamw(1e-3, block_size=block_size)
  params = jax.ShapeDtypeStruct((3, 256, 1280 if block_size == 80 else 1152), jnp.float32)
  state = jax.eval_shape(jax.vmap(tx.init), params)
  program = compiled.compile_for(jax.vmap(tx.update), (params, state, params), card="v5e")
  assert program.text.count("tpu_custom_call") == 1


# How to call what `_tpu` says Mosaic knows: how many arrays it takes, if not one, or a call of it.
CALLS: dict[str, Any] = {
  **dict.fromkeys("add and atan2 div max min mul nextafter or pow rem sub xor".split(), 2),
  **dict.fromkeys("eq ge gt le lt ne shift_left".split(), 2),
  **dict.fromkeys("shift_right_arithmetic shift_right_logical".split(), 2),
  "clamp": lambda x: jax.lax.clamp(0.0, x, 1.0),
  "convert_element_type": lambda x: x.astype(jnp.int32),
  "integer_pow": lambda x: jax.lax.integer_pow(x, 3),
  "select_n": lambda x: jnp.where(x > 0, x, 1.0),
  "stop_gradient": jax.lax.stop_gradient,
}
OF_INTEGERS = {"and", "not", "or", "xor", "shift_left"} | {n for n in CALLS if "shift_r" in n}
OF_ENCODE = {"bitcast_convert_type", "broadcast_in_dim", "iota", "jit", "pjit", "reduce_max"}


@needs_libtpu
def test_mosaic_knows_what_the_kernel_says_it_knows():
  import jax.experimental.pallas as pl

  def all_of_them(ref, out):
    total = jnp.zeros(ref.shape)
    for name in sorted(_tpu._LOWERED - OF_ENCODE):
      x = ref[...].astype(jnp.int32) if name in OF_INTEGERS else ref[...]
      call = CALLS.get(name, 1)
      prefix = "bitwise_" if name in ("and", "not", "or", "xor") else ""
      result: Any = call(x) if callable(call) else getattr(jax.lax, prefix + name)(*[x] * call)
      total += jnp.where(result, 1.0, 0.0) if result.dtype == jnp.bool_ else result
    out[...] = total

  x = jax.ShapeDtypeStruct((32, 128), jnp.float32)
  fn = pl.pallas_call(all_of_them, out_shape=x)
  assert "tpu_custom_call" in compiled.compile_for(fn, (x,), card="v5e").text


# ------------------------------------------------------------------------------------- bits


@pytest.mark.slow
def test_bits_equal_those_of_xla():
  if platform.machine() not in ("x86_64", "AMD64"):
    pytest.skip("only on x86 can XLA be told to round every product, see kernel_cases.py")
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)}
  command = [sys.executable, str(HERE / "tpu_cases.py")]
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  for case, (update, *state) in json.loads(done.stdout).items():
    assert not any(state), case
    # Division by a scalar is a product with its reciprocal in one program and not in the other. So
    # updates are compared in bfloat16, of which few lie between two.
    assert update <= 2, case


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
  ("shape", "bits", "options", "reason"),
  [
    ((128, 512), 8, {}, None),
    ((4096, 16), 8, {}, "a block covers several rows, (4, 16)"),
    ((512, 192), 8, {}, "rows of 192 do not fill 128 lanes"),
    ((512, 384), 4, {}, "rows of 192 do not fill 128 lanes"),
    ((64, 1000), 8, {}, "rows of 1000 do not fill 128 lanes"),
    ((64, 128 * 65), 8, {"block_size": 130}, "only every 8320 elements, over 1024"),
  ],
)
def test_refusals(shape, bits, options, reason):
  state: Any = lowmem.quantized(optax.trace(0.9), bits=bits, **options).init(jnp.ones(shape))
  found = _tpu.supports([jnp.ones(shape)], [state.trace])
  assert found is None if reason is None else reason in found
  if reason:
    with pytest.raises(ValueError, match="the kernel cannot update this array"):
      _tpu.map_blocks(lambda read, write: write, [], [state.trace])


def test_a_rule_that_mosaic_does_not_know_is_refused():
  state: Any = lowmem.quantized(optax.trace(0.9)).init(jnp.ones((128, 512)))

  def rule(_, writes):
    old = writes[0].decode()
    return [writes[0].encode(jnp.sinh(old), old)]

  found = _tpu.supports([], [state.trace], (), rule)
  assert found and "Mosaic does not know 'sinh'" in found


def test_without_the_backend(monkeypatch):
  monkeypatch.setattr(_tpu, "_IMPORT_ERROR", ImportError("no module named tpu"))
  found = _tpu.supports([], [])
  assert found and "has no TPU backend of Pallas" in found


# ----------------------------------------------------------------------------------- the guard


@pytest.fixture
def on_tpu(monkeypatch):
  with card(monkeypatch, "tpu"):
    yield


def test_guard_trusts_a_kernel_that_agrees(on_tpu):
  assert kernels.trusted()


def test_guard_switches_off_a_kernel_that_does_not(on_tpu, monkeypatch):
  right = _choice.map_blocks

  def wrong(*args, **kwargs):
    *moments, update = right(*args, **kwargs)
    return [*moments, update * np.float32(1.01)]

  monkeypatch.setattr(_choice, "map_blocks", wrong)
  with pytest.warns(UserWarning, match=r"switched off: on .* Please report"):
    assert not kernels.trusted()


def test_a_tpu_is_thought_of_where_a_program_could_run_on_one(on_tpu, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert kernels.platforms() == ("cuda", "tpu")
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  assert kernels.platforms() == ("cuda",)


def test_insisting_on_a_tpu_asks_its_kernel(on_tpu):
  tx, params = lowmem.adamw(1e-3), jnp.ones((4096, 16))
  with pytest.raises(ValueError, match="a block covers several rows"), kernels.using("pallas"):
    jax.jit(lambda g, s: tx.update(g, s, params)).trace(params, tx.init(params))
