"""Sums of gradients between steps: how they are held, and how a gradient is added."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_lowmem._masters.bits import bits_of, float32_of, is_finite
from optax_lowmem._masters.position_noise import position_noise
from optax_lowmem._quantization.codebook import SIGN
from optax_lowmem._quantization.storage import Blockwise
from optax_lowmem._sharding.shards import full_on_shards
from optax_lowmem._state.moments import is_quantized
from optax_lowmem._steps.in_place import in_place
from optax_lowmem._steps.taken import STILL
from optax_lowmem._update.engine import update_stored

CODEBOOK = "sum8"


class _Sums(NamedTuple):
  """State of the rule that `quantized`'s engine runs.

  Attributes:
    taken: whether the gradient is added.
    ends: whether it is the last of its step: the mean is emitted, and the sum begins anew.
    divisor: what the sum is divided by.
    shake: what a sum that is held in codes is multiplied by, about 1; another in each step.
    sums: a tree like the gradients.
  """

  taken: jax.Array
  ends: jax.Array
  divisor: jax.Array
  shake: jax.Array
  sums: Any


class Form(NamedTuple):
  """How sums are held.

  Attributes:
    bits: 8 or 16.
    block_size: elements a scale, in 8 bits.
    min_size: sums of smaller arrays are float32.
  """

  bits: int
  block_size: int
  min_size: int

  def of(self, shape: tuple[int, ...]) -> Any:
    """The form of the sum of one parameter, as shapes."""
    form: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    if self.bits == 8:
      return jax.eval_shape(Blockwise(CODEBOOK, self.block_size, self.min_size).store, form)
    if shape and math.prod(shape) >= max(self.min_size, 1):
      return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return form


def empty(params: Any, form_of: Form) -> Any:
  """Sums of nothing: a tree like the parameters, each sharded as its parameter."""

  def one(p):
    form = form_of.of(jnp.shape(p))
    zeros = [jnp.zeros((), x.dtype) for x in jax.tree.leaves(form)]
    return full_on_shards(jnp.asarray(p) if jnp.ndim(p) == 0 else p, form, zeros)

  return jax.tree.map(one, params)


def check_sums(sums: Any, grads: Any, form_of: Form) -> None:
  """Refuses sums that are not those of such gradients, or not held in so many bits.

  A float32 array where there should be few bits is the running mean of `optax.MultiSteps`.

  Raises:
    ValueError: if they are not.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(grads)
  held = jax.tree.leaves(sums, is_leaf=is_quantized)
  if len(held) != len(flat):
    raise ValueError(
      f"the state has sums of {len(held)} parameters, and there are {len(flat)} gradients. Make it "
      "with `tx.init(params)`, and pass gradients of all parameters."
    )
  for (path, g), x in zip(flat, held, strict=True):
    what = x.codebook.name if is_quantized(x) else jnp.dtype(x.dtype).name
    few = {8: CODEBOOK, 16: "bfloat16"}[form_of.bits]
    form = form_of.of(jnp.shape(g))
    dense = not is_quantized(form) and form.dtype == jnp.float32
    allowed = (few, "float32") if dense else (few,)
    if x.shape != jnp.shape(g) or what not in allowed:
      raise ValueError(
        f"the sum of {jax.tree_util.keystr(path) or '()'} is {what}{list(x.shape)}, and is to be "
        f"{' or '.join(allowed)}{list(jnp.shape(g))}: the state was made with other `bits` or "
        "`min_size`, or for parameters of other shapes. Make it anew with `tx.init(params)`; only "
        "sums that were not complete are lost with it."
      )


def added(
  sums: Any,
  grads: Any,
  *,
  taken: jax.Array,
  ends: jax.Array,
  divisor: jax.Array,
  words: Sequence[jax.Array],
) -> tuple[Any, Any]:
  """Gradients added to their sums.

  Args:
    sums: those of the gradients before.
    grads: the gradients.
    taken: whether they are added at all.
    ends: whether they are the last of their step; they are taken then.
    divisor: what a complete sum is divided by.
    words: what the noise depends on by which bfloat16 is rounded, besides parameter and position.

  Returns:
    Complete sums divided, in the dtypes of the gradients, and `STILL` if they are not complete;
    then the new sums.
  """
  leaves, treedef = jax.tree.flatten(grads)
  if not leaves:
    return grads, sums
  held = jax.tree.leaves(sums, is_leaf=is_quantized)
  scalars = taken, ends, divisor
  if any(map(is_quantized, held)):
    # One pass, by a kernel on GPUs and TPUs and by tiles on CPUs. Codes are rounded by a hash of
    # the value, which would be the same for the same gradients. So the value is another one in each
    # step, by 1.5e-5 of it at most; of each 1e-6, the hash is another one.
    shake = 1.0 + (position_noise(jnp.int32(0), 5, *words).astype(jnp.float32) - 15.5) * 2.0**-20
    rule = functools.partial(_rule, list(map(is_quantized, held)))
    mean, state = update_stored(rule, grads, _Sums(*scalars, shake, sums), None, {})
    return mean, state.sums
  pairs = [
    _added_in_floats(g, x, scalars, (*words, k))
    for k, (g, x) in enumerate(zip(leaves, held, strict=True))
  ]
  means, new = (treedef.unflatten(each) for each in zip(*pairs, strict=True))
  return means, new


def _added_in_floats(
  g: jax.Array, total: jax.Array, scalars: Sequence[jax.Array], words: Sequence[Any]
) -> Sequence[jax.Array]:
  """`_add` of a sum that is bfloat16 or float32."""

  def add(arrays, index):
    g, total = arrays
    mean, new = _add(g.astype(jnp.float32), total.astype(jnp.float32), *scalars)
    if total.dtype == jnp.bfloat16:
      new = _rounded(new, position_noise(index, 16, *words))
    return [mean.astype(g.dtype), new]

  return in_place(add, [g, total])


def _rule(
  in_codes: Sequence[bool], grads: Any, state: _Sums, params: Any = None
) -> tuple[Any, _Sums]:
  """`_add` as a transformation's update; of sums it is told which are held in codes."""
  del params
  leaves, treedef = jax.tree.flatten(grads)
  sums = jax.tree.leaves(state.sums)
  scalars = state.taken, state.ends, state.divisor
  pairs = [
    _add(g, x, *scalars, state.shake if stored else None)
    for g, x, stored in zip(leaves, sums, in_codes, strict=True)
  ]
  means, new = (treedef.unflatten(each) for each in zip(*pairs, strict=True))
  return means, state._replace(sums=new)


def _add(
  g: jax.Array,
  total: jax.Array,
  taken: jax.Array,
  ends: jax.Array,
  divisor: jax.Array,
  shake: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The mean, if it is complete, and the new sum, both float32.

  A sum of which something was not finite is -0.0, which codes and what rounds can hold as well as
  float32 can, and which no sum is otherwise: so one bad element stays one, whatever its block.
  """
  is_bad = (total == 0) & (1 / total < 0)
  new = jnp.where(is_bad, jnp.nan, total + g)
  mean = jnp.where(ends, new / divisor, STILL)
  if shake is not None:  # not of a sum that nothing is added to, which is held exactly
    new = jnp.where(g == 0, new, new * shake)
  finite = jnp.where(new == 0, 0.0, new)
  new = jnp.where(jnp.isfinite(new), finite, -0.0)
  return mean, jnp.where(ends, 0.0, jnp.where(taken, new, total))


def plus(sums: Any, grads: Any, words: Sequence[jax.Array | int]) -> Any:
  """Sums of gradients and others, in the dtypes of the sums; bfloat16 is rounded at random.

  What is not finite stays so.

  Args:
    sums: bfloat16 or float32 arrays.
    grads: a tree like them.
    words: what the noise depends on by which bfloat16 is rounded, besides array and position.
  """

  def one(total, g, *words):
    if total.dtype != jnp.bfloat16:
      return total + g.astype(total.dtype)

    def add(arrays, index):
      total, g = arrays
      new = total.astype(jnp.float32) + g.astype(jnp.float32)
      rounded = _rounded(new, position_noise(index, 16, *words))
      return [jnp.where(jnp.isfinite(new), rounded, new.astype(jnp.bfloat16))]

    return in_place(add, [total], [g])[0]

  leaves, treedef = jax.tree.flatten(sums)
  pairs = zip(leaves, treedef.flatten_up_to(grads), strict=True)
  return treedef.unflatten([one(*pair, *words, k) for k, pair in enumerate(pairs)])


def _rounded(x: jax.Array, noise: jax.Array) -> jax.Array:
  """Finite float32 rounded to bfloat16, up or down at random, so that the mean is right.

  Args:
    x: the values.
    noise: integers of 16 bits.
  """
  pattern = bits_of(x)
  drawn = pattern + noise
  # Not to infinity: the largest bfloat16 is the largest sum.
  rounded = jnp.where(is_finite(drawn & ~0xFFFF), drawn, pattern) & ~0xFFFF
  # What is negative and rounded to zero is 0.0: -0.0 means something else. A GPU has values that
  # are that small; a CPU takes them for zero.
  rounded = jnp.where((rounded == SIGN) & (pattern != SIGN), 0, rounded)
  return float32_of(rounded).astype(jnp.bfloat16)
