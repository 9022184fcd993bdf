"""The kernel's results against XLA's, once a process, before a GPU or TPU runs it.

No card had run the kernel when it was made the default. So each process that has a GPU or a TPU
compares it with XLA on a small array, and does without it where the two differ.
"""

from __future__ import annotations

import concurrent.futures
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowmem._programs.leaf_plan import LeafPlan
from optax_lowmem._programs.program import Program
from optax_lowmem._quantization.array import encode
from optax_lowmem._quantization.codebooks import get_codebook
from optax_lowmem.kernels import _choice

# Of a GPU's kernel five tiles, the last of which is not full; of a TPU's two, with rows past the
# edge and scales that lie as their transpose.
_SHAPES = {"cuda": (160, 64), "tpu": (160, 768)}


def trusted() -> bool:
  """Whether the kernel may be used: where there is a card, whether its results are those of XLA."""
  return (platform := _platform()) is None or _agrees(platform)


def _platform() -> str | None:
  """The platform of this process' cards, if there is a kernel for it."""
  if jax.default_backend() == "tpu":
    return "tpu"
  if jax.default_backend() != "gpu":
    return None
  try:
    return "cuda" if jax.devices("cuda") else None
  except RuntimeError:  # AMD's
    return None


@functools.cache
def _agrees(platform: str) -> bool:
  try:
    # In a thread of its own there is no trace: updates are as a rule traced when this is asked.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
      reason = thread.submit(difference, platform).result()
  except Exception as error:  # a kernel that does not compile must not stop a training run
    reason = f"{type(error).__name__}: {error}"
  if reason:
    warnings.warn(
      f"The kernel of optax_lowmem is switched off: on {jax.devices()[0].device_kind} with jax "
      f"{jax.__version__} its results are not those of XLA ({reason}). Updates are made by XLA, "
      f"with more launches. Please report this line to the project.",
      stacklevel=2,
    )
  return not reason


def difference(platform: str) -> str | None:
  """How two steps of 8- and 4-bit Adam by the kernel differ from those by XLA; None if they agree.

  A multiplication and an addition may be one operation in one program and two in the other. So a
  value between two codes may take either of them, and a scale may be an ulp off.
  """
  for bits in (8, 4):
    for ours, theirs in zip(*(_steps(bits, platform, k) for k in (True, False)), strict=True):
      ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
      if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return f"{bits} bits: shape {ours.shape}, finite {np.isfinite(ours).all()}"
      off = np.abs(ours - theirs) > 1e-5 * np.abs(theirs) + 1e-12
      if off.mean() > 0.002:
        return f"{bits} bits: {off.mean():.1%} of the elements of an array differ"
  return None


def _adam(grad: jax.Array, mu: jax.Array, nu: jax.Array) -> tuple[jax.Array, ...]:
  mu, nu = 0.9 * mu + 0.1 * grad, 0.999 * nu + 0.001 * grad * grad
  return mu / (jnp.sqrt(nu) + 1e-8), mu, nu


def _steps(bits: int, platform: str, by_kernel: bool) -> list[jax.Array]:
  """Updates and moments of two steps."""
  shape = _SHAPES[platform]
  program = Program(_adam, [jax.ShapeDtypeStruct(shape, jnp.float32)] * 3, [0, 0, 0])
  books = [get_codebook(f"power{bits}{sign}") for sign in ("", "_unsigned")]

  @jax.jit
  def step(*values):
    plan = LeafPlan(program, 0, [1, 2], dict(enumerate(values)), jnp.float32)
    fn, _, writes, _ = plan.step(program.run_shared(values))
    arrays = [values[k] for k in writes]
    if by_kernel:
      return _choice.map_blocks(fn, [], arrays, [], platform=platform)
    return fn([], arrays)

  scale = jnp.exp2(jnp.arange(shape[1]) % 23 - 11.0)
  moments, found = [encode(jnp.zeros(shape), book, (64,)) for book in books], []
  for seed in (0, 1):
    grads = jax.random.normal(jax.random.key(seed), shape) * scale
    *moments, update = step(grads, *moments)
    found += jax.tree.leaves((update, moments))
  return found
