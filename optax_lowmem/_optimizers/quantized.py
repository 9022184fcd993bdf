"""`quantized`: any optax transformation, with quantized moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_lowmem._arguments.checks import check_block_size, check_min_size, check_transformation
from optax_lowmem._arguments.hyperparameters import check_static
from optax_lowmem._arguments.masks import broadcast_mask, check_mask
from optax_lowmem._arguments.nnx_boxes import unbox
from optax_lowmem._optimizers.initial_state import initial
from optax_lowmem._programs.elementwise import NotElementwise
from optax_lowmem._quantization.codebook import Codebook
from optax_lowmem._quantization.codebooks import CodebookName
from optax_lowmem._quantization.storage import Blockwise, Storage, by_field
from optax_lowmem._state.forms import check_forms
from optax_lowmem._state.inner import check_dense, check_dtypes, check_fields, warn_if_unknown
from optax_lowmem._state.moments import Kind, field_of, kind_of, places
from optax_lowmem._state.nnx_variables import unbox_quantized
from optax_lowmem._update.decoded_state import held, is_decoded
from optax_lowmem._update.engine import update_stored
from optax_lowmem._update.extra_args import compiled_outside_jit
from optax_lowmem._update.whole_arrays import update_dense

_BITS = (32, 8, 4)
_CODEBOOKS: dict[int, dict[Kind, CodebookName]] = {
  8: {Kind.FIRST: "power8", Kind.SECOND: "power8_unsigned"},
  4: {Kind.FIRST: "power4", Kind.SECOND: "power4_unsigned"},
}


def quantized(
  inner: optax.GradientTransformation,
  bits: Literal[4, 8, 32] = 8,
  *,
  storage: Mapping[str, Storage | Codebook | str] | None = None,
  block_size: int | None = None,
  min_size: int = 4096,
  quantize_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Quantizes the moments of any optax transformation.

  The state is `inner`'s own, except that its moments are `QuantizedArray`\ s. An update decodes
  them, runs `inner`, and encodes them again:

  .. math::
    s_t, u_t = \mathrm{inner}(g_t, \mathrm{load}(\hat s_{t-1}), p_t), \qquad
    \hat s_t = \mathrm{store}(s_t).

  If `inner` is *elementwise* (Adam, Lion, momentum, weight decay, schedules, masks, and chains of
  them), which is proved from its jaxpr, this is done a tile at a time and only one tile is ever in
  float32. A transformation that reduces over an array (a norm, a trust ratio) is run on whole
  decoded arrays instead: the result is right, the peak is not lower. Put such a one outside:
  ``optax.chain(optax.clip_by_global_norm(1.0), lowmem.adamw(3e-4))``.

  What is quantized: the moments of optax's transformations, some thirty classes of state,
  listed in ``docs/transformations.md``. First moments, which have a sign, are held as `"power8"`
  or `"power4"`; second moments, which must never become zero, as `"power8_unsigned"` or
  `"power4_unsigned"`; in blocks of 64. Everything else (counts, copies of the parameters, fields
  that are not known) stays float32, and can be given a storage by name.

  An update is made of the new moments before they are stored: the first one is that of float32.

  The arithmetic is in float32 whatever the dtype of parameters and gradients; updates come back
  in the wider of these two dtypes. A non-finite gradient element makes its own update non-finite,
  as in optax; its quantized moments keep their last values and its neighbours' are untouched. A
  moment in float32 (of arrays below `min_size`, say) takes it up and keeps it, also as in optax:
  `optax.apply_if_finite` around the transformation skips such steps.

  An update outside `jax.jit` is compiled all the same. Among extra arguments, arrays and floats are
  traced then; flags, integers and strings are not, and for each of their values it is compiled
  once. A number that differs from step to step is better passed as an array.

  Args:
    inner: the transformation.
    bits: 8, 4, or 32: `inner` itself, with float32 state. That is the same bit for bit where
      parameters and gradients are float32; of bfloat16 it takes twice the bytes, and averages do
      not stall. At 4 bits, slow first moments (Lion's, the second one of AdEMAMix) are much noisier
      than Adam's.
    storage: storage by field name, as ``{"mu": Blockwise("dynamic", 256)}``; overrides `bits`. What
      its `store` returns must be an array or a `QuantizedArray` that `load` reads as it is
      (`Storage`). A codebook or its name, as in
      ``{"mu": "log8"}``, stands for a `Blockwise` of it, `block_size` and `min_size`.
    block_size: elements a scale; 64 by default. A moment costs `bits` / 8 + 4 / `block_size` bytes.
    min_size: moments of smaller arrays stay in float32.
    quantize_mask: a tree of bools with the structure of the parameters or a prefix of it, or a
      function of the parameters that returns one. False keeps a parameter's moments in float32.

  Returns:
    The transformation.

  Raises:
    ValueError: for bad `bits`, `block_size` or `min_size`; for a storage of one's own with more
      arithmetic than its form has; from `init` if `storage` names a field
      that the state does not have, if a function or a tree for `quantize_mask` is False throughout,
      if `inner`'s state is quantized or paged already, or was given a dtype for what is to
      be quantized; from `update`, for gradients of other shapes than the parameters, or a state
      that is held otherwise than this transformation holds it.
    TypeError: if `inner` is no transformation, a storage no storage, or `bits`, `block_size`,
      `min_size` or a bool of `quantize_mask` an array; from `init`, for parameters that are not
      floating.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params = {"w": jnp.zeros((64, 64)), "b": jnp.zeros(64)}
    >>> tx = lowmem.quantized(optax.adabelief(1e-3))
    >>> state = tx.init(params)
    >>> type(optax.tree.get(state, "mu")["w"]).__name__
    'QuantizedArray'
    >>> updates, state = tx.update(params, state, params)

  References:
    Dettmers et al, `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021
  """
  check_transformation("inner", inner)
  for name, value in (
    ("bits", bits),
    ("block_size", block_size),
    ("min_size", min_size),
    ("quantize_mask", quantize_mask),
  ):
    check_static(name, value, ("bits", "block_size", "min_size", "quantize_mask"))
  if bits not in _BITS:
    raise ValueError(f"`bits` must be one of {_BITS}, got {bits!r}.")
  check_min_size(min_size)
  block_size = check_block_size(64 if block_size is None else block_size)
  storage = by_field(storage, block_size, min_size)
  inner = optax.with_extra_args_support(inner)

  def init(params):
    _check_floating(params)
    leaves, treedef = jax.tree.flatten(params)
    shapes = [jax.ShapeDtypeStruct(jnp.shape(p), jnp.float32) for p in leaves]
    shaped = jax.eval_shape(inner.init, treedef.unflatten(shapes))
    check_dense(shaped)
    moments = places(shaped, params)
    allowed = broadcast_mask(quantize_mask, params)
    if bits != 32 or storage:
      check_mask(quantize_mask, allowed, leaves, min_size)
    if leaves:  # optax probes transformations with a tree that has none
      check_fields(storage, {field_of(m) for m in moments if m.owner is not None})

    storages = [
      storage_of(shaped, m) if m.owner is None or allowed[m.owner] else None for m in moments
    ]
    check_dtypes(jax.tree.leaves(shaped), moments, storages)
    if bits != 32 and not any(storages):
      warn_if_unknown(shaped, moments, allowed, leaves, min_size)
    return unbox_quantized(initial(inner.init, leaves, treedef, moments, storages))

  def storage_of(state, moment):
    """The storage of a moment, if it is to have one."""
    field = field_of(moment)
    if moment.owner is None or field is None:
      return None
    if storage and field in storage:
      return storage[field]
    kind = kind_of(state, moment)
    if bits == 32 or kind is None:
      return None
    return Blockwise(_CODEBOOKS[bits][kind], block_size, min_size)

  def update(updates, state, params=None, **extra_args):
    return run(updates, state, params, extra_args)

  def checked(updates, state, params, extra_args):
    stored = held(state) if is_decoded() else unbox(state)
    if stored is None:
      raise NotElementwise("its state is changed before `quantized` is given it")
    check_forms(stored, unbox(updates), storage_of, masked=quantize_mask is not None)
    if is_decoded():
      return update_dense(inner.update, updates, state, params, extra_args)
    execute = update_dense if bits == 32 and not storage else update_stored
    return execute(inner.update, updates, state, params, extra_args)

  run = checked if bits == 32 and not storage else compiled_outside_jit(checked)
  return optax.GradientTransformationExtraArgs(init, update)


def _check_floating(params: Any) -> None:
  for path, p in jax.tree_util.tree_flatten_with_path(params)[0]:
    dtype = jnp.result_type(p)
    if jnp.issubdtype(dtype, jnp.floating):
      continue
    needs = "floating parameters. Leave it out with `optax.masked` or `optax.partition`."
    if jnp.issubdtype(dtype, jnp.complexfloating):
      needs = (
        "real parameters. Wrap the whole in `optax.contrib.split_real_and_imaginary(tx)`, which "
        "updates real and imaginary parts as two arrays."
      )
    raise TypeError(
      f"parameter {jax.tree_util.keystr(path) or '()'} has dtype {dtype}, but optimizer state "
      f"needs {needs}"
    )
