"""Host memory: whether there is any, how much, and which arrays are to rest there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optax_lowmem._host_memory.pages import is_paged, nbytes, part_of
from optax_lowmem._host_memory.placement import DEVICE, PINNED_HOST

_POOL = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"


def devices_of(params: Any) -> list[Any]:
  """Where the parameters are, as far as that is known."""
  for x in jax.tree.leaves(params):
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
      return sorted(x.sharding.device_set, key=lambda d: d.id)
  return jax.local_devices()[:1]


def has_host_memory(devices: list[Any], fallback: str | None) -> bool:
  """Whether the devices have host memory.

  Of several processes, each must ask a device of its own: GPUs of others list no memories, so that
  with `devices[0]` all processes but the first would refuse.
  """
  own = (d for d in devices if d.process_index == jax.process_index())
  device = next(own, devices[0])
  kinds = {m.kind for m in device.addressable_memories()}
  if PINNED_HOST.kind in kinds:
    return True
  if fallback == DEVICE.kind:
    return False
  raise ValueError(
    f"`offloaded` needs pinned host memory, and {device} has only {', '.join(sorted(kinds))}. "
    'Pass `fallback="device"` to leave the state on the device.'
  )


def check_pool(platform: str, size: int, environment: Mapping[str, str]) -> None:
  """Refuses state that JAX's pool of pinned memory cannot hold; it has 64 GB unless told."""
  if platform not in ("gpu", "cuda", "rocm"):
    return
  limit = float(environment.get(_POOL, 64)) * 1e9
  if size > limit:
    raise ValueError(
      f"the state to be paged takes {size / 1e9:.1f} GB, and JAX's pool of pinned host memory has "
      f"{limit / 1e9:.0f} GB. Set the environment variable {_POOL}={math.ceil(size / 0.9e9)} "
      "before JAX starts."
    )


def check_on_host(state: Any) -> None:
  """Refuses pages that are not in host memory.

  Donated, such a page would be given to a new page on the host, upon which the runtime aborts the
  process; not donated, nothing would be saved.

  Raises:
    ValueError: if there is one.
  """
  for path, x in jax.tree_util.tree_flatten_with_path(state, is_leaf=is_paged)[0]:
    if is_paged(x) and any(map(DEVICE.holds, x.lanes)):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise ValueError(
        f"the page {name!r} of `state` is on the device, not in host memory. Pages lose their "
        "place by `out_shardings` that do not name it, pickle, numpy, most checkpoint libraries "
        "and `jax.device_put`: put them back, outside of `jax.jit`, by "
        "`state = lowmem.paged(state)`."
      )


def choose(
  state: Any,
  allowed: Callable[[str], bool],
  min_bytes: int,
  budget: int | None,
  layers: int = 1,
) -> set[int]:
  """Positions in the flat state of what is to be paged; the budget is for so many such states."""
  sizes = {}
  total = 0
  leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_paged)[0]
  for k, (path, x) in enumerate(leaves):
    if is_paged(x):
      continue  # `inner` has `offloaded` in it, and this page is on the host already
    if not hasattr(x, "dtype") or jnp.issubdtype(x.dtype, jax.dtypes.extended):
      continue  # a random key, or what `optax.tree.map_params` puts in an array's place
    size = shard_bytes(x)
    total += layers * size
    if size >= min_bytes and x.shape and allowed(_name(path)):
      sizes[k] = size
  if budget is None:
    return set(sizes)
  chosen: set[int] = set()
  for k in sorted(sizes, key=lambda k: (-sizes[k], k)):
    if total <= budget:
      break
    chosen.add(k)
    total -= layers * sizes[k]
  return chosen


def path_test(where: Any) -> Callable[[str], bool]:
  if where is None:
    return lambda path: True
  if callable(where):
    return lambda path: bool(where(path))
  try:
    pattern = re.compile(where)
    pattern.search("")  # a pattern of bytes does not match paths
  except (re.error, TypeError) as error:
    raise ValueError(
      f"`where` must be a regular expression or a function of a path, got {where!r}: {error}."
    ) from error
  return lambda path: pattern.search(path) is not None


def check_where(where: Any, allowed: Callable[[str], bool], state: Any) -> None:
  """Refuses a `where` that names no array of the state."""
  leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_paged)[0]
  names = [_name(path) for path, x in leaves if is_paged(x) or getattr(x, "shape", ())]
  if names and not any(map(allowed, names)):
    more = ", …" if len(names) > 6 else ""
    raise ValueError(
      f"`where` {where!r} names no array of the state. Its paths: {', '.join(names[:6])}{more}."
    )


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def shard_bytes(x: Any) -> int:
  if not isinstance(x, jax.Array):
    return nbytes(x)
  return math.prod(part_of(x)) * x.dtype.itemsize
