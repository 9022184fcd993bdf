"""One update of a transformation whose state is stored: by tiles where that is proved right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem import kernels
from optax_lowmem._blocks import (
  decode_halves,
  encode_finite,
  encode_halves,
  finite_or,
  is_finite,
)
from optax_lowmem._boxes import unbox
from optax_lowmem._elementwise import NotElementwise, Program
from optax_lowmem._moments import is_quantized, places
from optax_lowmem._sharding import on_shards, with_automatic_sharding
from optax_lowmem._stream import map_tiles


def update_stored(
  update: Callable[..., Any], grads: Any, state: Any, params: Any, extra_args: dict[str, Any]
) -> tuple[Any, Any]:
  """Runs `update(grads, state, params, **extra_args)` in float32 on a state that is stored."""
  out_tree = jax.tree.structure((grads, state), is_leaf=is_quantized)

  args = unbox(grads), unbox(state), unbox(params), extra_args
  try:
    new = _by_tiles(update, *args)
  except NotElementwise:
    whole = functools.partial(_on_whole_arrays, update)
    new = with_automatic_sharding(whole, args, like=args[:2])
  return out_tree.unflatten(jax.tree.leaves(new, is_leaf=is_quantized))


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
  compiled: dict[Any, Any] = {}
  for leaf, dtype in enumerate(_update_dtypes(grads, params)):
    members = [k for k, owner in enumerate(owners) if owner == leaf]
    made = [k for k in members if k < count]
    # Leaves of which the rule makes the same are traced once for each shape: of 160 leaves, in an
    # eighth of the time.
    key, scalars = program.outline(members, made)
    key = key, dtype
    if key not in compiled:
      compiled[key] = jax.jit(_leaf_update(program, env, members, made, scalars, dtype))
    new = compiled[key]([leaves[k] for k in members], [env[i] for i in scalars])
    for k, value in zip(made, new, strict=True):
      results[k] = value
  return out_tree.unflatten(results)


def _leaf_update(
  program: Program,
  env: dict[int, Any],
  members: Sequence[int],
  made: Sequence[int],
  scalars: Sequence[int],
  dtype: Any,
) -> Callable[[Sequence[Any], Sequence[Any]], list[Any]]:
  """`_update_leaf` as a function of its arrays and scalars alone, by each device for its shard."""
  leaf, states = made[0], made[1:]

  def run(values, shared):
    return _update_leaf(program, env | shared, leaf, states, values, dtype)

  def on_arrays(arrays, shared):
    values = dict(zip(members, arrays, strict=True))
    shared = dict(zip(scalars, shared, strict=True))
    if any(is_quantized(values[k]) for k in states):
      results = {k: values[k] for k in states}
      results[leaf] = jax.ShapeDtypeStruct(values[leaf].shape, dtype)
      new = on_shards(run, values, shared, results)
    else:
      new = run(values, shared)  # plain arithmetic, which JAX can lay out
    return [new[k] for k in made]

  return on_arrays


def _update_leaf(
  program: Program, env: Any, leaf: int, states: Sequence[int], values: dict[int, Any], dtype: Any
) -> dict[int, Any]:
  """One parameter's update, at position `leaf`, and the new values of its `states`, by position.

  Args:
    program: the proved rule.
    env: what its shared part gave.
    leaf: the index of the parameter; also the position of its gradient and of its update.
    states: positions of its arrays in the state.
    values: by position: the gradient, `states`, and the parameter if the rule was given it.
    dtype: dtype of the update.
  """
  if not any(is_quantized(values[k]) for k in states):
    dense = {k: _decode(x, jnp.float32) for k, x in values.items()}
    new = program.run_leaf(leaf, env, dense, [leaf, *states])
    return {k: x.astype(dtype if k == leaf else values[k].dtype) for k, x in new.items()}

  kept = [k for k in states if program.returns_argument(k) == k]
  moving = [k for k in states if k not in kept]
  # What the rule makes of gradient and old state, as opposed to an old gradient kept for later.
  made = [k for k in moving if program.returns_argument(k) is None and not program.is_uniform(k)]
  # Most rules make the update of the new moments. It is then made of them as they are stored,
  # outside the loop, where XLA fuses it with whatever follows (weight decay, `apply_updates`) and
  # no update is ever written to memory: a third of the time of a step on a CPU.
  # Not of a second moment that may have become zero, though: it would explode.
  late = program.arguments_of(leaf, [leaf], made).isdisjoint(moving)
  late = late and not any(is_quantized(values[k]) and values[k].codebook.may_vanish for k in made)
  made_in_loop = moving if late else [*moving, leaf]
  in_place = not late and values[leaf].dtype == dtype  # the update takes its gradient's place
  needed = program.arguments_of(leaf, made_in_loop, ()) | set(moving)
  reads = sorted(needed - {*moving, *([leaf] if in_place else [])})

  def on_tile(read, write):
    read = dict(zip(reads, read, strict=True))
    write = dict(zip(made_in_loop, write, strict=True))
    old = _parts(write | read)
    new = [program.run_leaf(leaf, env, part, made_in_loop) for part in old]
    return [
      _encode_like(like, [part[k] for part in new], [part[k] for part in old])
      for k, like in write.items()
    ]

  def run(over_tiles, values):
    writes = [values[k] for k in moving]
    if not late:
      writes.append(values[leaf] if in_place else jnp.zeros(values[leaf].shape, dtype))
    new = over_tiles(on_tile, [values[k] for k in reads], writes)
    new = dict(zip(made_in_loop, new, strict=True))
    if late:
      new[leaf] = _update_of_stored(program, env, leaf, made, values | new).astype(dtype)
    return new

  by_tiles = functools.partial(run, map_tiles)
  on_blocks = functools.partial(run, lambda fn, read, write: fn(read, write))  # a kernel's tile
  needed |= program.arguments_of(leaf, [leaf], made if late else ()) | {leaf}
  forms = {k: values[k] for k in moving}
  forms[leaf] = jax.ShapeDtypeStruct(values[leaf].shape, dtype)
  new = kernels.update(on_blocks, {k: values[k] for k in sorted(needed)}, forms, by_tiles)
  return {k: values[k] for k in kept} | new


def _update_of_stored(
  program: Program, env: Any, leaf: int, made: Sequence[int], values: dict[int, Any]
) -> jax.Array:
  """The update that the rule makes of its new state, `made`, as it is stored in `values`."""
  dense = {k: _decode(x, jnp.float32) for k, x in values.items()}
  # Where a moment became NaN or Inf, the last one was stored, but the update is to show it. The
  # rule, applied once more, makes it so again.
  quantized = [k for k in made if is_quantized(values[k])]
  again = program.run_leaf(leaf, env, dense, quantized)
  stored = {k: dense[k] for k in made}
  stored |= {k: jnp.where(is_finite(again[k]), dense[k], again[k]) for k in quantized}
  return program.run_leaf(leaf, env, dense, [leaf], given=stored)[leaf]


def _on_whole_arrays(update, grads, state, params, extra_args):
  """Decodes everything, updates, encodes everything: right for any transformation."""
  dense = jax.tree.map(_decode_half, state, is_leaf=is_quantized)
  updates, new = update_dense(update, grads, dense, params, extra_args)
  return updates, jax.tree.map(
    lambda stored, value, old: _encode_like(stored, [value], [old]),
    state,
    new,
    dense,
    is_leaf=is_quantized,
  )


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


def _parts(tiles: dict[int, Any]) -> list[dict[int, jax.Array]]:
  """Tiles in float32: as they are, or in two parts where `map_tiles` gave pairs."""
  pairs = any(isinstance(x, tuple) for x in tiles.values())

  def parts(x):
    if not pairs:
      return [_decode(x, jnp.float32)]
    if is_quantized(x):
      return decode_halves(x)
    return [_decode(half, jnp.float32) for half in x]

  both = {k: parts(x) for k, x in tiles.items()}
  return [{k: x[i] for k, x in both.items()} for i in range(1 + pairs)]


def _encode_like(stored: Any, values: Sequence[jax.Array], olds: Sequence[jax.Array]) -> Any:
  """The parts of a value in the form of `stored`; what is not finite is, if quantized, not new."""
  if not is_quantized(stored):
    if not isinstance(stored, tuple):
      return values[0].astype(stored.dtype)
    return tuple(x.astype(like.dtype) for x, like in zip(values, stored, strict=True))
  values = [finite_or(x, old) for x, old in zip(values, olds, strict=True)]
  if len(values) == 1:
    return encode_finite(values[0], stored.codebook, stored.block)
  return encode_halves(values, stored)
