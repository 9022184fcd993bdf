"""The laws, read from programs compiled for an H100 that is not here.

They need jax's CUDA plugins (no GPU, no driver); without them they are skipped by name. `.ci/run`
installs them.
"""

import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_lowmem as lowmem
import own_process
from compiled import compile_for, missing
from compiled.steps import apply_step, backward, parameters, training_step
from registry import ENTRIES, REGISTRY

HERE = pathlib.Path(__file__).parent
pytestmark = pytest.mark.skipif(missing() is not None, reason=f"not installed: {missing()}")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
MATRICES, WIDTH, ROWS = 16, 2048, 256
SIZE = MATRICES * WIDTH**2
LOCAL = [name for name, e in REGISTRY.items() if not e.norms]
NORMED = [f"{e.rule}-{e.bits}" for e in ENTRIES if e.norms]


@functools.cache
def step(which, dtype):
  """The training step of an entry, of optax's rule of an entry ("optax …"), or of "backward"."""
  params = parameters(MATRICES, WIDTH, DTYPES[dtype])
  if which == "backward":
    return compile_for(*backward(params, ROWS))
  if which == "optax.adafactor":
    return compile_for(*training_step(optax.adafactor(1e-3), params, ROWS))
  name = which.removeprefix("optax ")
  tx = REGISTRY[name].theirs(1e-3) if which != name else REGISTRY[name].ours(1e-3)
  return compile_for(*training_step(tx, params, ROWS))


@functools.cache
def one(which, dtype):
  """Update and apply of one array, of an entry or of optax's rule of an entry."""
  name = which.removeprefix("optax ")
  tx = REGISTRY[name].theirs(1e-3) if which != name else REGISTRY[name].ours(1e-3)
  return compile_for(*apply_step(tx, parameters(1, WIDTH, DTYPES[dtype])))


def moved(which, dtype):
  """Bytes through device memory, B/param, without those of the backward pass.

  Those are what optax.adamw's step moves, less the 28 (of 16 bits: 14) that AdamW does: XLA copies
  parameters in the backward pass that it is to update early.
  """
  own = {"float32": 28, "bfloat16": 14}[dtype]
  step_of_adamw = step("optax adamw-8", dtype).traffic.hbm
  return (step(which, dtype).traffic.hbm - step_of_adamw) / SIZE + own


def test_the_judge_knows_what_adamw_moves():
  compiled = one("optax adamw-8", "float32")
  assert compiled.traffic.hbm / WIDTH**2 == pytest.approx(28, abs=0.01)
  assert compiled.temp_bytes < 4096
  assert compiled.device_bytes == pytest.approx(16 * WIDTH**2, rel=0.001)


@every_dtype
@pytest.mark.parametrize("name", LOCAL)
def test_temporaries(name, dtype):
  """Within 0.1 B/param of those of `optax.adamw`."""
  extra = step(name, dtype).temp_bytes - step("optax adamw-8", dtype).temp_bytes
  assert extra / SIZE <= 0.1


@every_dtype
@pytest.mark.parametrize("name", LOCAL)
def test_traffic(name, dtype):
  """At most 0.87 times that of `optax.adamw`; 1.05 times in bf16, where its moments are bf16."""
  # Of rules with more moments than Adam has, that of the rule itself in float32.
  theirs = f"optax {name}" if REGISTRY[name].moments > 2 else "optax adamw-8"
  limit = 0.87 if dtype == "float32" else 1.05
  assert moved(name, dtype) <= limit * moved(theirs, dtype)


@every_dtype
@pytest.mark.parametrize("name", LOCAL)
def test_launches(name, dtype):
  more = step(name, dtype).kernels - step("optax adamw-8", dtype).kernels
  assert more / MATRICES <= 3


@every_dtype
@pytest.mark.parametrize("name", NORMED)
def test_temporaries_of_rules_that_take_norms(name, dtype, request):
  """No more than optax's of the same rule; of one array never above 4 B/param."""
  if name == "came-8" and jax.__version_info__ < (0, 11):
    reason = "1.72 B/param, not 1.28: gradients of all activations, but no copy of parameters"
    request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
  ours, theirs = step(name, dtype).temp_bytes, step(f"optax {name}", dtype).temp_bytes
  allowed = 0.01 * SIZE
  if REGISTRY[name].bits == 4:  # by the kernel, which leaves an update in float32: of one array
    allowed += (4 if name.startswith("la") else 12) * WIDTH**2
  assert ours <= theirs + allowed
  assert REGISTRY[name].bits == 4 or one(name, dtype).temp_bytes / WIDTH**2 <= 4


@every_dtype
def test_traffic_of_came(dtype):
  assert moved("came-8", dtype) <= 1.2 * moved("optax.adafactor", dtype)


@pytest.mark.parametrize("bits", [8, 4])
def test_time_to_compile(bits):
  """60 arrays in at most 2.5 times optax's time, of the processor's: others may be at work."""
  params = parameters(60, 512)
  optax_step, ours = (
    apply_step(tx, params) for tx in (optax.adamw(1e-3), lowmem.adamw(1e-3, bits=bits))
  )
  compile_for(*optax_step)  # what only the first compilation has to do

  def seconds(step):
    begun = time.process_time()
    compile_for(*step)
    return time.process_time() - begun

  pairs = [(seconds(ours), seconds(optax_step)) for _ in range(2)]
  assert min(ours for ours, _ in pairs) <= 2.5 * min(theirs for _, theirs in pairs), pairs


@pytest.mark.parametrize("shape", [(100, 1000), (4096, 16), (1000, 77)])
def test_without_the_kernel(shape):
  """Ragged blocks, factors of LoRA, and kernels switched off: whole arrays, and few launches."""
  params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
  with lowmem.kernels.using("xla"):
    compiled = compile_for(*apply_step(lowmem.adamw(1e-3), params))
  assert compiled.kernels <= 14
  assert not compiled.traffic.unknown_loops


def test_cards():
  """The kernel compiles for Ampere and Ada, too."""
  params = parameters(1, 512)
  for card in ("a100-80gb", "rtx-4090"):
    compiled = compile_for(*apply_step(lowmem.adamw(1e-3), params), card=card)
    assert "__gpu$xla.gpu.triton" in compiled.text


PARAMS = {"w": jax.ShapeDtypeStruct((256, 256), jnp.float32)}
STACKED = {"w": jax.ShapeDtypeStruct((3, 128, 128), jnp.float32)}


def update_of(tx):
  return tx.update, PARAMS, tx.init


def vmapped(tx):
  return jax.vmap(tx.update), STACKED, jax.vmap(tx.init)


def scanned(tx):
  def update(grads, state, params):
    def body(carry, _):
      params, state = carry
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(body, (params, state), length=3)[0]

  return update, PARAMS, tx.init


def differentiated(rule):
  """By the learning rate: what depends on what is stored has no derivative."""

  def update(grads, state, params):
    return jax.grad(lambda lr: rule(lr).update(grads, state, params)[0]["w"].sum())(1e-3)

  return update, PARAMS, rule(1e-3).init


STATIC = ("bits", "block_size", "min_size")
WITHIN = {
  "MultiSteps": lambda f: update_of(optax.MultiSteps(f(1e-3), 2).gradient_transformation()),
  "apply_if_finite": lambda f: update_of(optax.apply_if_finite(f(1e-3), 3)),
  "inject_hyperparams": lambda f: update_of(optax.inject_hyperparams(f, STATIC)(1e-3)),
  "masked": lambda f: update_of(optax.masked(f(1e-3), {"w": True})),
  "clip_by_global_norm": lambda f: update_of(optax.chain(optax.clip_by_global_norm(1.0), f(1e-3))),
  "vmap": lambda f: vmapped(f(1e-3)),
  "scan": lambda f: scanned(f(1e-3)),
  "grad": differentiated,
}


@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("rule", ["adamw", "came"])
def test_plain_optax(rule, within):
  """Kernel and phases compile where optax and JAX put them."""
  update, params, init = WITHIN[within](getattr(lowmem, rule))
  compiled = compile_for(update, (params, jax.eval_shape(init, params), params))
  assert compiled.kernels
  if rule == "adamw" and within != "grad":  # a kernel has no derivative of its own
    assert "__gpu$xla.gpu.triton" in compiled.text


@pytest.fixture(scope="module")
def eight():
  """What eight cards need, by case; in a process that has eight devices."""
  return json.loads(own_process.printed(HERE / "accelerator_cases.py").splitlines()[-1])


@pytest.mark.parametrize("axes", ["rows", "columns", "both", "layers"])
@pytest.mark.parametrize("mesh", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", ["adamw-8", "lion-4"])
def test_eight_cards(eight, name, mesh, axes):
  """No collective in an elementwise update; device bytes are an eighth."""
  found = eight[f"{name} {mesh} {axes}"]
  assert not found["collectives"]
  assert found["device_bytes"] <= 1.02 * found["one"] / 8
  assert found["kernels"] <= 8


@pytest.mark.parametrize("axes", ["rows", "columns", "both", "layers"])
@pytest.mark.parametrize("mesh", ["Auto", "Explicit"])
def test_eight_cards_accumulate(eight, mesh, axes):
  """Sums in codes, and the update in a loop of one trip or none."""
  found = eight[f"sums {mesh} {axes}"]
  assert not found["collectives"]
  assert found["device_bytes"] <= 1.02 * found["one"] / 8
  assert found["kernels"] <= 20


@pytest.mark.parametrize("axes", ["rows", "columns", "both", "layers"])
@pytest.mark.parametrize("mesh", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", ["masters", "rounding"])
def test_eight_cards_in_bfloat16(eight, name, mesh, axes):
  """Masters, and noise by position, are made where their shard is."""
  found = eight[f"{name} {mesh} {axes}"]
  assert not found["collectives"]
  assert found["device_bytes"] <= 1.02 * found["one"] / 8


@pytest.mark.parametrize("axes", ["rows", "columns", "both", "layers"])
@pytest.mark.parametrize("mesh", ["Auto", "Explicit"])
def test_eight_cards_reduce_norms_only(eight, mesh, axes):
  assert set(eight[f"came-8 {mesh} {axes}"]["collectives"]) == {"all-reduce"}


@pytest.mark.parametrize("mesh", ["Auto", "Explicit"])
def test_eight_cards_quantize(eight, mesh):
  """Each its blocks; of scales that are quantized too, explicit axes gather all, and no more."""
  assert not eight[f"quantize {mesh}"]
  if mesh == "Explicit":
    assert set(eight[f"quantize doubly {mesh}"]) == {"all-gather"}
