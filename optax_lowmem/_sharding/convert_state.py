"""States in other forms, and as numbers, wherever they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_lowmem._arguments.nnx_boxes import boxed_as, unbox
from optax_lowmem._host_memory.paged_state import paged, unpaged
from optax_lowmem._quantization.array import QuantizedArray, encode
from optax_lowmem._sharding.shards import on_shards
from optax_lowmem._state.moments import is_quantized


def convert_state(
  state: Any,
  from_tx: optax.GradientTransformation,
  to_tx: optax.GradientTransformation,
  params: Any,
) -> Any:
  """Converts a state between two forms of one optimizer.

  Between any two of 32, 8 and 4 bits, codebooks, block sizes and `min_size`s, paged by `offloaded`
  or not. Moments that both hold in the same form are taken as they are; others are rounded once.
  Counts, schedules and what else belongs to the optimizer is kept, so both must have the same
  rules, in the same order.

  Args:
    state: a state of `from_tx`; of an `nnx.Optimizer` its `opt_state`.
    from_tx: the transformation that it is of.
    to_tx: the transformation that it is to be of.
    params: the parameters, which say how `to_tx` lays out its state.

  Returns:
    A state of `to_tx`, where `to_tx.init(params)` would put it, and in boxes of Flax NNX where that
    has them. Into a new `nnx.Optimizer` it goes by ``nnx.update(optimizer.opt_state,
    nnx.state(nnx.as_pure(state)))``.

  Raises:
    ValueError: if `state` is none of `from_tx`, or the two have different rules, or keep master
      weights (`master_weights`) in different bits; between `optax.MultiSteps` and `multi_steps`, in
      the midst of a step.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params = jnp.zeros((64, 64))
    >>> old, new = optax.adamw(1e-3), lowmem.adamw(1e-3, bits=8)
    >>> state = lowmem.convert_state(old.init(params), old, new, params)
    >>> state[0].mu
    QuantizedArray(float32[64,64], codebook='power8', block=64)
  """
  expected = unbox(jax.eval_shape(lambda p: unpaged(from_tx.init(p)), params))
  source = unpaged(unbox(state))
  _compare("`state`", source, "`from_tx`", expected)
  like = to_tx.init(params)
  target = unbox(jax.eval_shape(unpaged, like))
  sources, source_def = jax.tree.flatten(source, is_leaf=is_quantized)
  targets, target_def = jax.tree.flatten(target, is_leaf=is_quantized)
  _compare(
    "`from_tx`",
    source_def.unflatten([0] * len(sources)),
    "`to_tx`",
    target_def.unflatten([0] * len(targets)),
  )
  _refuse_open_sums(source, target)
  return paged(target_def.unflatten(map(_converted, sources, targets)), like)


def _refuse_open_sums(source: Any, target: Any) -> None:
  """Raises ValueError where a running mean would be taken for a sum, or a sum for a mean.

  `optax.MultiSteps` holds means, in float32, and `multi_steps` sums, in few bits. After a step both
  are zero.
  """

  def is_open(x):
    return isinstance(x, optax.MultiStepsState)

  found = ([x for x in jax.tree.leaves(t, is_leaf=is_open) if is_open(x)] for t in (source, target))
  for x, like in zip(*found, strict=True):  # of one structure
    if isinstance(x.mini_step, Tracer):
      continue
    if _in_float32(x.acc_grads) != _in_float32(like.acc_grads) and np.any(x.mini_step):
      raise ValueError(
        f"`state` is in the midst of a step, {x.mini_step} gradients have been accumulated, and "
        "`optax.MultiSteps` holds their mean where `multi_steps` in 8 or 16 bits holds their sum. "
        "Convert it after a step, when `has_updated(state)` is True."
      )


def _in_float32(tree: Any) -> bool:
  leaves = jax.tree.leaves(tree, is_leaf=is_quantized)
  return not any(is_quantized(x) or x.dtype != jnp.float32 for x in leaves)


def _converted(x: Any, like: Any) -> Any:
  """A moment in the form of `like`."""
  if (
    is_quantized(x) and is_quantized(like) and (x.codebook, x.block) == (like.codebook, like.block)
  ):
    return x
  if not is_quantized(like):
    value = _values(x) if is_quantized(x) else x
    # Of integers only remainders of masters differ: those of 16 and of 8 bits are not one number.
    if {value.dtype, like.dtype} == {jnp.dtype(jnp.int16), jnp.dtype(jnp.int8)}:
      raise ValueError(
        f"`from_tx` keeps {value.dtype} of the master weights and `to_tx` {like.dtype}, which only "
        "parameters and state together tell. Read them, `weights = master_params(params, state)`, "
        "and set them in a new state: `with_master_params(weights, params, to_tx.init(params))`."
      )
    return value.astype(like.dtype)

  def stored(x: Any) -> Any:
    value = x.dequantize(jnp.float32) if is_quantized(x) else x.astype(jnp.float32)
    return encode(value, like.codebook, like.block)

  return _on_shards(stored, x, like)


def _values(x: QuantizedArray) -> jax.Array:
  """The numbers that an array holds."""
  made = jax.ShapeDtypeStruct(x.shape, jnp.float32)
  return _on_shards(lambda x: x.dequantize(jnp.float32), x, made)


def _on_shards(fn: Callable[[Any], Any], x: Any, made: Any) -> Any:
  """`fn(x)`, which is as `made`: of shards, whose blocks may be of several rows, by each device.

  On a mesh of explicit axes JAX joins no axes that are cut, as blocks of several rows need it.
  """
  if isinstance(x, QuantizedArray) and isinstance(x.scales, QuantizedArray):
    return fn(x)
  return on_shards(lambda values, _: {1: fn(values[0])}, {0: x}, {}, {1: made})[1]


def _compare(name: str, tree: Any, other_name: str, other: Any) -> None:
  """Raises ValueError unless two trees have the same leaves."""
  paths, others = (
    {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(x)[0]}
    for x in (tree, other)
  )
  if paths != others:
    only, missing = sorted(paths - others), sorted(others - paths)
    counts = all(path.endswith("count") for path in (*only, *missing))
    why = " A schedule has a count in its state, where a number has none." if counts else ""
    raise ValueError(
      f"{name} and {other_name} do not belong together: {only[:3]} are in {name} only, "
      f"{missing[:3]} in {other_name} only. Both must be the same rules in the same order.{why}"
    )


def dequantized(tree: Any) -> Any:
  """The values of a tree: a float32 array in the place of each `QuantizedArray`, pages fetched.

  For logging, and for functions that would take codes for numbers: ``optax.tree.norm(state)`` adds
  up codes. All of it is in device memory at once.

  Args:
    tree: a state, or any tree.

  Returns:
    The tree with arrays in the place of `QuantizedArray` and `Paged`; in boxes where Flax NNX has
    boxes around what these are made of.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> q = lowmem.quantize(jnp.full((8, 64), 0.5))
    >>> round(float(optax.tree.norm(lowmem.dequantized({"mu": q}))), 3)
    11.314
  """

  def one(x):
    return boxed_as(_values(unbox(x)), x) if is_quantized(x) else x

  return jax.tree.map(one, unpaged(tree), is_leaf=is_quantized)
