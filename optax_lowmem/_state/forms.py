"""The forms in which a state is held, compared with those in which a transformation holds it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from optax_lowmem._quantization.array import QuantizedArray
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
