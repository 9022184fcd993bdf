"""`state_shardings`: how the state of a transformation lies, known before it is made."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from optax_lowmem._host_memory.paged_state import unpaged
from optax_lowmem._host_memory.pages import as_page, is_paged
from optax_lowmem._host_memory.placement import PINNED_HOST
from optax_lowmem._sharding.layout import laid_out


def state_shardings(tx: optax.GradientTransformation, params: Any, shardings: Any) -> Any:
  r"""Says how the state of `tx` is to lie, given how the parameters do.

  For programs that lay out a state by a tree of shardings: as `out_shardings` of
  ``jax.jit(tx.init)``, or for `jax.device_put`. Rules over paths and shapes would need to know of
  codes, scales and pages. Here every array lies as eager ``tx.init(params)`` lays it:

  - a moment as its parameter; codes and scales of a `QuantizedArray` keep its rank and lie alike. A
    mesh axis that would cut through blocks goes to another axis of the array that it divides; if
    there is none, the moment is whole on its devices;
  - rows and columns of `came` and `adafactor` as the axes of the parameter that remain;
  - counts, and all that no parameter's sharding follows from, whole on every device;
  - pages of `offloaded` as what they hold, in host memory (``memory_kind="pinned_host"``).

  It is found by evaluating the shapes of `tx.init` under a mesh of explicit axes; nothing is
  computed.

  Args:
    tx: the transformation.
    params: the parameters: arrays or `jax.ShapeDtypeStruct`.
    shardings: a `jax.sharding.NamedSharding` for each parameter, all of one mesh; of explicit or of
      automatic axes.

  Returns:
    A tree with the structure of ``jax.jit(tx.init)(params)``, and a `jax.sharding.NamedSharding`
    for each array. On automatic axes, and outside of `jax.set_mesh`, `offloaded` may page other
    arrays there than in an eager `init`: by the bytes of whole arrays, not of those on one device.

  Raises:
    ValueError: if `shardings` does not fit `params`, or is not of one mesh of devices.
    TypeError: if one is no `jax.sharding.NamedSharding`.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_lowmem as lowmem
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> params = {"w": jnp.zeros((256, 256))}
    >>> shardings = {"w": jax.NamedSharding(mesh, jax.P("data"))}
    >>> tx = lowmem.offloaded(lowmem.adamw(3e-4))
    >>> where = lowmem.state_shardings(tx, params, shardings)
    >>> where[0].mu["w"].codes.lanes[0].memory_kind
    'pinned_host'
    >>> init = jax.jit(tx.init, out_shardings=where)
    >>> state = init(jax.device_put(params, shardings))
    >>> lowmem.state_bytes(state)
    {'device': 4, 'pinned_host': 139264}
  """
  given = _checked(params, shardings)
  leaves, treedef = jax.tree.flatten(params)
  if not given:
    raise ValueError("`params` has no arrays, so `shardings` names no mesh.")
  mesh = given[0].mesh
  devices = mesh.devices if isinstance(mesh, Mesh) else None
  if devices is None:
    raise ValueError(f"`shardings` must be of a mesh of devices, got {mesh}.")
  types = (AxisType.Explicit,) * len(mesh.axis_names)
  explicit = Mesh(devices, mesh.axis_names, axis_types=types)

  def state_on(mesh):
    laid = [
      jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=NamedSharding(mesh, s.spec))
      for p, s in zip(leaves, given, strict=True)
    ]
    return jax.eval_shape(tx.init, treedef.unflatten(laid))

  with jax.set_mesh(explicit):
    found = jax.tree.leaves(unpaged(state_on(explicit)))
  state = state_on(mesh)  # what is paged is chosen by the bytes that are known to `jit` here

  def one(x, like):
    spec = PartitionSpec() if like.sharding is None else like.sharding.spec
    if not is_paged(x):
      return laid_out(mesh, spec)
    spec = PartitionSpec(*(None,) * x.last_first, *spec)
    where = laid_out(mesh, as_page(spec), PINNED_HOST.kind)
    return dataclasses.replace(x, lanes=(where,) * len(x.lanes))

  flat, state_tree = jax.tree.flatten(state, is_leaf=is_paged)
  return state_tree.unflatten(map(one, flat, found))


def _checked(params: Any, shardings: Any) -> list[NamedSharding]:
  """The sharding of each parameter, in order."""
  paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
  given = jax.tree_util.tree_flatten_with_path(shardings)[0]
  # A box around a parameter, as Flax has them, is part of its path.
  if len(given) != len(paths) or any(
    path[: len(own)] != own for path, (own, _) in zip(paths, given, strict=True)
  ):
    raise ValueError(
      "`shardings` must have a `jax.sharding.NamedSharding` for each array of `params`, got "
      f"{jax.tree.structure(shardings)} for {jax.tree.structure(params)}."
    )
  for path, s in given:
    if not isinstance(s, NamedSharding):
      raise TypeError(
        f"`shardings` must be of `jax.sharding.NamedSharding`, got {s!r} at "
        f"{jax.tree_util.keystr(path) or '()'}."
      )
  meshes = list(dict.fromkeys(s.mesh for _, s in given))
  if len(meshes) > 1:
    raise ValueError(f"`shardings` must be of one mesh, got {meshes}.")
  return [s for _, s in given]
