"""States in flax's `to_state_dict`, `to_bytes` and msgpack, where flax is installed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from optax_lowmem._host_memory.pages import Paged
from optax_lowmem._quantization.array import QuantizedArray


def register() -> None:
  """Makes the types of this package known to flax, if it is there and can be imported."""
  try:
    from flax import serialization
  except Exception:  # it is no dependency, and one that fits another jax raises what it will
    return

  def quantized_to_dict(x):
    arrays = {x.form: x.codes, "scales": x.scales, "offset": x.offset}
    return {k: serialization.to_state_dict(v) for k, v in arrays.items() if v is not None}

  def quantized_from_dict(x, state):
    _check_names(state, [x.form, "scales", *([] if x.offset is None else ["offset"])])
    return dataclasses.replace(
      x,
      codes=serialization.from_state_dict(x.codes, state[x.form], x.form),
      scales=serialization.from_state_dict(x.scales, state["scales"], "scales"),
      offset=state.get("offset"),
    )

  def lanes_of(x):  # by the order of layers, too
    name = "last_first" if x.last_first else "lane"
    return [f"{name}{k}" for k in range(len(x.lanes))]

  def paged_to_dict(x):
    return dict(zip(lanes_of(x), x.lanes, strict=True))

  def paged_from_dict(x, state):
    names = lanes_of(x)
    _check_names(state, names)
    lanes = (_in_place_of(lane, state[k]) for lane, k in zip(x.lanes, names, strict=True))
    return dataclasses.replace(x, lanes=tuple(lanes))

  register = serialization.register_serialization_state
  register(QuantizedArray, quantized_to_dict, quantized_from_dict, override=True)
  register(Paged, paged_to_dict, paged_from_dict, override=True)


def _check_names(state: Any, names: list[str]) -> None:
  found = sorted(state) if isinstance(state, dict) else [f"an array of {state.dtype}"]
  if found != sorted(names):
    raise ValueError(
      f"what was saved is {', '.join(found)}, and what it is to be restored into holds "
      f"{', '.join(sorted(names))}. Restore it into a state of the form in which it was saved, and "
      "convert that with `convert_state`."
    )


def _in_place_of(lane: Any, x: Any) -> Any:
  """A lane of a page, in the memory where it was."""
  return jax.device_put(x, lane.sharding) if isinstance(lane, jax.Array) else x
