"""Host memory: whether there is any, how much, and which arrays are to rest there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optax_lowmem._pages import is_paged, nbytes

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000**k for k, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}iB": 1024**k for k, p in enumerate("KMGT", 1)}
_POOL = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"


def devices_of(params: Any) -> list[Any]:
  """Where the parameters are, as far as that is known."""
  for x in jax.tree.leaves(params):
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
      return sorted(x.sharding.device_set, key=lambda d: d.id)
  return jax.local_devices()[:1]


def has_host_memory(devices: list[Any], fallback: str | None) -> bool:
  kinds = {m.kind for m in devices[0].addressable_memories()}
  if "pinned_host" in kinds:
    return True
  if fallback == "device":
    return False
  raise ValueError(
    f"`offloaded` needs pinned host memory, and {devices[0]} has only {', '.join(sorted(kinds))}. "
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


def choose(
  state: Any, allowed: Callable[[str], bool], min_bytes: int, budget: int | None
) -> set[int]:
  """Positions in the flat state of what is to be paged."""
  sizes = {}
  total = 0
  leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_paged)[0]
  for k, (path, x) in enumerate(leaves):
    if is_paged(x):
      continue  # `inner` has `offloaded` in it, and this page is on the host already
    if not hasattr(x, "dtype") or jnp.issubdtype(x.dtype, jax.dtypes.extended):
      continue  # a random key, or what `optax.tree.map_params` puts in an array's place
    size = shard_bytes(x)
    total += size
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if size >= min_bytes and x.shape and allowed(name):
      sizes[k] = size
  if budget is None:
    return set(sizes)
  chosen: set[int] = set()
  for k in sorted(sizes, key=lambda k: (-sizes[k], k)):
    if total <= budget:
      break
    chosen.add(k)
    total -= sizes[k]
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


def bytes_of(name: str, value: int | str) -> int:
  if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
    return value
  match = (
    re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
    if type(value) is str
    else None
  )
  if not match or match[2] not in _UNITS:
    raise ValueError(
      f"`{name}` must be a number of bytes or a string such as '4GB' or '512MiB', got {value!r}."
    )
  return int(float(match[1]) * _UNITS[match[2]])


def shard_bytes(x: Any) -> int:
  if not isinstance(x, jax.Array):
    return nbytes(x)
  sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else x.sharding
  return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
