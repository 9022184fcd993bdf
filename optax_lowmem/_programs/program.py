"""A rule that was proved elementwise, cut up to be run leaf by leaf, on tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_lowmem._meshes.explicit_axes import explicit_sharding
from optax_lowmem._programs.elementwise import Op, Proof, Ref

_FLOAT32 = (8, 23)  # bits of exponent and mantissa
_NAN = 0x7FC00000


class Program:
  """A function that was proved elementwise, ready to be run leaf by leaf.

  Attributes:
    out_tree: structure of the function's result.
    owners: for each flat result, the leaf it belongs to, or None.
  """

  def __init__(self, fn: Callable[..., Any], args: Sequence[Any], owners: Sequence[int | None]):
    """Traces `fn(*args)` and proves it.

    Args:
      fn: the function, of flat arguments, returning any pytree.
      args: a `jax.ShapeDtypeStruct` for every argument.
      owners: for every argument the leaf it belongs to, or None.

    Raises:
      NotElementwise: if the proof fails.
    """
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    self.out_tree = jax.tree.structure(out_shape)
    proof = Proof(closed, owners)
    self._inputs, self._constants, self._ops = proof.inputs, proof.constants, proof.ops
    self._outputs = proof.outputs
    self.owners = [ref.owner for ref in self._outputs]
    self._before: dict[int, int] = {}

  def run_shared(self, args: Sequence[Any]) -> dict[int, Any]:
    """Runs the part that belongs to no leaf; returns the environment for `run_leaf`.

    Args:
      args: the arguments without owner; what stands at the others' places is ignored.
    """
    env = {ref.index: _off_mesh(value) for ref, value in self._constants}
    env |= {r.index: v for r, v in zip(self._inputs, args, strict=True) if r.owner is None}
    for op in self._ops.get(None, ()):
      _bind(op, env)
    return env

  def run_leaf(
    self,
    leaf: int,
    env: dict[int, Any],
    args: Mapping[int, jax.Array],
    results: Iterable[int],
    given: Mapping[int, jax.Array] | None = None,
    rounded: bool = False,
  ) -> dict[int, jax.Array]:
    """Computes results of one leaf, on all of it or on a tile of any shape.

    Args:
      leaf: the index of the leaf.
      env: what `run_shared` returned.
      args: by position, the leaf's arguments that are needed, all of one shape.
      results: positions of the wanted flat results; they belong to the leaf or are uniform.
      given: by position, results that are taken as they are instead of being computed, also where
        other results are made of them.
      rounded: whether what passes a `rounding_point` is rounded there; XLA may else make one
        operation of a product before it and a sum behind it.

    Returns:
      The results by position.
    """
    env, wanted = dict(env), list(results)
    env.update((self._inputs[k].index, x) for k, x in args.items())
    env.update((self._outputs[k].index, x) for k, x in (given or {}).items())
    like = next(iter(args.values()))
    form = like.shape, explicit_sharding(like)  # a selection asks for operands that lie alike
    for op in self._needed(leaf, wanted, given or {})[0]:
      if _is_rounding_point(op):
        value = env[op.inputs[0].index]
        env[op.outputs[0].index] = _rounded(value) if rounded else value
      else:
        _bind(op, env, form)
    refs = ((k, self._outputs[k]) for k in wanted)
    return {k: _full(r, env[r.index], *form) if r.uniform else env[r.index] for k, r in refs}

  def arguments_of(self, leaf: int, results: Iterable[int], given: Iterable[int]) -> set[int]:
    """Positions of the leaf's arguments that `results` are made of, where `given` are known."""
    return self._needed(leaf, results, given)[1]

  def before_parameters(self, leaf: int, moving: Sequence[int]) -> int:
    """The position of the last value behind a result that is made without the parameter.

    Weight decay, learning rate and their like are applied to one value that the rest of a rule
    makes. That value becomes a further result of the program.

    Args:
      leaf: the index of the leaf; also the position of the result.
      moving: positions of the arguments that the rule works on: gradient and state.

    Returns:
      Its position; `leaf` itself if the result needs no parameter, or more than one such value.
    """
    if leaf in self._before:
      return self._before[leaf]
    moved = {self._inputs[k].index for k in moving}
    for op in self._ops.get(leaf, ()):
      if moved & {ref.index for ref in op.inputs}:
        moved.update(ref.index for ref in op.outputs)
    maker = {ref.index: op for op in self._ops.get(leaf, ()) for ref in op.outputs}
    value, found = self._outputs[leaf], None
    while (op := maker.get(value.index)) is not None:
      from_moving = {ref.index: ref for ref in op.inputs if ref.index in moved}
      if len(from_moving) != 1:
        break
      (value,) = from_moving.values()
      if any(ref.owner is not None and ref.index not in moved for ref in op.inputs):
        found = value
    if found is None or found.index not in maker or found.aval.dtype != jnp.float32:
      self._before[leaf] = leaf
    else:
      self._before[leaf] = len(self._outputs)
      self._outputs.append(found)
      self.owners.append(leaf)
    return self._before[leaf]

  def outline(self, arguments: Sequence[int], results: Sequence[int]) -> tuple[Any, list[int]]:
    """What the part of one leaf does, whichever leaf it is.

    Args:
      arguments: positions of the leaf's arguments.
      results: positions of its results.

    Returns:
      A key, equal for leaves whose parts are the same operations on the same constants, and the
      indices in the environment of the scalars that the part needs besides, in the key's order.
    """
    constants = {
      ref.index: value
      for ref, value in self._constants
      if ref.uniform and not isinstance(value, Tracer)
    }
    names: dict[int, Any] = {
      self._inputs[k].index: ("argument", n) for n, k in enumerate(arguments)
    }
    scalars: list[int] = []

    def name(ref):
      if ref.index not in names and ref.index in constants:
        value = np.asarray(constants[ref.index])
        names[ref.index] = "constant", str(value.dtype), value.tobytes()
      elif ref.index not in names:
        names[ref.index] = "scalar", len(scalars)
        scalars.append(ref.index)
      return names[ref.index], ref.uniform, ref.aval.dtype, ref.aval.weak_type

    ops = []
    leaf = self._inputs[arguments[0]].owner
    assert leaf is not None
    for op in self._needed(leaf, results, ())[0]:
      ops.append((op.primitive, repr(op.params), op.on_scalars, *map(name, op.inputs)))
      names.update((ref.index, ("made", len(ops), n)) for n, ref in enumerate(op.outputs))
    return (tuple(ops), tuple(name(self._outputs[k]) for k in results)), scalars

  def _needed(
    self, leaf: int, results: Iterable[int], given: Iterable[int]
  ) -> tuple[list[Op], set[int]]:
    """The operations of a leaf behind `results`, in order, and the arguments they start from."""
    known = {self._outputs[k].index for k in given}
    needed = {self._outputs[k].index for k in results} - known
    ops = []
    for op in reversed(self._ops.get(leaf, ())):
      if needed & {ref.index for ref in op.outputs}:
        ops.append(op)
        needed |= {ref.index for ref in op.inputs} - known
    arguments = {k for k, ref in enumerate(self._inputs) if ref.index in needed}
    return ops[::-1], {k for k in arguments if self._inputs[k].owner == leaf}

  def shared_result(self, position: int, env: dict[int, Any]) -> jax.Array:
    """The flat result at `position`, which belongs to no leaf."""
    ref = self._outputs[position]
    value = env[ref.index]
    return _full(ref, value, ref.aval.shape) if ref.uniform else jnp.asarray(value)

  def is_uniform(self, position: int) -> bool:
    """Whether the flat result at `position` is the same everywhere."""
    return self._outputs[position].uniform

  def returns_argument(self, position: int) -> int | None:
    """The position of the argument that the flat result at `position` is, if it is one."""
    index = self._outputs[position].index
    return next((k for k, ref in enumerate(self._inputs) if ref.index == index), None)

  def uniform_value(self, position: int, env: dict[int, Any]) -> jax.Array:
    """The scalar that fills a uniform result."""
    ref = self._outputs[position]
    return _full(ref, env[ref.index], ())


def rounding_point(x: jax.Array) -> jax.Array:
  """`x`, a float32, as a result would be that is stored there: rounded. Elsewhere than in a
  `Program` it does nothing.
  """
  return jax.lax.reduce_precision(x, *_FLOAT32)


def _is_rounding_point(op: Op) -> bool:
  precision = op.params.get("exponent_bits"), op.params.get("mantissa_bits")
  is_asked = op.primitive.name == "reduce_precision" and precision == _FLOAT32
  return is_asked and op.outputs[0].aval.dtype == jnp.float32


def _rounded(x: jax.Array) -> jax.Array:
  """`x`, by a minimum that only the patterns of NaNs exceed."""
  pattern = jax.lax.bitcast_convert_type(x, jnp.int32)
  magnitude = jnp.minimum(pattern & 0x7FFFFFFF, _NAN)
  return jax.lax.bitcast_convert_type(magnitude | (pattern & -0x80000000), jnp.float32)


def _off_mesh(constant: Any) -> Any:
  """A number that lies on explicit axes as one of NumPy: JAX lets no `shard_map` close over it."""
  known = isinstance(constant, jax.Array) and not isinstance(constant, Tracer)
  on_mesh = known and constant.ndim == 0 and explicit_sharding(constant) is not None
  return np.asarray(constant) if on_mesh else constant


def _full(ref: Ref, value: Any, shape: tuple[int, ...], sharding: Any = None) -> jax.Array:
  return jnp.broadcast_to(jnp.asarray(value, ref.aval.dtype), shape, out_sharding=sharding)


def _bind(op: Op, env: dict[int, Any], form: tuple[tuple[int, ...], Any] | None = None) -> None:
  """Evaluates one operation; `form` is the tile's shape and sharding, or None if it has no leaf."""
  values = []
  for ref in op.inputs:
    value = env[ref.index]
    if ref.uniform:
      spread = ((),) if op.on_scalars else form or (ref.aval.shape,)
      value = _full(ref, value, *spread)
    values.append(value)
  params = op.params
  if params.get("sharding") is not None and (op.on_scalars or form is not None):
    params = params | {"sharding": None}  # that of the whole array, not of an element or a tile
  results = op.primitive.bind(*values, **params)
  if not op.primitive.multiple_results:
    results = [results]
  env.update(zip((ref.index for ref in op.outputs), results, strict=True))
