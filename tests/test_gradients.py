"""Derivatives through an optimizer's own updates: those of float32, or an error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from registry import PHASED, every, make, small_tiles

X = jnp.sin(jnp.arange(128.0))  # of a width that kernels take
PARAMS = {"w": 0.1 * jnp.cos(jnp.arange(64 * 128.0).reshape(64, 128))}


def after(rule, steps, weight, lr):
  """The loss after so many steps, made of a loss that has a weight of its own."""
  tx, params = rule(lr), PARAMS
  state = tx.init(params)

  def loss(params, weight):
    return jnp.mean((weight * (params["w"] @ X) - 1.0) ** 2)

  for _ in range(steps):
    grads = jax.grad(loss)(params, weight)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return loss(params, 1.0)


def derivative(rule, steps, argnum):
  return jax.jit(jax.grad(lambda *x: after(rule, steps, *x), argnum))(1.3, 1e-2)


# Their momentum is of updates that the learning rate has multiplied already.
KEEP_THE_RATE = ("lars", "adafactor")


@pytest.mark.parametrize("name", [*PHASED, "adamw-4"])
def test_by_the_learning_rate_after_one_step_it_is_that_of_32_bits(name):
  """Updates are made of moments before these are rounded, and so is their derivative."""
  if name.startswith(KEEP_THE_RATE):
    with pytest.raises(TypeError, match="stored in 8 or 4 bits"):
      derivative(lambda lr: make(name, lr), 1, 1)
    return
  eight, full = (derivative(lambda lr, b=b: make(name, lr, **b), 1, 1) for b in ({}, {"bits": 32}))
  np.testing.assert_allclose(eight, full, rtol=1e-3)


@pytest.mark.parametrize("name", ["adamw-8", "lion-4", "rmsprop-8"])
def test_of_large_arrays_it_is_the_same(name):
  """Which are updated in loops over tiles, that carry updates along with moments."""
  with small_tiles():
    eight = derivative(lambda lr: make(name, lr), 1, 1)
  np.testing.assert_allclose(eight, derivative(lambda lr: make(name, lr, bits=32), 1, 1), rtol=1e-3)


@every
@pytest.mark.parametrize("argnum", [0, 1], ids=["loss", "rate"])
def test_through_what_is_stored_it_is_refused(name, argnum):
  with pytest.raises(TypeError, match=r"stored in 8 or 4 bits .* `bits=32`"):
    derivative(lambda lr: make(name, lr), 1 + argnum, argnum)


def test_in_float32_it_is_that_of_optax():
  ours, optaxs = (
    derivative(lambda lr, sgd=sgd: sgd(lr, momentum=0.9), 3, 0)
    for sgd in (functools.partial(lowmem.sgd, bits=32), optax.sgd)
  )
  np.testing.assert_allclose(ours, optaxs, rtol=1e-5)


@pytest.mark.parametrize("argnum", [0, 1], ids=["loss", "rate"])
def test_through_pages_it_is_refused(argnum):
  with pytest.raises(TypeError, match=r"handed to `offloaded` .* leave `offloaded` out"):
    derivative(lambda lr: lowmem.offloaded(optax.adam(lr)), 1, argnum)


@pytest.mark.parametrize("codebook", ["dynamic", "nf4", "power8", "log4"])
def test_quantize_is_refused(codebook):
  with pytest.raises(TypeError, match=r"carry no derivative.* `jax.lax.stop_gradient`"):
    jax.grad(lambda x: lowmem.quantize(x, codebook).dequantize().sum())(X)
  stopped = jax.grad(lambda x: (x * lowmem.quantize(jax.lax.stop_gradient(x)).dequantize()).sum())
  np.testing.assert_array_equal(stopped(X), lowmem.quantize(X).dequantize())


def test_forward_mode_too():
  with pytest.raises(TypeError, match="stored in 8 or 4 bits"):
    jax.jvp(lambda w: after(lowmem.adam, 1, w, 1e-2), (1.3,), (1.0,))
