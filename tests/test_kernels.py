"""The Pallas kernel: bits against XLA, lowering for CUDA, refusals, and the setting."""

import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from cuda_cases import lowered_for_cuda
from guard_cases import card
from optax_lowmem import kernels
from optax_lowmem._quantization.array import encode, encode_finite
from optax_lowmem._quantization.codebooks import _CODEBOOKS, get_codebook
from optax_lowmem.kernels import _choice, _guard, _pallas
from optax_lowmem.kernels._pallas import map_blocks, supports
from programs import temporaries_of

HERE = pathlib.Path(__file__).parent
NAME = "optax_lowmem_update"
POWER8 = get_codebook("power8")


def stored(shape, codebook="power8", block=(64,), key=0):
  x = jax.random.normal(jax.random.key(key), shape)
  return encode(jnp.abs(x), get_codebook(codebook), block)


def refusal(*arguments):
  """Why the kernel does not take these arrays."""
  reason = supports(*arguments)
  assert reason is not None
  return reason


def decay(factor):
  """A body: one moment, decayed, and what it was."""

  def fn(read, write):
    (grad,), (moment,) = read, write
    old = moment.dequantize(jnp.float32)
    new = encode_finite(factor * old + grad.astype(jnp.float32), moment.codebook, moment.block)
    return [new, old.astype(grad.dtype)]

  return fn


# ------------------------------------------------------------------------------------- bits


@pytest.fixture(scope="module")
def differences():
  if platform.machine() not in ("x86_64", "AMD64"):
    pytest.skip("only on x86 can XLA be told to round every product, see kernel_cases.py")
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)}
  command = [sys.executable, str(HERE / "kernel_cases.py")]
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout)


@pytest.mark.parametrize(
  "case",
  [
    *(f"{rule}, 8 bits, masked" for rule in ("adamw", "lion", "sgd", "adabelief", "rmsprop")),
    "adamw, 8 bits, whole tiles",
    "adamw, 8 bits, smaller than a tile",
    "adamw, 4 bits, masked",
  ],
)
def test_bits_equal_those_of_the_tile_loop(differences, case):
  *state, update = differences[case]
  assert not any(state), differences[case]
  # XLA may turn a division by a scalar into a product with its reciprocal in one program and not in
  # the other; a float32 update then differs by its last bit, a bf16 one where it lies between two.
  assert update <= 2


@pytest.mark.parametrize("shape", [(64,), (3, 64), (5, 7, 192), (130, 64), (2, 2048)])
def test_any_number_of_blocks(shape):
  dtype = jnp.float32 if len(shape) < 3 else jnp.bfloat16
  moment, grad = stored(shape), jnp.full(shape, 0.5, dtype)
  fresh = [jax.ShapeDtypeStruct(shape, dtype)]
  # A factor of 1/4 is exact, so that it does not matter whether product and sum are fused.
  new, old = map_blocks(decay(0.25), [grad], [moment], fresh, interpret=True)
  like, dense = jax.jit(decay(0.25))([grad], [moment])
  assert jax.tree.structure(new) == jax.tree.structure(moment)
  for x, y in zip(jax.tree.leaves((new, old)), jax.tree.leaves((like, dense)), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("block", [(16,), (4096,)])
def test_other_blocks(block):
  moment, grad = stored((3, 4096), block=block), jnp.ones((3, 4096))
  new, _ = map_blocks(decay(0.5), [grad], [moment], [grad_form(grad)], interpret=True)
  like, _ = jax.jit(decay(0.5))([grad], [moment])
  np.testing.assert_array_equal(new.codes, like.codes)
  np.testing.assert_array_equal(new.scales, like.scales)


def grad_form(grad):
  return jax.ShapeDtypeStruct(grad.shape, grad.dtype)


def test_traced_scalars_become_arguments():
  moment, grad = stored((4, 64)), jnp.ones((4, 64))

  @jax.jit
  def update(factor, flag):
    def fn(read, write):
      return decay(jnp.where(flag, factor, 0.0))(read, write)

    return map_blocks(fn, [grad], [moment], [grad_form(grad)], interpret=True)[0]

  on, off = update(0.5, True), update(0.5, False)
  np.testing.assert_array_equal(on.codes, decay(0.5)([grad], [moment])[0].codes)
  np.testing.assert_array_equal(off.dequantize(), jnp.ones((4, 64)))


def test_vmap():
  moments = jax.tree.map(lambda *x: jnp.stack(x), *(stored((3, 64), key=k) for k in (0, 1)))
  grads = jnp.ones((2, 3, 64))

  def one(grad, moment):
    return map_blocks(decay(0.5), [grad], [moment], [grad_form(grad)], interpret=True)[0]

  new = jax.vmap(one)(grads, moments)
  for k in (0, 1):
    like = one(grads[k], stored((3, 64), key=k))
    np.testing.assert_array_equal(new.codes[k], like.codes)


# --------------------------------------------------------------------------------- lowering


@pytest.mark.parametrize("codebook", [n for n in _CODEBOOKS if not get_codebook(n).needs_table])
@pytest.mark.parametrize("rows", [64, 37])
def test_lowers_for_cuda(codebook, rows):
  moment, grad = stored((rows, 192), codebook), jnp.ones((rows, 192), jnp.bfloat16)

  def update(grad, moment, factor):
    return map_blocks(decay(factor), [grad], [moment], [grad_form(grad)])

  text = lowered_for_cuda(update, grad, moment, jnp.float32(0.9)).as_text()
  assert text.count("__gpu$xla.gpu.triton") == 1 and NAME in text
  assert text.count("output_operand_alias<") == 2  # codes and scales in place


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
  ("moment", "reason"),
  [
    (lambda: stored((4, 65)), "rows of 65 elements are not whole blocks of 64"),
    (lambda: stored((4, 96), block=(48,)), "blocks have 48 elements, not a power of two"),
    (lambda: stored((4, 64), block=(8,)), "blocks have 8 elements, not a power of two from 16"),
    (lambda: stored((4, 64), "dynamic"), "the codebook 'dynamic' needs a table"),
    (lambda: lowmem.quantize(jnp.ones((4, 256)), "nf4", 64), "the codebook 'nf4' needs a table"),
    (lambda: lowmem.quantize(jnp.ones((4, 256)), "power8", 64, True), "its scales are quantized"),
    (lambda: jnp.ones((4, 64)), "nothing of it is quantized"),
    (lambda: stored((0, 64)), "it has 0 elements"),
  ],
)
def test_says_why_not(moment, reason):
  moment = moment()
  assert reason in supports([], [moment])
  with pytest.raises(ValueError, match="the kernel cannot update this array"):
    map_blocks(lambda read, write: write, [], [moment], interpret=True)


def test_refuses_what_offsets_cannot_count():
  moment = jax.eval_shape(lambda: stored((2**21, 1024)))
  assert "2147483648 elements" in refusal([], [moment])


def test_refuses_dtypes_that_triton_lacks():
  assert "dtype int32" in refusal([jnp.ones((4, 64), jnp.int32)], [stored((4, 64))])


@pytest.mark.parametrize(
  ("op", "reason"),
  [
    (jax.lax.erf, "Triton does not know 'erf'"),
    (lambda x: x * jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), None),
    (lambda x: x + np.ones(x.shape, np.float32), "reads an array of shape"),
    (lambda x: jnp.cumsum(x), "Triton does not know 'cumsum'"),
  ],
)
def test_refuses_rules_that_triton_lacks(op, reason):
  moment = stored((4, 64))

  def fn(read, write):
    return [encode_finite(op(write[0].dequantize(jnp.float32)), POWER8, (64,))]

  found = supports([], [moment], (), fn)
  assert found is None if reason is None else reason in found
  if reason:
    with pytest.raises(ValueError, match="the kernel cannot run this rule"):
      map_blocks(fn, [], [moment], interpret=True)


def test_body_must_keep_forms():
  def fn(read, write):
    return [write[0].dequantize(jnp.float32), write[0].dequantize(jnp.float32)]

  with pytest.raises(TypeError, match="`fn` must return tiles in the form"):
    map_blocks(fn, [], [stored((4, 64))], interpret=True)


def test_without_the_backend(monkeypatch):
  monkeypatch.setattr(_pallas, "_IMPORT_ERROR", ImportError("no module named triton"))
  assert "has no Triton backend of Pallas" in refusal([], [stored((4, 64))])


# ------------------------------------------------------------------------------ the setting


def test_setting(monkeypatch):
  monkeypatch.delenv("OPTAX_LOWMEM_KERNELS", raising=False)
  assert kernels.setting() == "auto"
  monkeypatch.setenv("OPTAX_LOWMEM_KERNELS", "XLA")
  assert kernels.setting() == "xla"
  with kernels.using("interpret"):
    assert kernels.setting() == "interpret"
  assert kernels.setting() == "xla"
  with pytest.raises(ValueError, match=r"`mode` must be one of .*, got 'triton'"):
    kernels.using("triton").__enter__()  # pyright: ignore[reportArgumentType]
  monkeypatch.setenv("OPTAX_LOWMEM_KERNELS", "cuda")
  with pytest.raises(ValueError, match=r"`OPTAX_LOWMEM_KERNELS` must be one of .*, got 'cuda'"):
    kernels.setting()


def step_of(shape, tx=None):
  """An update of one parameter, and its arguments."""
  tx = lowmem.adamw(1e-3) if tx is None else tx
  params = jnp.ones(shape)
  return tx.update, (params, tx.init(params), params)


def has_kernel(update, args):
  return NAME in str(jax.jit(lambda *x: update(*x)).trace(*args).jaxpr)


@pytest.mark.parametrize(("mode", "uses"), [("xla", False), ("auto", True), ("interpret", True)])
def test_mode_chooses(mode, uses):
  with kernels.using(mode):
    assert has_kernel(*step_of((64, 64))) == uses


@pytest.mark.parametrize("mode", ["xla", "auto", "interpret"])
def test_updates_on_a_cpu_are_alike(mode):
  update, args = step_of((64, 64))
  with kernels.using(mode):
    updates, state = jax.jit(lambda *x: update(*x))(*args)
  np.testing.assert_allclose(updates, -1e-3 * (1 + 1e-4), rtol=1e-5)
  np.testing.assert_allclose(optax.tree.get(state, "mu").dequantize(), 0.1, rtol=1e-6)


def test_eager_updates_follow_the_mode(monkeypatch):
  """`update` outside of `jit` is compiled by `quantized`, for each mode apart."""
  calls = []
  refusal = _choice.refusal
  monkeypatch.setattr(_choice, "refusal", lambda *x, **y: calls.append(1) or refusal(*x, **y))
  update, args = step_of((64, 64))
  with kernels.using("xla"):
    update(*args)
  assert not calls
  with kernels.using("interpret"):
    update(*args)
  assert calls


@pytest.mark.parametrize(("mode", "count"), [("xla", 0), ("auto", 1), ("pallas", 1)])
def test_choice_for_cuda(mode, count):
  update, args = step_of((64, 64))
  with kernels.using(mode):
    text = lowered_for_cuda(lambda *x: update(*x), *args).as_text()
  assert text.count("__gpu$xla.gpu.triton") == count


def test_ragged_rows_are_left_to_xla_or_refused():
  update, args = step_of((100, 65))
  with kernels.using("auto"):
    assert NAME not in lowered_for_cuda(lambda *x: update(*x), *args).as_text()
  match = r"a parameter of shape \(100, 65\): blocks have 65 .* Set them to 'auto'"
  with kernels.using("pallas"), pytest.raises(ValueError, match=match):
    jax.jit(lambda *x: update(*x)).lower(*args)


def test_insisting_on_a_cpu_raises():
  update, args = step_of((64, 64))
  with kernels.using("pallas"), pytest.raises(ValueError, match="interpret mode"):
    jax.jit(lambda *x: update(*x)).lower(*args)


# ----------------------------------------------------------------------------------- the guard


@pytest.fixture
def on_gpu(monkeypatch):
  with card(monkeypatch, "gpu"):
    yield


def test_guard_trusts_a_kernel_that_agrees(on_gpu):
  assert _guard.difference("cuda") is None
  assert jax.jit(lambda x: x + kernels.trusted())(0) == 1  # asked while an update is traced


@pytest.mark.parametrize("fault", ["wrong", "not finite", "raises"])
def test_guard_switches_off_a_kernel_that_does_not(on_gpu, monkeypatch, fault):
  right = _choice.map_blocks

  def wrong(*args, **kwargs):
    if fault == "raises":
      raise RuntimeError("no such instruction")
    *moments, update = right(*args, **kwargs)
    return [*moments, update * (1.01 if fault == "wrong" else jnp.nan)]

  monkeypatch.setattr(_choice, "map_blocks", wrong)
  with pytest.warns(UserWarning, match=r"switched off: on .* Please report"):
    assert not kernels.trusted()
  assert not kernels.trusted()  # known by now: neither compared nor warned of again
  assert not has_kernel(*step_of((64, 64)))


def test_guard_says_nothing_where_there_is_no_kernel(monkeypatch):
  """On AMD's GPUs, which are "gpu" too."""

  def devices(backend=None):
    raise RuntimeError(f"Unknown backend {backend}")

  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", devices)
  assert kernels.trusted()


# --------------------------------------------------------------------- through the optimizer


def compiled_step(tx, mode, monkeypatch):
  monkeypatch.setenv("OPTAX_LOWMEM_KERNELS", mode)
  params = jnp.ones((1024, 512))

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = jax.jit(tx.init)(params)
  return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


def test_a_cpu_program_is_the_same_with_auto(monkeypatch):
  memory = [
    temporaries_of(compiled_step(lowmem.adamw(1e-3), mode, monkeypatch)) for mode in ("xla", "auto")
  ]
  assert memory[0] == memory[1]


@pytest.mark.parametrize(("others", "method"), [(False, "while"), (True, "optimization_barrier")])
def test_phases_are_left_out_where_nothing_would_run_them(monkeypatch, others, method):
  """What of the default is lowered for AMD's GPUs: tiles where there are none, which is traced."""
  monkeypatch.setattr(_choice, "other_platforms", lambda: others)
  tx, params = lowmem.adamw(1e-3), jnp.ones((1024, 512))
  traced = jax.jit(tx.update).trace(params, tx.init(params), params)
  text = traced.lower(lowering_platforms=("rocm",)).as_text()
  found = [name for name in ("while", "optimization_barrier") if f"stablehlo.{name}" in text]
  assert found == [method]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("make", [lowmem.adamw, lowmem.lion, lowmem.rmsprop])
def test_optimizers_lower_for_cuda(monkeypatch, make, bits):
  tx = make(1e-3, bits=bits)
  params = {"w": jnp.ones((96, 192), jnp.bfloat16), "b": jnp.ones(64), "r": jnp.ones((100, 70))}
  state = tx.init(params)
  monkeypatch.setenv("OPTAX_LOWMEM_KERNELS", "auto")
  text = lowered_for_cuda(tx.update, params, state, params).as_text()
  assert text.count("__gpu$xla.gpu.triton") == 1  # "w"; "b" is dense, and "r" ragged


def test_a_bad_element_stays_one(monkeypatch):
  monkeypatch.setenv("OPTAX_LOWMEM_KERNELS", "interpret")
  tx = lowmem.adamw(1e-3)
  params = jnp.ones((64, 64))
  grads = params.at[3, 5].set(jnp.nan).at[9, 9].set(jnp.inf)
  updates, state = jax.jit(lambda *x: tx.update(*x))(grads, tx.init(params), params)
  bad = ~np.isfinite(np.asarray(updates))
  assert sorted(zip(*np.nonzero(bad), strict=True)) == [(3, 5), (9, 9)]
  mu = optax.tree.get(state, "mu")
  assert np.isfinite(np.asarray(mu.dequantize())).all()
