"""One update of a transformation whose state is stored: by tiles where that is proved right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._blocks import encode
from optax_lowmem._boxes import unbox
from optax_lowmem._elementwise import NotElementwise, Program
from optax_lowmem._moments import is_quantized, places
from optax_lowmem._stream import map_tiles


def update_stored(
  update: Callable[..., Any], grads: Any, state: Any, params: Any, extra_args: dict[str, Any]
) -> tuple[Any, Any]:
  """Runs `update(grads, state, params, **extra_args)` in float32 on a state that is stored."""
  out_tree = jax.tree.structure((grads, state), is_leaf=is_quantized)

  def run(*args):
    try:
      return _by_tiles(update, *args)
    except NotElementwise:
      return _on_whole_arrays(update, *args)

  args = unbox(grads), unbox(state), unbox(params), extra_args
  new = _with_automatic_sharding(run, args, like=args[:2])
  return out_tree.unflatten(jax.tree.leaves(new, is_leaf=is_quantized))


def _with_automatic_sharding(run: Callable[..., Any], args: Any, like: Any) -> Any:
  """Calls `run`; under a mesh of explicit axes, lets the compiler lay out what is inside.

  A flat view of a sharded array has no explicit sharding. The results are sharded as `like`.
  """
  leaves = jax.tree.leaves(like)
  meshes = (jax.typeof(x).sharding.mesh for x in leaves)
  explicit = [m for m in meshes if jax.sharding.AxisType.Explicit in m.axis_types]
  if not explicit:
    return run(*args)

  def sharding(x):  # scalars are on no mesh yet
    return jax.sharding.NamedSharding(explicit[0], jax.typeof(x).sharding.spec)

  return jax.sharding.auto_axes(run, out_sharding=jax.tree.map(sharding, like))(*args)


def update_dense(
  update: Callable[..., Any], grads: Any, state: Any, params: Any, extra_args: dict[str, Any]
) -> tuple[Any, Any]:
  """Runs `update` on a state that is held as the rule made it, from float32 parameters."""
  updates, state = update(_to_float32(grads), state, _to_float32(params), **extra_args)
  return _as_updates(updates, grads, params), state


def _by_tiles(update, grads, state, params, extra_args):
  """Decodes, updates and encodes a tile at a time; raises NotElementwise if that were wrong."""
  leaves, treedef = jax.tree.flatten((grads, state, params), is_leaf=is_quantized)
  owners = [place.owner for place in places((grads, state, params), grads)]
  dense = [
    jax.ShapeDtypeStruct(x.shape, x.dtype if owner is None else jnp.float32)
    for x, owner in zip(leaves, owners, strict=True)
  ]

  def flat_update(*flat):
    grads, state, params = treedef.unflatten(flat)
    return update(grads, state, params, **extra_args)

  program = Program(flat_update, dense, owners)
  out_tree = jax.tree.structure((grads, state), is_leaf=is_quantized)
  if program.out_tree != out_tree:
    raise NotElementwise("it changes the structure of its state")
  count = out_tree.num_leaves  # a result stands where its argument did: gradients, then state
  for position, owner in enumerate(owners[:count]):
    moved = program.owners[position] != owner
    if moved and not program.is_uniform(position):
      raise NotElementwise("it moves values between leaves")

  env = program.run_shared(leaves)
  results = [program.shared_result(k, env) if owners[k] is None else None for k in range(count)]
  for leaf, dtype in enumerate(_update_dtypes(grads, params)):
    members = [k for k, owner in enumerate(owners) if owner == leaf]
    writes = [k for k in members if k < count]
    reads = [k for k in members if k >= count]
    targets = {k: leaves[k] for k in writes}
    if leaves[leaf].dtype != dtype:  # the update cannot take the place of its gradient
      reads.append(leaf)
      targets[leaf] = jnp.zeros(leaves[leaf].shape, dtype)

    def on_tile(read, write, leaf=leaf, members=members, reads=reads, writes=writes):
      tiles = dict(zip(writes, write, strict=True)) | dict(zip(reads, read, strict=True))
      old = {k: _decode(tiles[k], dense[k].dtype) for k in members}
      new = program.run_leaf(leaf, env, [old[k] for k in members])
      return [_encode_like(like, new[k], old[k]) for k, like in zip(writes, write, strict=True)]

    new = map_tiles(on_tile, [leaves[k] for k in reads], list(targets.values()))
    for k, result in zip(writes, new, strict=True):
      results[k] = result
  return out_tree.unflatten(results)


def _on_whole_arrays(update, grads, state, params, extra_args):
  """Decodes everything, updates, encodes everything: right for any transformation."""
  dense = jax.tree.map(_decode_half, state, is_leaf=is_quantized)
  updates, new = update_dense(update, grads, dense, params, extra_args)
  return updates, jax.tree.map(_encode_like, state, new, dense, is_leaf=is_quantized)


def _as_updates(updates: Any, grads: Any, params: Any) -> Any:
  """`updates` in the dtypes of `_update_dtypes`."""
  flat, treedef = jax.tree.flatten(updates)
  dtypes = _update_dtypes(grads, params)
  return treedef.unflatten([u.astype(d) for u, d in zip(flat, dtypes, strict=True)])


def _update_dtypes(grads: Any, params: Any) -> list[Any]:
  """The dtype of each update: the wider of gradient's and parameter's."""
  dtypes = [g.dtype for g in jax.tree.leaves(grads)]
  if params is None:
    return dtypes
  params = jax.tree.leaves(params)
  return [jnp.promote_types(d, p.dtype) for d, p in zip(dtypes, params, strict=True)]


def _to_float32(tree: Any) -> Any:
  """Floating leaves in float32: arithmetic in bf16 would stall a moment with b2 = 0.999."""

  def cast(x):
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

  return jax.tree.map(cast, tree)


def _decode(stored: Any, dtype: Any) -> jax.Array:
  return stored.dequantize(dtype) if is_quantized(stored) else stored.astype(dtype)


def _decode_half(stored: Any) -> jax.Array:
  """Quantized and half-precision arrays in float32, others as they are."""
  half = stored.dtype in (jnp.bfloat16, jnp.float16)
  return _decode(stored, jnp.float32 if half else stored.dtype)


def _encode_like(stored: Any, value: jax.Array, old: jax.Array) -> Any:
  """`value` in the form of `stored`; a non-finite element keeps its `old` value if quantized."""
  if not is_quantized(stored):
    return value.astype(stored.dtype)
  return encode(jnp.where(jnp.isfinite(value), value, old), stored.codebook, stored.block)
