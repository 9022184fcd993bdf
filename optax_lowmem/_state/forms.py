"""The forms in which a state is held: compared with what a transformation holds, and converted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_lowmem._host_memory.paged_state import paged, unpaged
from optax_lowmem._quantization.array import QuantizedArray, encode
from optax_lowmem._quantization.codebooks import get_codebook
from optax_lowmem._quantization.storage import Blockwise, Storage, block_shape
from optax_lowmem._state.moments import Place, is_quantized, places


def check_forms(
  state: Any, updates: Any, storage_of: Callable[[Any, Place], Storage | None], masked: bool
) -> None:
  """Compares the forms of moments with those in which a transformation holds them.

  Args:
    state: the state; of each array, shape and dtype are enough.
    updates: a tree with the structure and the shapes of the parameters.
    storage_of: given the state and a place in it, the storage of what stands there.
    masked: whether some moments may be held in float32 that are large enough for codes.

  Raises:
    ValueError: naming the first that is held otherwise.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_quantized)
  for (path, x), place in zip(flat, places(state, updates), strict=True):
    if is_quantized(x):
      _check_dtypes(path, x)
    if place.owner is None:  # no moment, or of gradients that do not fit: `gradients` says so
      continue
    storage = storage_of(state, place)
    if is_quantized(x) and not masked and (storage is None or not _is_form_of(x, storage)):
      held = f"in {x.codebook.name!r} codes and blocks of {math.prod(x.block)}"
    elif not is_quantized(x) and not masked and _would_quantize(storage, x):
      held = f"in {x.dtype}"
    else:
      continue
    wanted = "in float32"
    if isinstance(storage, Blockwise):
      name = get_codebook(storage.codebook).name
      wanted = f"in {name!r} codes and blocks of {storage.block_size} or more"
    raise ValueError(
      f"the state holds {jax.tree_util.keystr(path)} {held}, and this transformation {wanted}: it "
      "was made by another one, or with other arguments. Convert it once with "
      "`convert_state(state, from_tx, to_tx, params)`."
    )


def _check_dtypes(path: Any, x: QuantizedArray) -> None:
  for name, part, dtype in (("codes", x.codes, "uint8"), ("scales", x.scales, "float32")):
    if part.dtype != dtype:
      raise ValueError(
        f"the state holds {jax.tree_util.keystr(path)} with {name} in {part.dtype}: {name} are "
        f"{dtype} and were cast. Leave them out where a state is cast, as in `jax.tree.map(…, "
        "state, is_leaf=lowmem.is_stored)`, and make or restore this one anew."
      )


def _is_form_of(x: QuantizedArray, storage: Storage) -> bool:
  if not isinstance(storage, Blockwise):  # a user's own; its form is not known
    return True
  if x.codebook != storage.codebook:
    return False
  # Of a shard, blocks are those of the whole array.
  length = math.prod(x.block)
  grown = storage.block_size <= length < 2 * storage.block_size
  return grown or x.block == block_shape(x.shape, storage.block_size)


def _would_quantize(storage: Storage | None, x: Any) -> bool:
  return isinstance(storage, Blockwise) and x.ndim > 0 and x.size >= max(storage.min_size, 1)


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
    state: a state of `from_tx`.
    from_tx: the transformation that it is of.
    to_tx: the transformation that it is to be of.
    params: the parameters, which say how `to_tx` lays out its state.

  Returns:
    A state of `to_tx`, where `to_tx.init(params)` would put it.

  Raises:
    ValueError: if `state` is none of `from_tx`, or the two have different rules, or keep master
      weights (`master_weights`) in different bits.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params = jnp.zeros((64, 64))
    >>> old, new = optax.adamw(1e-3), lowmem.adamw(1e-3, bits=8)
    >>> state = lowmem.convert_state(old.init(params), old, new, params)
    >>> state[0].mu
    QuantizedArray(float32[64,64], codebook='power8', block=64)
  """
  expected = jax.eval_shape(lambda p: unpaged(from_tx.init(p)), params)
  _compare("`state`", unpaged(state), "`from_tx`", expected)
  like = to_tx.init(params)
  source, target = unpaged(state), jax.eval_shape(unpaged, like)
  sources, source_def = jax.tree.flatten(source, is_leaf=is_quantized)
  targets, target_def = jax.tree.flatten(target, is_leaf=is_quantized)
  _compare(
    "`from_tx`",
    source_def.unflatten([0] * len(sources)),
    "`to_tx`",
    target_def.unflatten([0] * len(targets)),
  )
  return paged(target_def.unflatten(map(_converted, sources, targets)), like)


def _converted(x: Any, like: Any) -> Any:
  """A moment in the form of `like`."""
  if (
    is_quantized(x) and is_quantized(like) and (x.codebook, x.block) == (like.codebook, like.block)
  ):
    return x
  value = x.dequantize(jnp.float32) if is_quantized(x) else x
  if not is_quantized(like):
    # Of integers only remainders of masters differ: those of 16 and of 8 bits are not one number.
    if {value.dtype, like.dtype} == {jnp.dtype(jnp.int16), jnp.dtype(jnp.int8)}:
      raise ValueError(
        f"`from_tx` keeps {value.dtype} of the master weights and `to_tx` {like.dtype}, which only "
        "parameters and state together tell. Read them, `weights = master_params(params, state)`, "
        "and set them in a new state: `with_master_params(weights, params, to_tx.init(params))`."
      )
    return value.astype(like.dtype)
  return encode(value.astype(jnp.float32), like.codebook, like.block)


def _compare(name: str, tree: Any, other_name: str, other: Any) -> None:
  """Raises ValueError unless two trees have the same leaves."""
  paths, others = (
    {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(x)[0]}
    for x in (tree, other)
  )
  if paths != others:
    only, missing = sorted(paths - others), sorted(others - paths)
    raise ValueError(
      f"{name} and {other_name} do not belong together: {only[:3]} are in {name} only, "
      f"{missing[:3]} in {other_name} only. Both must be the same rules in the same order."
    )


def dequantized(tree: Any) -> Any:
  """The values of a tree: a float32 array in the place of each `QuantizedArray`, pages fetched.

  For logging, and for functions that would take codes for numbers: ``optax.tree.norm(state)`` adds
  up codes. All of it is in device memory at once.

  Args:
    tree: a state, or any tree.

  Returns:
    The tree with arrays in the place of `QuantizedArray` and `Paged`.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> q = lowmem.quantize(jnp.full((8, 64), 0.5))
    >>> round(float(optax.tree.norm(lowmem.dequantized({"mu": q}))), 3)
    11.314
  """

  def one(x):
    return x.dequantize(jnp.float32) if is_quantized(x) else x

  return jax.tree.map(one, unpaged(tree), is_leaf=is_quantized)
