"""The recipes of docs/mixed_precision.md run, and train."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from doc_pages import blocks

PAGE = "docs/mixed_precision.md"
SET_UP, *RECIPES = [block.text for block in blocks(PAGE, "python")]
DTYPES = {"bf16 activations": "float32", "bf16 parameters": "bfloat16", "fp16": "float32"}
NAMES = [*DTYPES, "micro-batches"]


def run(recipe):
  found: dict[str, Any] = {}
  for text in (SET_UP, RECIPES[recipe]):
    exec(compile(text, PAGE, "exec"), found)
  return found


def batch(seed=0):
  normal = np.random.default_rng(seed).standard_normal
  return jnp.asarray(normal((16, 64)), jnp.float32), jnp.asarray(normal((16, 32)), jnp.float32)


def test_every_recipe_is_run():
  assert len(RECIPES) == 5


@pytest.mark.parametrize("recipe", range(4), ids=NAMES)
def test_recipes_train(recipe):
  found = run(recipe)
  params, state, data = found["params"], found["state"], batch()
  before, moved = float(found["loss_fn"](params, data)), []
  for _ in range(80):
    params, state, last = found["step"](params, state, data)
    moved.append(last)
  assert float(found["loss_fn"](params, data)) < 0.9 * before
  assert params["up"].dtype == DTYPES.get(NAMES[recipe], "float32")
  if NAMES[recipe] == "micro-batches":
    assert [bool(x) for x in moved] == [False, False, False, True] * 20
  if NAMES[recipe] == "fp16":
    assert int(state.skipped_steps) < 20


def test_all_together():
  """A bad micro-batch is left out, and parameters move in every fourth of the others."""
  found = run(4)
  params, state, tx, apply = (found[name] for name in ("params", "state", "tx", "apply"))

  @jax.jit
  def step(params, state, data, bad):
    def scaled(params):
      x, y = data
      loss = ((apply(params, x).astype(jnp.float32) - y) ** 2).mean() + bad
      return lowmem.scale_loss(loss * (1 + bad), state)

    updates, state = tx.update(jax.grad(scaled)(params), state, params)
    return optax.apply_updates(params, updates), state

  moved = []
  for t in range(9):
    new, state = step(params, state, batch(t), jnp.inf if t == 2 else 0.0)
    moved.append(bool(np.any(new["up"] != params["up"])))
    params = new
  assert moved == [False] * 4 + [True] + [False] * 3 + [True]
