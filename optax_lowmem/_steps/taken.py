"""An update that is taken or not, as a condition says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import optax

from optax_lowmem._programs.elementwise import NotElementwise
from optax_lowmem._programs.parts import Part, Parts
from optax_lowmem._programs.program import Program
from optax_lowmem._steps.in_place import in_place
from optax_lowmem._update import tile_loop
from optax_lowmem._update.announced import is_heard
from optax_lowmem._update.decoded_state import is_decoded

# What is not to move gets this for an update: it leaves a negative zero as it is, and so the sign
# of a master weight of which that is the upper half.
STILL = -0.0
# A loop whose trips are not known beforehand costs a GPU a word to the host. So there are not many
# more than this of them; a gradient waits for what shares one with it, 1/32 of all, 0.1 B/param.
_LOOPS = 32


def update_if(
  holds: jax.Array,
  inner: optax.GradientTransformationExtraArgs,
  grads: Any,
  state: Any,
  params: Any,
  extra_args: dict[str, Any],
) -> tuple[Any, Any]:
  """`inner.update` where `holds`, and its state as it was elsewhere.

  Where `inner` makes updates of some parameters without regard to others, they are made when their
  gradients are there: the parts of its program are chosen one by one.

  Args:
    holds: a bool.
    inner: the transformation.
    grads: gradients that are `STILL` where `holds` is not: the updates then.
    state: that of `inner`.
    params: the parameters, or None.
    extra_args: passed on.

  Returns:
    Updates and state.

  Raises:
    ValueError: if `inner` changes the structure of its state or of the gradients.
    NotElementwise: where `master_weights` asks whether all that is within it is so.
  """
  if is_decoded():
    raise NotElementwise("an update is taken or not")
  state = jax.tree.map(jnp.asarray, state)

  def run(grads, state, params):
    return inner.update(grads, state, params, **extra_args)

  closed, shapes = jax.make_jaxpr(run, return_shape=True)(grads, state, params)
  out_tree = jax.tree.structure((grads, state))
  if jax.tree.structure(shapes) != out_tree:
    raise ValueError(
      "`inner` returns updates or a state of another structure than it was given, so that new and "
      "old cannot be chosen between."
    )
  args = jax.tree.leaves((grads, state, params))
  updates = zip(args, jax.tree.leaves(shapes[0]), strict=False)
  begin = [*(_start(x, like) for x, like in updates), *jax.tree.leaves(state)]
  if is_heard():
    # `offloaded` opens conditions: what chooses is then run where the state is.
    whole = jax.extend.core.jaxpr_as_fun(closed)
    new = jax.lax.cond(holds, lambda: _cast(whole(*args), begin), lambda: begin)
    return out_tree.unflatten(new)
  program = Parts(closed, _LOOPS)
  results = list(begin)
  others = _cast(program.run(program.others, args), [begin[k] for k in program.others])
  for k, x in zip(program.others, others, strict=True):
    results[k] = jnp.where(holds, x, begin[k])
  for part in program.parts:

    def taken(_, carry, part=part):
      given = list(args)
      for k, x in zip(part.results, carry, strict=True):
        if begin[k] is args[k]:  # it is changed in place
          given[k] = x
      return _replaced(program, part, given, carry)

    # A loop of one trip or none. Of a condition XLA copies what its branches return: on an H100, 8
    # B/param of temporaries around 8-bit AdamW and 12 around `optax.adamw`, where a loop, which
    # changes its arrays in place, has none.
    start = [begin[k] for k in part.results]
    new = jax.lax.fori_loop(0, holds.astype(jnp.int32), taken, start)
    for k, x in zip(part.results, new, strict=True):
      results[k] = x
  return out_tree.unflatten(results)


def _replaced(program: Parts, part: Part, args: Sequence[Any], old: Sequence[Any]) -> list[Any]:
  """New results of a part, in the dtypes of old ones, which some arguments may be."""
  olds, new = iter(old), []
  for group in part.groups:
    begin = list(itertools.islice(olds, len(group)))
    made = _in_tiles(program, group, args, begin) if begin[0].size > tile_loop.WHOLE else None
    new += _cast(program.run(group, args), begin) if made is None else made
  return new


def _in_tiles(
  program: Parts, results: Sequence[int], args: Sequence[Any], old: Sequence[Any]
) -> list[Any] | None:
  """New results `in_place`; None if they are no elementwise function of their arguments.

  Of `optax.adamw`, whose update and moments are each made of old moments, a CPU would copy one
  before it changes it: 4 B/param. docs/xla_notes.md#replaced
  """
  needed = program.arguments(results)
  given = [args[k] for k in needed]
  arrays = {n: x for n, x in enumerate(given) if jnp.shape(x) == old[0].shape}
  like = [jax.ShapeDtypeStruct(jnp.shape(x), x.dtype) for x in given]

  def rule(*given):
    every = list(args)
    for k, x in zip(needed, given, strict=True):
      every[k] = x
    return program.run(results, every)

  try:
    proved = Program(rule, like, [0 if n in arrays else None for n in range(len(given))])
  except NotElementwise:
    return None
  replaced = {n: m for n, x in arrays.items() for m, y in enumerate(old) if x is y}
  read = arrays.keys() - replaced
  env = proved.run_shared(given)

  def new(tiles, _):
    values = {n: tiles[m] for n, m in replaced.items()}
    values.update(zip(sorted(read), tiles[len(old) :], strict=True))
    made = proved.run_leaf(0, env, values, range(len(results)))
    return _cast(made.values(), tiles[: len(old)])

  return in_place(new, old, [arrays[n] for n in sorted(read)])


def _start(x: jax.Array, like: Any) -> jax.Array:
  """The gradient `x` itself, or, if its update is to have another form, what does not move."""
  if x.dtype == like.dtype and x.shape == like.shape:
    return x
  return jnp.full_like(x, STILL, dtype=like.dtype, shape=like.shape)


def _cast(new: Any, like: Any) -> list[jax.Array]:
  return [jnp.asarray(x, old.dtype) for x, old in zip(new, like, strict=True)]
