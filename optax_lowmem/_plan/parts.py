"""The bytes of weights and of optimizer state on each device, by what they are."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._host_memory.pages import is_paged
from optax_lowmem._plan.memory_plan import Kind, Part
from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem._state.leaves import stored_places
from optax_lowmem._state.moments import Place, field_of, is_quantized

_FOUR_BITS = ("nf4", "fp4")


def device_and_host(tree: Any) -> tuple[int, int]:
  """Bytes of a tree of arrays or shapes on each device, and in each device's host memory.

  What has a sharding counts with the part that one device holds, everything else whole.
  """
  found = [0, 0]
  for x in jax.tree.leaves(tree, is_leaf=is_paged):
    for leaf in jax.tree.leaves(x):
      if not hasattr(leaf, "dtype"):
        continue
      sharding = getattr(leaf, "sharding", None)
      shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
      host = is_paged(x) or getattr(sharding, "memory_kind", None) == "pinned_host"
      found[host] += math.prod(shape) * leaf.dtype.itemsize
  return found[0], found[1]


def count(tree: Any) -> int:
  """Numbers in a tree that are no integers; a quantized array counts those that it stands for."""
  leaves = jax.tree.leaves(tree, is_leaf=is_quantized)
  return sum(math.prod(x.shape) for x in leaves if _is_number(x))


def _is_number(x: Any) -> bool:
  if is_quantized(x):
    return True
  return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def of_weights(tree: Any, name: str, kind: Kind = "weights") -> list[Part]:
  """A part for each form that weights are held in: float32, bfloat16, NF4, ….

  Args:
    tree: arrays or shapes, quantized ones among them.
    name: what they are.
    kind: of the parts.
  """
  groups: dict[str, list[Any]] = {}
  for x in jax.tree.leaves(tree, is_leaf=is_quantized):
    if hasattr(x, "dtype"):
      groups.setdefault(_form(x), []).append(x)
  found = []
  for form, leaves in groups.items():
    if device := device_and_host(leaves)[0]:
      found.append(Part(f"{name}, {form}", kind, device, parameters=count(leaves)))
  return sorted(found, key=lambda part: -part.device)


def of_state(state: Any, params: Any) -> list[Part]:
  """A part for each field of an optimizer's state: its moments, factors and counts.

  Args:
    state: what `tx.init` makes, as arrays or shapes.
    params: what it was made for.
  """
  groups: dict[str, list[Any]] = {}
  for place, leaf in stored_places(state, params):
    if hasattr(leaf, "dtype"):
      groups.setdefault(_field(place), []).append(leaf)
  found = []
  for field, leaves in groups.items():
    device, host = device_and_host(leaves)
    forms = dict.fromkeys(_form(x) for x in leaves if math.prod(x.shape) > 1)
    form = f", {' and '.join(forms)}" if forms else ""
    found.append(Part(f"optimizer state, {field}{form}", "state", device, host))
  return found


def of_gradients(params: Any) -> list[Part]:
  """The gradients of these parameters, which have their dtypes."""
  return [Part("gradients", "gradients", device_and_host(params)[0])]


def _field(place: Place) -> str:
  if place.owner is not None:
    return field_of(place) or "other"
  names = [key.name for key in place.path if isinstance(key, jax.tree_util.GetAttrKey)]
  return names[-1] if names else "other"


def _form(x: Any) -> str:
  if isinstance(x, QuantizedArray):
    name = x.codebook.name
    return name.upper() if name in _FOUR_BITS else name
  return str(x.dtype) if _is_number(x) else "integers"
