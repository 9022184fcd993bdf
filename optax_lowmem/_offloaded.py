"""`offloaded`: optimizer state that rests in pinned host memory."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_lowmem._boxes import unbox
from optax_lowmem._one_by_one import one_by_one
from optax_lowmem._paging import Paged, fetch, is_paged, nbytes, store, stream

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000**k for k, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}iB": 1024**k for k, p in enumerate("KMGT", 1)}
_POOL = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"


def offloaded(
  inner: optax.GradientTransformation,
  *,
  min_bytes: int = 4096,
  where: str | Callable[[str], bool] | None = None,
  device_budget: int | str | None = None,
  max_bytes: int | str = "256MiB",
  fallback: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps the state of any optax transformation in pinned host memory ("paged").

  The large arrays of the state rest on the host. An update fetches them parameter by parameter,
  runs `inner` on the device, and puts the new ones back:

  .. math::
    s_t, u_t = \mathrm{inner}(g_t, \mathrm{fetch}(h_{t-1}), p_t), \qquad h_t = \mathrm{store}(s_t).

  The arithmetic is `inner`'s, so results are those of the same run without `offloaded`. At most
  `max_bytes` of paged state, old and new values together, are on the device at any time, or those
  of the largest parameter if they are more; the next parameters' state is fetched while the
  present one is computed. The bound holds if `inner` treats each parameter's arrays on their own,
  norms included (Adam, Lion, CAME, LAMB, …). Where it needs the state of all parameters at once,
  as a norm over all moments that is then applied to them does, that state is on the device at once.

  A page is a `Paged` with two leading axes of 1: where no shardings are named, JAX would give a
  donated page's memory to a new parameter of its shape, and abort. Donate the state as always.
  `unpaged` and `paged` convert the state to and from that of `inner`, for checkpoints of runs
  without `offloaded`.

  Put it outermost, around `optax.MultiSteps`, `optax.apply_if_finite` and the like. Within them it
  works on CPUs; what XLA's GPU backend makes of host memory in the branches of a condition has not
  been measured.

  Args:
    inner: the transformation.
    min_bytes: smaller arrays of the state stay on the device, as scalars do.
    where: which arrays of the state may be paged: a regular expression, searched in their paths
      (``"0/mu/layers/w/codes"``), or a function of the path.
    device_budget: how much of the state may stay on the device, in bytes or as ``"4GB"``,
      ``"512MiB"``; the largest arrays are paged first, and the choice is made once, by `init`.
      Without it, all that may be paged is. Sharded arrays count with their bytes on one device.
    max_bytes: most bytes of paged state on the device during an update.
    fallback: ``"device"`` leaves the state on a device that has no pinned host memory; by default
      that is an error.

  Returns:
    The transformation.

  Raises:
    ValueError: for arguments out of range; from `init` on a backend without pinned host memory, and
      on a GPU if the state is larger than the pool of pinned memory.

  Examples:
    >>> import jax.numpy as jnp, optax_lowmem as lowmem
    >>> params = jnp.zeros((256, 256))
    >>> tx = lowmem.offloaded(lowmem.adamw(3e-4, bits=8))
    >>> state = tx.init(params)
    >>> lowmem.state_bytes(state)
    {'device': 4, 'pinned_host': 139264}
    >>> updates, state = tx.update(params, state, params)
  """
  if isinstance(min_bytes, bool) or not isinstance(min_bytes, int) or min_bytes < 0:
    raise ValueError(f"`min_bytes` must be an integer of at least 0, got {min_bytes!r}.")
  if fallback not in (None, "device"):
    raise ValueError(f"`fallback` must be 'device' or None, got {fallback!r}.")
  allowed = _path_test(where)
  budget = None if device_budget is None else _bytes("device_budget", device_budget)
  bound = _bytes("max_bytes", max_bytes)
  inner = optax.with_extra_args_support(inner)

  def choose(state: Any) -> set[int]:
    """Positions in the flat state of what is to be paged."""
    sizes = {}
    total = 0
    for k, (path, x) in enumerate(jax.tree_util.tree_flatten_with_path(state)[0]):
      if not hasattr(x, "dtype") or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        continue  # a random key, or what `optax.tree.map_params` puts in an array's place
      size = _shard_bytes(x)
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

  def init(params):
    params = unbox(params)
    devices = _devices(params)
    if not _has_host_memory(devices, fallback):
      return inner.init(params)
    state = _init(inner.init, params, bound)
    leaves, treedef = jax.tree.flatten(state)
    chosen = choose(state)
    del state
    _check_pool(devices[0].platform, sum(nbytes(leaves[k]) for k in chosen), os.environ)
    for k in sorted(chosen):
      leaves[k] = store(leaves[k]() if isinstance(leaves[k], _Lazy) else leaves[k])
    return treedef.unflatten([x() if isinstance(x, _Lazy) else x for x in leaves])

  def update(updates, state, params=None, **extra_args):
    args = updates, state, params, extra_args
    return (compiled if _is_concrete(args) else run)(*args)

  def run(updates, state, params, extra_args):
    out_tree = jax.tree.structure((updates, state), is_leaf=is_paged)
    args = unbox((updates, state, params))
    if not any(map(is_paged, jax.tree.leaves(args[1], is_leaf=is_paged))):
      new = inner.update(*args, **extra_args)
      return out_tree.unflatten(jax.tree.leaves(new))
    count = len(jax.tree.leaves(args[0]))
    # What is no array, such as the function whose minimum L-BFGS looks for, is not traced.
    extra, extra_tree = jax.tree.flatten(extra_args)
    numbers = {k: x for k, x in enumerate(extra) if _is_number(x)}
    flat = jax.tree.leaves((*args, numbers), is_leaf=is_paged)
    positions = [k for k, x in enumerate(flat) if is_paged(x)]

    def call(updates, state, params, numbers):
      again = extra_tree.unflatten(numbers.get(k, x) for k, x in enumerate(extra))
      return inner.update(updates, state, params, **again)

    def paged_results(shapes):  # what was paged stays so: updates, then state, as among arguments
      if len(jax.tree.leaves(shapes[0])) != count:
        raise ValueError("`offloaded` needs updates with the structure of the gradients.")
      return positions

    results, _ = stream(call, (*args, numbers), positions, paged_results, bound)
    return out_tree.unflatten(results)

  compiled = jax.jit(run)
  return optax.GradientTransformationExtraArgs(init, update)


def unpaged(state: Any) -> Any:
  """The state as the transformation within `offloaded` has it: no `Paged`, all on the device.

  Abstract pages (`jax.ShapeDtypeStruct`) become abstract arrays in the same memory: a template by
  which a checkpoint of a run without `offloaded` can be restored straight into host memory.

  Args:
    state: a state of `offloaded`, or any tree that holds one.

  Returns:
    The same tree with arrays in the place of `Paged`.

  Examples:
    >>> import jax.numpy as jnp, optax_lowmem as lowmem
    >>> state = lowmem.offloaded(lowmem.adam(1e-3)).init(jnp.zeros((64, 64)))
    >>> lowmem.unpaged(state)[0].mu.codes.shape
    (64, 64)
  """

  def one(x):
    if not is_paged(x):
      return x
    if not isinstance(x.pages, jax.ShapeDtypeStruct):
      return fetch(x)
    sharding = x.pages.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
      spec = jax.sharding.PartitionSpec(*tuple(sharding.spec)[2:])
      sharding = sharding.update(spec=spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(one, state, is_leaf=is_paged)


def paged(state: Any, like: Any) -> Any:
  """The reverse of `unpaged`: a state of the inner transformation, paged as `like` is.

  A paged state that was restored from a checkpoint may go through it too: Orbax lays its arrays in
  host memory but leaves JAX's type of them saying otherwise (orbax-checkpoint 0.11, jax 0.12).

  Args:
    state: the state of a run without `offloaded`: arrays on a device, on the host or numpy's.
    like: a state of `offloaded` of the same run, from `init`.

  Returns:
    A state with the structure, shapes, shardings and memories of `like`.

  Raises:
    ValueError: if an array has another shape or dtype than that in `like`.

  Examples:
    >>> import jax.numpy as jnp, optax_lowmem as lowmem
    >>> params = jnp.zeros((64, 64))
    >>> tx = lowmem.adam(1e-3)
    >>> like = lowmem.offloaded(tx).init(params)
    >>> state = lowmem.paged(tx.init(params), like)
    >>> lowmem.state_bytes(state)["pinned_host"]
    8192
  """

  def one(x, target):
    if x.shape != target.shape or x.dtype != target.dtype:
      raise ValueError(
        f"`state` holds {x.dtype}{list(x.shape)} where `like` has "
        f"{target.dtype}{list(target.shape)}. Both must be of the same parameters and optimizer."
      )
    if is_paged(x):
      x = x.pages
    if not is_paged(target):
      return jax.device_put(x, target.sharding) if isinstance(target, jax.Array) else x
    if isinstance(x, jax.Array) and x.shape != target.pages.shape:
      x = jax.device_put(x, jax.memory.Space.Device)  # XLA reshapes nothing on the host
    pages = jax.device_put(x.reshape(target.pages.shape), target.pages.sharding)
    return Paged(jax.device_put(pages, jax.memory.Space.Host))

  leaves, treedef = jax.tree.flatten(like, is_leaf=is_paged)
  given = jax.tree.leaves(state, is_leaf=is_paged)
  if len(given) != len(leaves):
    raise ValueError(
      f"`state` has {len(given)} arrays and `like` {len(leaves)}. Both must be of the same "
      "parameters and optimizer."
    )
  return treedef.unflatten(map(one, given, leaves))


class _Lazy:
  """An array of a new state that is made when it is needed."""

  def __init__(self, shape: Any, make: Callable[[], jax.Array], device: Any):
    self.shape, self.dtype = shape.shape, shape.dtype
    self._make, self._device = make, device

  def __call__(self) -> jax.Array:
    with jax.default_device(self._device):  # where no parameter says where
      return self._make()


def _init(init: Callable[[Any], Any], params: Any, bound: int) -> Any:
  """`init(params)`; above `bound` bytes, its arrays are made one by one: all may not fit."""
  arrays = [x for x in jax.tree.leaves(params) if hasattr(x, "dtype")]
  if any(isinstance(x, Tracer) or not isinstance(x, jax.Array | np.ndarray) for x in arrays):
    return init(params)
  devices = _devices(params)
  if len(devices) > 1:  # traced, it would not see how the parameters lie
    return init(params)
  makers, shapes = one_by_one(init, params)
  leaves, treedef = jax.tree.flatten(shapes)
  if sum(map(nbytes, leaves)) <= bound:
    return init(params)
  return treedef.unflatten([_Lazy(*pair, devices[0]) for pair in zip(leaves, makers, strict=True)])


def _devices(params: Any) -> list[Any]:
  """Where the parameters are, as far as that is known."""
  for x in jax.tree.leaves(params):
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
      return sorted(x.sharding.device_set, key=lambda d: d.id)
  return jax.local_devices()[:1]


def _has_host_memory(devices: list[Any], fallback: str | None) -> bool:
  kinds = {m.kind for m in devices[0].addressable_memories()}
  if "pinned_host" in kinds:
    return True
  if fallback == "device":
    return False
  raise ValueError(
    f"`offloaded` needs pinned host memory, and {devices[0]} has only {', '.join(sorted(kinds))}. "
    'Pass `fallback="device"` to leave the state on the device.'
  )


def _check_pool(platform: str, size: int, environment: Mapping[str, str]) -> None:
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


def _path_test(where: Any) -> Callable[[str], bool]:
  if where is None:
    return lambda path: True
  if callable(where):
    return lambda path: bool(where(path))
  try:
    pattern = re.compile(where)
  except (re.error, TypeError) as error:
    raise ValueError(
      f"`where` must be a regular expression or a function of a path, got {where!r}: {error}."
    ) from error
  return lambda path: pattern.search(path) is not None


def _bytes(name: str, value: int | str) -> int:
  if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
    return value
  match = (
    re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if type(value) is str else None
  )
  if not match or match[2] not in _UNITS:
    raise ValueError(
      f"`{name}` must be a number of bytes or a string such as '4GB' or '512MiB', got {value!r}."
    )
  return int(float(match[1]) * _UNITS[match[2]])


def _shard_bytes(x: Any) -> int:
  if isinstance(x, jax.Array) and not isinstance(x, Tracer):
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return nbytes(x)


def _is_number(x: Any) -> bool:
  return hasattr(x, "dtype") or isinstance(x, bool | int | float | complex)


def _is_concrete(tree: Any) -> bool:
  return all(
    isinstance(x, jax.Array | np.ndarray | float | int) and not isinstance(x, Tracer)
    for x in jax.tree.leaves(tree)
  )
