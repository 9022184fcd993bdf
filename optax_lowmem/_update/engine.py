"""One update of a transformation whose state is stored, parameter by parameter if that is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optax_lowmem._arguments.nnx_boxes import unbox
from optax_lowmem._programs.elementwise import NotElementwise
from optax_lowmem._programs.leaf_plan import Emission, LeafPlan, decoded, is_integer
from optax_lowmem._programs.phases import in_a_phase, in_phases
from optax_lowmem._programs.program import Program
from optax_lowmem._quantization.positions import positions_of
from optax_lowmem._quantization.scales import single_maximum
from optax_lowmem._sharding.shards import on_shards, with_automatic_sharding
from optax_lowmem._state.gradients import check_gradients, check_moments
from optax_lowmem._state.moments import is_quantized, places
from optax_lowmem._update.announced import Announced, announce_phases, announced, is_heard
from optax_lowmem._update.decoded_state import decoded_state, is_decoded, note_phases
from optax_lowmem._update.extra_args import split
from optax_lowmem._update.journal import asked_for, note
from optax_lowmem._update.methods import reason_against_kernel, run
from optax_lowmem._update.whole_arrays import as_arrays, update_dtypes, update_whole


def update_stored(
  update: Callable[..., Any], grads: Any, state: Any, params: Any, extra_args: dict[str, Any]
) -> tuple[Any, Any]:
  """Runs `update(grads, state, params, **extra_args)` in float32 on a state that is stored."""
  out_tree = jax.tree.structure((grads, state), is_leaf=is_quantized)

  grads, state, params = map(as_arrays, (unbox(grads), unbox(state), unbox(params)))
  args = grads, state, params, extra_args
  check_gradients(grads, params)
  try:
    new = update_elementwise(update, *args)
  except NotElementwise as reason:
    for path, _ in jax.tree_util.tree_flatten_with_path(args[0])[0]:
      note(path, "whole", f"the rule is not elementwise: {reason}")

    def whole(grads, state, params, extra_args):
      arrays, fixed = split(extra_args)

      def run(grads, state, params, arrays):
        return update_whole(update, grads, state, params, fixed.joined(arrays))

      trees = grads, state, params
      return with_automatic_sharding(run, (*trees, arrays), like=(grads, state))

    new = in_phases_on_gpus(whole, *args)
  return out_tree.unflatten(jax.tree.leaves(new, is_leaf=is_quantized))


def in_phases_on_gpus(update: Callable[..., Any], *args: Any) -> Any:
  """`update(*args)`; where it is compiled for a GPU, computed in phases.

  Not on a TPU: to see an array as rows of blocks is a copy there, as lanes are not to be split.

  Args:
    update: returns updates and state.
    *args: gradients, state and parameters; then anything.
  """
  *arrays, extra = args

  def plain(*arrays):
    return update(*arrays, extra)

  def phased(*arrays):
    def run(*arrays):
      return in_phases(plain, *arrays)

    with single_maximum():
      return with_automatic_sharding(run, arrays, like=arrays[:2])

  traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(arrays))
  note_phases()
  if not traced or in_a_phase() or is_decoded():
    return plain(*arrays)
  if is_heard():
    announce_phases()
    return phased(*arrays)
  return jax.lax.platform_dependent(*arrays, cpu=plain, tpu=plain, default=phased)


def update_elementwise(
  update: Callable[..., Any],
  grads: Any,
  state: Any,
  params: Any,
  extra_args: dict[str, Any],
  emit: Emission | None = None,
  indexed: bool = False,
) -> tuple[Any, Any]:
  """Updates each parameter by itself, in parts.

  Args:
    update: the rule; it is given gradients, parameters and moments in float32.
    grads, state, params, extra_args: its arguments; what is quantized in `state` is stored again.
    emit: for parameters in bfloat16, what makes the update of the parameter and of what `update`
      returns in the update's place. With it, `update` is given a dictionary of indices after the
      parameters, and the transformations in it a state that is decoded.
    indexed: whether the indices of the elements of each such parameter are in it, by its number.

  Raises:
    NotElementwise: if that were wrong.
  """
  leaves: list[Any]
  leaves, treedef = jax.tree.flatten((grads, state, params), is_leaf=is_quantized)
  owners = [place.owner for place in places((grads, state, params), grads)]
  check_moments(leaves, owners)
  dense = [
    jax.ShapeDtypeStruct(x.shape, x.dtype if owner is None or is_integer(x) else jnp.float32)
    for x, owner in zip(leaves, owners, strict=True)
  ]

  narrow = [k for k, p in enumerate(jax.tree.leaves(params)) if p.dtype == jnp.bfloat16]
  if indexed:
    of = [[x for x, owner in zip(leaves, owners, strict=True) if owner == k] for k in narrow]
    leaves, owners = leaves + list(map(positions_of, of)), owners + narrow
    dense += map(_shape, leaves[len(dense) :])

  def flat_update(*flat):
    count = treedef.num_leaves
    trees, index = treedef.unflatten(flat[:count]), dict(zip(narrow, flat[count:], strict=False))
    if emit is None:
      return update(*trees, **extra_args)
    with decoded_state(flat, leaves):
      return update(*trees, index, **extra_args)

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
  paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(grads)[0]]
  for leaf, dtype in enumerate(update_dtypes(grads, params)):
    emitted = emit if leaf in narrow else None
    if emitted:
      dtype = jnp.float32
    members = [k for k, owner in enumerate(owners) if owner == leaf]
    made = [k for k in members if k < count]
    # Leaves of which the rule makes the same are traced once for each shape: of 160 leaves, in an
    # eighth of the time.
    key, scalars = program.outline(members, made)
    tiles = [jax.tree.map(_shape, leaves[k]) for k in members]
    flat, structure = jax.tree.flatten(tiles)
    key = key, dtype, structure, *((x.shape, x.dtype) for x in flat)
    if key not in compiled:
      compiled[key] = jax.jit(
        _leaf_update(program, env, members, made, scalars, dtype, tiles, emitted)
      )
    new = compiled[key]([leaves[k] for k in members], [env[i] for i in scalars])
    for k, value in zip(made, new, strict=True):
      results[k] = value
    if asked_for():
      values = {k: leaves[k] for k in members}
      note(paths[leaf], *_method_of(program, env, leaf, made[1:], values, dtype, emitted))
  return out_tree.unflatten(results)


def _method_of(
  program: Program,
  env: Any,
  leaf: int,
  states: Sequence[int],
  values: dict[int, Any],
  dtype: Any,
  emit: Emission | None,
) -> tuple[str, str]:
  """By what a parameter is updated, and why; of `_update_leaf`'s arguments."""
  if not any(is_quantized(values[k]) for k in states):
    return "optax", "nothing of its state is quantized"
  if in_a_phase():
    return "elementwise", "it is part of a rule that takes norms or means of whole arrays"
  if (platform := asked_for()) not in ("cuda", "tpu"):
    return "elementwise", f"there is no kernel for {platform}"
  plan = LeafPlan(program, leaf, states, values, dtype, emit)
  return "elementwise", reason_against_kernel(platform, plan, env, values) or ""


def _leaf_update(
  program: Program,
  env: dict[int, Any],
  members: Sequence[int],
  made: Sequence[int],
  scalars: Sequence[int],
  dtype: Any,
  tiles: Sequence[Any],
  emit: Emission | None,
) -> Callable[[Sequence[Any], Sequence[Any]], list[Any]]:
  """`_update_leaf` as a function of its arrays and scalars alone, by each device for its shard."""
  leaf, states = made[0], made[1:]

  def update(values, shared):
    return _update_leaf(program, env | shared, leaf, states, values, dtype, emit)

  def on_arrays(arrays, shared):
    values = dict(zip(members, arrays, strict=True))
    shared = dict(zip(scalars, shared, strict=True))
    if any(is_quantized(values[k]) for k in states):
      results = {k: values[k] for k in states}
      results[leaf] = jax.ShapeDtypeStruct(values[leaf].shape, dtype)
      new = on_shards(update, values, shared, results)
    else:
      new = update(values, shared)  # plain arithmetic, which JAX can lay out
    return [new[k] for k in made]

  if not any(map(is_quantized, tiles)):
    return on_arrays
  kept = [k for k in states if program.returns_argument(k) == k]
  return announced(on_arrays, Announced(update, members, made, kept, scalars, tiles))


def _update_leaf(
  program: Program,
  env: Any,
  leaf: int,
  states: Sequence[int],
  values: dict[int, Any],
  dtype: Any,
  emit: Emission | None,
) -> dict[int, Any]:
  """One parameter's update, at position `leaf`, and the new values of its `states`, by position.

  Args:
    program: the proved rule.
    env: what its shared part gave.
    leaf: the index of the parameter; also the position of its gradient and of its update.
    states: positions of its arrays in the state.
    values: by position: the gradient, `states`, and the parameter if the rule was given it.
    dtype: dtype of the update.
    emit: what makes it of what the rule gives, if that is something else.
  """
  if not any(is_quantized(values[k]) for k in states):
    dense = {k: decoded(x) for k, x in values.items()}
    new = program.run_leaf(leaf, env, dense, [leaf, *states])
    if emit is not None:
      param = min(values.keys() - {leaf, *states})  # indices come after it
      new[leaf] = emit(dense[param], new[leaf])
    return {k: x.astype(dtype if k == leaf else values[k].dtype) for k, x in new.items()}
  plan = LeafPlan(program, leaf, states, values, dtype, emit)
  return {k: values[k] for k in plan.kept} | run(plan, env, values)


def _shape(x: Any) -> Any:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)
