"""The Pallas kernel: bits against XLA, lowering for CUDA, refusals, and the setting."""

import inspect
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
from optax_lowmem import _engine, kernels
from optax_lowmem._blocks import encode, encode_finite
from optax_lowmem._codebooks import get_codebook
from optax_lowmem.kernels import _pallas
from optax_lowmem.kernels._pallas import map_blocks, supports

HERE = pathlib.Path(__file__).parent
NAME = "optax_lowmem_update"
LOG8 = get_codebook("log8")
engine = pytest.mark.skipif(
  "kernels" not in inspect.getsource(_engine), reason="the engine does not ask for kernels yet"
)


def stored(shape, codebook="log8", block=(64,), key=0):
  x = jax.random.normal(jax.random.key(key), shape)
  return encode(jnp.abs(x), get_codebook(codebook), block)


def decay(factor):
  """A body: one moment, decayed, and what it was."""

  def fn(read, write):
    (grad,), (moment,) = read, write
    old = moment.dequantize(jnp.float32)
    new = encode_finite(factor * old + grad.astype(jnp.float32), moment.codebook, moment.block)
    return [new, old.astype(grad.dtype)]

  return fn


def lowered_for_cuda(fn, *args):
  """The program of `fn` for an H200, which need not be here."""
  kind = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
  axis = (jax.sharding.AxisType.Auto,)
  mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=axis, abstract_device=kind)
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


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


@pytest.mark.parametrize("codebook", ["log8", "log8_unsigned", "log4", "log4_unsigned"])
@pytest.mark.parametrize("rows", [64, 37])
def test_lowers_for_cuda(codebook, rows):
  moment, grad = stored((rows, 192), codebook), jnp.ones((rows, 192), jnp.bfloat16)

  def update(grad, moment, factor):
    return map_blocks(decay(factor), [grad], [moment], [grad_form(grad)])

  text = lowered_for_cuda(update, grad, moment, jnp.float32(0.9))
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
    (lambda: lowmem.quantize(jnp.ones((4, 256)), "log8", 64, True), "its scales are quantized"),
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
  assert "2147483648 elements" in supports([], [moment])


def test_refuses_dtypes_that_triton_lacks():
  assert "dtype int32" in supports([jnp.ones((4, 64), jnp.int32)], [stored((4, 64))])


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
    return [encode_finite(op(write[0].dequantize(jnp.float32)), LOG8, (64,))]

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
  assert "has no Triton backend of Pallas" in supports([], [stored((4, 64))])


# ------------------------------------------------------------------------------ the setting


def test_setting(monkeypatch):
  monkeypatch.delenv("OPTAX_LOWMEM_KERNELS", raising=False)
  assert kernels.setting() == "xla"
  monkeypatch.setenv("OPTAX_LOWMEM_KERNELS", "Auto")
  assert kernels.setting() == "auto"
  monkeypatch.setenv("OPTAX_LOWMEM_KERNELS", "cuda")
  with pytest.raises(ValueError, match=r"`OPTAX_LOWMEM_KERNELS` must be one of .*, got 'cuda'"):
    kernels.setting()


def chosen(moment):
  """`kernels.update` of one moment; the kernel doubles it, XLA does not."""

  def on_blocks(tiles):
    new = encode_finite(2 * tiles[1].dequantize(jnp.float32), LOG8, tiles[1].block)
    return {1: new, 0: tiles[0].astype(jnp.bfloat16)}

  def otherwise(values):
    return {1: values[1], 0: values[0].astype(jnp.bfloat16)}

  def update(grad, moment):
    results = {1: moment, 0: jax.ShapeDtypeStruct(grad.shape, jnp.bfloat16)}
    return kernels.update(on_blocks, {0: grad, 1: moment}, results, otherwise)

  return update, jnp.ones(moment.shape), moment


@pytest.mark.parametrize(("mode", "factor"), [("", 1), ("xla", 1), ("auto", 1), ("interpret", 2)])
def test_choice_on_a_cpu(monkeypatch, mode, factor):
  monkeypatch.setenv("OPTAX_LOWMEM_KERNELS", mode)
  update, grad, moment = chosen(stored((4, 64)))
  new = jax.jit(update)(grad, moment)
  np.testing.assert_array_equal(new[1].scales, factor * moment.scales)


@pytest.mark.parametrize(("mode", "count"), [("xla", 0), ("auto", 1), ("pallas", 1)])
def test_choice_for_cuda(monkeypatch, mode, count):
  monkeypatch.setenv("OPTAX_LOWMEM_KERNELS", mode)
  text = lowered_for_cuda(*chosen(stored((4, 64))))
  assert text.count("__gpu$xla.gpu.triton") == count


def test_ragged_rows_are_left_to_xla_or_refused(monkeypatch):
  update, *args = chosen(stored((4, 65)))
  monkeypatch.setenv("OPTAX_LOWMEM_KERNELS", "auto")
  assert NAME not in lowered_for_cuda(update, *args)
  monkeypatch.setenv("OPTAX_LOWMEM_KERNELS", "pallas")
  match = r"a parameter of shape \(4, 65\): rows of 65 .* Set it to 'auto'"
  with pytest.raises(ValueError, match=match):
    jax.jit(update).lower(*args)


def test_insisting_on_a_cpu_raises(monkeypatch):
  monkeypatch.setenv("OPTAX_LOWMEM_KERNELS", "pallas")
  update, *args = chosen(stored((4, 64)))
  with pytest.raises(ValueError, match="interpret mode"):
    jax.jit(update).lower(*args)


# --------------------------------------------------------------------- through the optimizer


def compiled_step(tx, mode, monkeypatch):
  monkeypatch.setenv("OPTAX_LOWMEM_KERNELS", mode)
  params = jnp.ones((1024, 512))

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = jax.jit(tx.init)(params)
  return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


@engine
def test_a_cpu_program_is_the_same_with_auto(monkeypatch):
  memory = [
    compiled_step(lowmem.adamw(1e-3), mode, monkeypatch).memory_analysis().temp_size_in_bytes
    for mode in ("xla", "auto")
  ]
  assert memory[0] == memory[1]


@engine
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("make", [lowmem.adamw, lowmem.lion, lowmem.rmsprop])
def test_optimizers_lower_for_cuda(monkeypatch, make, bits):
  tx = make(1e-3, bits=bits)
  params = {"w": jnp.ones((96, 192), jnp.bfloat16), "b": jnp.ones(64), "r": jnp.ones((100, 70))}
  state = tx.init(params)
  monkeypatch.setenv("OPTAX_LOWMEM_KERNELS", "auto")
  text = lowered_for_cuda(tx.update, params, state, params)
  assert text.count("__gpu$xla.gpu.triton") == 1  # "w"; "b" is dense, and "r" ragged


@engine
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
