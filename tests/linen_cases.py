"""What the tests of the Linen half share."""

import jax
import numpy as np

from programs import temporaries_of


def equal(got, want):
  """The same trees, bit for bit."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def gradient_temporaries(apply, variables, x):
  """Bytes that the gradient of adapters, compiled for these shapes, needs beside its arguments."""

  @jax.jit
  def gradient(lora, variables, x):
    return jax.grad(lambda lora: (apply({**variables, "lora": lora}, x) ** 2).mean())(lora)

  compiled = gradient.lower(variables["lora"], variables, x).compile()
  return temporaries_of(compiled)


def trained(state, loss, base):
  """A train state after 30 steps on `loss(adapters, base)`, and the losses."""

  @jax.jit
  def step(state, base):
    value, grads = jax.value_and_grad(loss)(state.params, base)
    return state.apply_gradients(grads=grads), value

  losses = []
  for _ in range(30):
    state, value = step(state, base)
    losses.append(float(value))
  return state, losses
