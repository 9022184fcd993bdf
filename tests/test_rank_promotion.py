"""Nothing is broadcast between ranks, where JAX is told to raise at it."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest

import optax_lowmem as lowmem
from optax_lowmem._programs.phases import in_phases
from optax_lowmem._quantization.codebooks import _CODEBOOKS
from registry import REGISTRY, SHAPES, adamw, by_method, make, small_tiles, tree


@pytest.fixture(autouse=True)
def _raise():
  with jax.numpy_rank_promotion("raise"):
    yield


def traced(tx, update=None, shapes=SHAPES):
  """Traces the start and an update of each kind of array; nothing is computed."""
  params = jax.eval_shape(lambda: tree(0, shapes=shapes))
  update = update or tx.update
  jax.eval_shape(lambda params: update(params, tx.init(params), params), params)


@by_method(REGISTRY)
def test_updates(name, how):
  tx = make(name)
  with small_tiles() if how == "tiles" else contextlib.nullcontext():
    traced(tx, functools.partial(in_phases, tx.update) if how == "phases" else None)


@adamw
def test_kernels_and_pages(name):
  with lowmem.kernels.using("interpret"):
    traced(make(name), shapes={"w": (64, 128)})
  traced(lowmem.offloaded(make(name), max_bytes=40_000))


@pytest.mark.parametrize("double", [False, True], ids=["", "double"])
@pytest.mark.parametrize("codebook", _CODEBOOKS)
def test_quantize(codebook, double):
  for shape in ((130,), (3, 130), (2, 3, 64)):
    q = lowmem.quantize(jnp.ones(shape), codebook, 64, double)
    assert q.dequantize().shape == shape
    assert jax.vmap(lambda q: q.dequantize())(jax.tree.map(lambda x: x[None], q)).shape[1:] == shape


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_layers(kind):
  nnx, nn = pytest.importorskip("flax.nnx"), pytest.importorskip("optax_lowmem.nn")
  model = nn.quantize_model(nnx.Sequential(nnx.Linear(64, 128, rngs=nnx.Rngs(0))))
  model = nn.add_lora(model, rank=4, alpha=8, targets=".*", rngs=nnx.Rngs(0), **kind)
  for shape in ((64,), (2, 64), (2, 3, 64)):
    of_lora = nnx.DiffState(0, nnx.LoRAParam)
    nnx.grad(lambda m, shape=shape: m(jnp.ones(shape)).sum(), argnums=of_lora)(model)
