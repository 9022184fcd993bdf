"""The methods by which a plan is executed, and which of them runs where.

- `kernel`: one launch decodes, applies the rule, encodes and leaves the update. On CUDA and TPUs,
  which each have their own.
- `tiles`: a loop over parts that stay in a CPU's cache.
- `phases`: whole arrays, for XLA to fuse: one pass for the maxima of blocks, one for the rest. On
  GPUs, where there is no kernel: 437 launches of tiles became 9 for an array of
  4096 x 4096, and 4.2 B/param of temporaries 1.2 (compiled for an H100).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optax_lowmem._programs.fences import fence
from optax_lowmem._programs.leaf_plan import LeafPlan, Tile, is_integer
from optax_lowmem._programs.phases import in_a_phase, in_phases
from optax_lowmem._quantization.scales import single_maximum
from optax_lowmem._quantization.tangents import derivative
from optax_lowmem._state.moments import is_quantized
from optax_lowmem._update.block_rows import map_rows
from optax_lowmem._update.tile_loop import map_tiles
from optax_lowmem.kernels import _choice, _guard


def run(plan: LeafPlan, env: Mapping[int, Any], values: Mapping[int, Tile]) -> dict[int, Tile]:
  """The update and the new moments, by position, by the method that fits the platform.

  Args:
    plan: what is to be done.
    env: what the rule's shared part gave.
    values: by position.

  Raises:
    ValueError: if the kernel was asked for and cannot do it.
  """

  def differentiable(execute, values):
    """`execute(env, values)`, with the derivative of what it does by another method.

    A kernel has none. A loop over tiles has that of all that it carries: with an update in its
    gradient's place, moments would seem to depend on the learning rate.
    """
    traced = {i: env[i] for i in plan.scalars if isinstance(env[i], Tracer)}
    # JAX keeps these functions with the program: tracers that they held would be leaks.
    fixed = {i: x for i, x in env.items() if not isinstance(x, Tracer)}

    @jax.custom_jvp
    def launch(traced, values):
      return execute({**fixed, **traced}, values)

    def launch_jvp(primals, tangents):
      def same(traced, values):
        return _on(map_rows, plan, {**fixed, **traced}, values)

      return derivative(same, primals, tangents)

    launch.defjvp(launch_jvp, symbolic_zeros=True)
    return launch(traced, values)

  def tiles(values):
    return differentiable(functools.partial(_on, map_tiles, plan), values)

  def whole(values):
    with single_maximum():
      return _on(map_rows, plan, env, values)

  def phases(values):
    return in_phases(whole, values)

  def undivided(values):  # a TPU cannot split its lanes for less than a copy
    with single_maximum():
      return _on(lambda fn, reads, writes: fn(reads, writes), plan, env, values)

  def kernel(platform, values, interpret=False):
    def execute(known, values):
      values = _tied(plan, values) if platform == "cuda" else values
      given = _kernel_arguments(plan, plan.step(known, finished=False), values)
      *moments, update = _choice.map_blocks(*given, platform=platform, interpret=interpret)
      update = plan.finish(known, values, update)
      return dict(zip((*plan.moving, plan.leaf), (*moments, update), strict=True))

    return differentiable(execute, values)

  values, mode = dict(values), _choice.setting()
  if in_a_phase():
    return whole(values)
  if mode in ("pallas", "interpret"):
    here = "tpu" if mode == "pallas" and jax.default_backend() == "tpu" else "cuda"
    if reason := reason_against_kernel(here, plan, env, values):
      raise ValueError(
        f"kernels are set to {mode!r}, which cannot update a parameter of shape "
        f"{plan.update.shape}: {reason}. Set them to 'auto' to leave such parameters to XLA."
      )
    return kernel(here, values, interpret=mode == "interpret")
  methods = {"cpu": tiles, "tpu": undivided}
  for platform in _choice.platforms():
    if not reason_against_kernel(platform, plan, env, values):
      methods[platform] = functools.partial(kernel, platform)
  # To trace phases takes as long as a kernel: they are left out where nothing would run them.
  unneeded = "cuda" in methods and not _choice.other_platforms()
  return jax.lax.platform_dependent(values, **methods, default=tiles if unneeded else phases)


def reason_against_kernel(
  platform: str, plan: LeafPlan, env: Mapping[int, Any], values: Mapping[int, Tile]
) -> str | None:
  """Why a parameter is not updated by the kernel of a platform; None if it is."""
  mode = _choice.setting()
  if mode == "xla":
    return "kernels are switched off"
  given = _kernel_arguments(plan, plan.step(env, finished=False), values)
  if reason := _choice.refusal(*given, platform=platform):
    return reason
  if mode == "auto" and not _guard.trusted():
    return f"its results differ from those of XLA on {jax.devices()[0].device_kind}"
  return None


def _tied(plan: LeafPlan, values: Mapping[int, Tile]) -> dict[int, Tile]:
  """`values`, the gradient not before the last moment's scales, of rules with several moments.

  It changes nothing but how XLA orders a training step, which is then as with optax. Left alone, it
  elides more of the copies of parameters that it makes (8 B/param), but keeps activations longer:
  AdamW in 8 bits had 0.19 B/param more temporaries than optax.adamw, AdEMAMix 0.37 (16 matrices of
  2048 x 2048, 256 rows, H100); now 0.03 and 0.06.
  """
  quantized = [k for k in plan.moving if is_quantized(values[k])]
  if sum(not is_integer(values[k]) for k in plan.moving) < 2:
    return dict(values)
  last, leaf = quantized[-1], plan.leaf
  gradient, scales = fence((values[leaf], values[last].scales))
  return {**values, leaf: gradient, last: dataclasses.replace(values[last], scales=scales)}


def _on(execute: Any, plan: LeafPlan, env: Mapping[int, Any], values: Mapping[int, Tile]) -> Any:
  step = plan.step(env)
  writes = [values[k] for k in step.writes]
  writes += [jnp.zeros(x.shape, x.dtype) for x in step.fresh]
  new = execute(step.fn, [values[k] for k in step.reads], writes)
  return dict(zip((*plan.moving, plan.leaf), new, strict=True))


def _kernel_arguments(plan: LeafPlan, step: Any, values: Mapping[int, Tile]) -> tuple[Any, ...]:
  reads, writes = ([values[k] for k in keys] for keys in (step.reads, step.writes))
  return step.fn, reads, writes, step.fresh
