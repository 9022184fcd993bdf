"""Where a transformation stands: within what would not leave its state in host memory."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import jax
import optax

from optax_lowmem._steps.loss_scaling import loss_scaling
from optax_lowmem._steps.multi_steps import multi_steps


def _never(step: Any, **extra_args: Any) -> Any:
  del step, extra_args
  return False


# What chooses element by element, or by a condition. Of state in host memory, XLA's GPU backend
# would do the first on the host ("very slow", it warns), and copy all of it for the second.
_CHOOSES = {
  "lowmem.loss_scaling": loss_scaling(optax.identity()),
  "lowmem.multi_steps": multi_steps(optax.identity(), 1),
  "optax.MultiSteps": (optax.MultiSteps.init, optax.MultiSteps.update),
  "optax.apply_if_finite": optax.apply_if_finite(optax.identity(), 1),
  "optax.conditionally_mask": optax.conditionally_mask(optax.identity(), _never),
  "optax.conditionally_transform": optax.conditionally_transform(optax.identity(), _never),
}
_EVAL_SHAPE = inspect.unwrap(jax.eval_shape).__code__
_NAMES = {getattr(f, "__code__", None): name for name, pair in _CHOOSES.items() for f in pair}


def check_outermost() -> None:
  """Refuses a call from within a transformation that chooses between old and new state.

  Raises:
    ValueError: if it is.
  """
  for code in _callers():
    name = _NAMES.get(code)
    if name is not None:
      raise ValueError(
        f"`offloaded` stands within `{name}`, which chooses between old and new state: on a GPU, "
        "all of it would be copied in host memory in every step. Swap them: "
        f"`offloaded({name}(tx, …))`."
      )


def check_keeps_memory(tree: Any) -> None:
  """Refuses arrays of a function whose results JAX would put on the device, wherever they are.

  Raises:
    ValueError: if they are those of `jax.pmap`, or of a `jax.shard_map` that is not compiled.
  """
  within = None
  if any(type(x).__name__ == "ShardMapTracer" for x in jax.tree.leaves(tree)):
    within = "a `jax.shard_map` outside of `jax.jit`"
  elif _code_of_pmap() in _callers():
    within = "`jax.pmap`"
  if within:
    raise ValueError(
      f"`offloaded` stands within {within}, where JAX leaves all results in device memory. Use "
      "`jax.jit(jax.shard_map(…, check_vma=False))`, or `jax.jit` with sharded arrays."
    )


def _callers() -> Iterator[Any]:
  """The code objects of all functions that are being called."""
  frame: Any = sys._getframe(1)
  while frame is not None:
    yield frame.f_code
    frame = frame.f_back


@functools.cache
def _code_of_pmap() -> Any:
  return jax.pmap(_never).__code__


def in_eval_shape() -> bool:
  """Whether this call is from within `jax.eval_shape`, whose shapes need not name a memory."""
  return _EVAL_SHAPE in _callers()
