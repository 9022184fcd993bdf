"""What rests in host memory: a page, and the way between a state and its pages."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

# Where no shardings are named, JAX pairs a donated argument with the first result of its shape and
# dtype, in whatever memory: a donated moment with the new parameter, upon which the runtime aborts
# the process (jax 0.10 to 0.12). Pages therefore have a shape that nothing else has: two leading
# axes are too few, for a dense layer's page is then shaped as a 1x1 convolution's kernel is.
_AXES = 6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Paged:
  """An array that rests in host memory.

  Invariants: `pages.shape == (1, 1, 1, 1, 1, 1, *shape)`, so that JAX never gives the memory of a
  donated page to a parameter or an update.
  """

  pages: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.pages.shape[_AXES:])

  @property
  def dtype(self) -> Any:
    return self.pages.dtype


def is_paged(x: Any) -> bool:
  return isinstance(x, Paged)


def store(x: jax.Array) -> Paged:
  """`x`, moved to host memory with its sharding."""
  return Paged(jax.device_put(x.reshape((1,) * _AXES + x.shape), jax.memory.Space.Host))


def fetch(paged: Paged) -> jax.Array:
  """The array, on the device."""
  x = jax.device_put(paged.pages, jax.memory.Space.Device)
  return x.reshape(x.shape[_AXES:])


def nbytes(x: Any) -> int:
  return math.prod(x.shape) * x.dtype.itemsize  # which random keys have too


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
      spec = jax.sharding.PartitionSpec(*tuple(sharding.spec)[_AXES:])
      sharding = sharding.update(spec=spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(one, state, is_leaf=is_paged)


def paged(state: Any, like: Any) -> Any:
  """The reverse of `unpaged`: a state of the inner transformation, paged as `like` is.

  A paged state that was restored from a checkpoint may go through it too: Orbax lays its arrays in
  host memory but leaves JAX's type of them saying otherwise (orbax-checkpoint 0.11, jax 0.12). If
  its pages were moved to the device, or restored to it by a template without shardings, it must:
  donated as it is, it would abort the process.

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
