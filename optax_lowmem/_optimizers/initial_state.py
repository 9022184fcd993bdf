"""The first state of `quantized`: moments that start uniform are never dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem._programs.elementwise import NotElementwise
from optax_lowmem._programs.program import Program
from optax_lowmem._quantization.array import QuantizedArray, encode
from optax_lowmem._quantization.storage import Storage
from optax_lowmem._sharding.shards import full_on_shards, on_mesh_of, on_shards
from optax_lowmem._state.moments import Place


def initial(
  init: Callable[[Any], Any],
  leaves: Sequence[Any],
  treedef: Any,
  moments: Sequence[Place],
  storages: Sequence[Storage | None],
) -> Any:
  """The state that `init` makes of the parameters; moments that start uniform are never dense."""

  def flat_init(*leaves):
    return init(treedef.unflatten(leaves))

  def store(value, storage):
    return value if storage is None else storage.store(value)

  shapes = [jax.ShapeDtypeStruct(jnp.shape(p), jnp.float32) for p in leaves]
  try:
    program = Program(flat_init, shapes, range(len(leaves)))
  except NotElementwise:  # drawn at random, say
    flat, out_tree = jax.tree.flatten(flat_init(*map(_in_float32, leaves)))
    return out_tree.unflatten(map(store, flat, storages))
  env = program.run_shared(shapes)
  state = []
  for k, (moment, storage) in enumerate(zip(moments, storages, strict=True)):
    owner = program.owners[k]
    if owner is not None:
      value = _made_of(leaves[owner], program, owner, env, k, storage)
    elif moment.owner is not None and program.is_uniform(k):
      value = _full_like(leaves[moment.owner], program.uniform_value(k, env), storage)
    else:
      value = store(on_mesh_of(leaves, program.shared_result(k, env)), storage)
    state.append(value)
  return program.out_tree.unflatten(state)


def _made_of(
  leaf: Any, program: Program, owner: int, env: Any, position: int, storage: Storage | None
) -> Any:
  """The moment at `position`, which `program` makes of the parameter `leaf`, stored."""
  form = _form(leaf, jnp.float32, storage)

  def run(values, shared):
    dense = {owner: _in_float32(values[owner])}
    made = program.run_leaf(owner, env | shared, dense, [position])[position]
    if not isinstance(form, QuantizedArray):
      return {-1: made.astype(form.dtype)}
    return {-1: encode(made, form.codebook, form.block)}

  shared = {i: env[i] for i in program.outline([owner], [position])[1]}
  return on_shards(run, {owner: leaf}, shared, {-1: form})[-1]


def _full_like(leaf: Any, value: jax.Array, storage: Storage | None) -> Any:
  """A moment of `leaf`'s shape (and sharding) that is `value` everywhere, stored."""
  form = _form(leaf, value.dtype, storage)
  if not isinstance(form, QuantizedArray):
    return full_on_shards(leaf, form, [value])
  one = encode(value.reshape(1), form.codebook, (1,))
  code = one.codes if form.codebook.bits == 8 else (one.codes >> 4) * 17  # in both halves
  return full_on_shards(leaf, form, [code.reshape(()), one.scales.reshape(())])


def _form(leaf: Any, dtype: Any, storage: Storage | None) -> Any:
  """Shapes and dtypes of a moment of `leaf`'s shape and that dtype, as it is stored."""
  dense = jax.ShapeDtypeStruct(jnp.shape(leaf), dtype)
  return dense if storage is None else jax.eval_shape(storage.store, dense)


def _in_float32(p: Any) -> jax.Array:
  """A parameter whose values are needed."""
  if isinstance(p, jax.ShapeDtypeStruct):
    raise TypeError(
      "this state starts from the values of the parameters, and a `jax.ShapeDtypeStruct` has none. "
      "For shapes alone, use `jax.eval_shape(tx.init, params)`."
    )
  return jnp.asarray(p, jnp.float32)
