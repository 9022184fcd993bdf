"""Transformations that call back to Python."""

import contextlib

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import io_callback

import optax_lowmem as lowmem
from registry import LR, by_rows

CALLBACKS = {
  "io": lambda f, x: io_callback(f, None, x),
  "debug": jax.debug.callback,
  "in a condition": lambda f, x: jax.lax.cond(x > 0, lambda: io_callback(f, None, x), lambda: None),
}


@pytest.mark.parametrize("how", [contextlib.nullcontext, by_rows], ids=["at once", "by rows"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_are_called_once(name, how):
  """Of gradients, and of the state that rests on the host."""
  seen, call = [], CALLBACKS[name]

  def update(updates, state, params=None):
    del params
    call(lambda x: seen.append(("gradient", float(x))), updates["w"].max())
    call(lambda x: seen.append(("trace", float(x))), 1 + state[0].trace["w"].max())
    return updates, state

  spy = optax.GradientTransformation(lambda params: (optax.TraceState(params),), update)
  params = {"w": jnp.full((256, 192), 2.0)}
  tx = lowmem.offloaded(optax.chain(spy, optax.adam(LR)), max_bytes=40_000)
  state = tx.init(params)
  with how():
    _, state = jax.jit(tx.update)(params, state, params)
    jax.effects_barrier()
  assert sorted(seen) == [("gradient", 2.0), ("trace", 3.0)]


@pytest.mark.parametrize("call", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", ["io", "debug"])
def test_ordered_callbacks_are_refused(name, call):
  """When JAX compiles one beside arrays in host memory, this test fails and they can be allowed."""

  def tell(x):
    if name == "io":
      io_callback(lambda x: None, None, x, ordered=True)
    else:
      jax.debug.print("{}", x, ordered=True)

  def update(updates, state, params=None):
    del params
    tell(updates["w"].max())
    return updates, state

  params = {"w": jnp.ones((64, 96))}
  tx = optax.chain(optax.GradientTransformation(optax.init_empty_state, update), optax.adam(LR))
  call(lowmem.quantized(tx).update)(params, lowmem.quantized(tx).init(params), params)
  paged = lowmem.offloaded(tx)
  with pytest.raises(ValueError, match=r"ordered callback.*Pass `ordered=False`"):
    call(paged.update)(params, paged.init(params), params)
  host = jax.device_put(params["w"], jax.memory.Space.Host)
  with pytest.raises(ValueError, match="safe_zip"):
    jax.jit(lambda x: (tell(1.0), x))(host)
