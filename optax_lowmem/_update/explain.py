"""`explain`: how each parameter's state is held and updated, and why."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal

import jax
import optax

from optax_lowmem._arguments.checks import check_transformation
from optax_lowmem._arguments.nnx_boxes import unbox
from optax_lowmem._host_memory.state_bytes import state_bytes
from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem._state.leaves import holds_pages, stored_places
from optax_lowmem._state.moments import Place, field_of
from optax_lowmem._state.nnx_variables import is_model
from optax_lowmem._update.journal import Note, journal

_PLATFORMS = ("cuda", "rocm", "tpu", "cpu")


@dataclasses.dataclass(frozen=True)
class Explained:
  """How one parameter is held and updated.

  Attributes:
    parameter: its path, as `jax.tree_util.keystr` writes it.
    shape: its shape.
    held: for each array of its state that has its shape, by field: how it is held.
    bytes: of these arrays.
    method: ``"kernel"`` (one launch), ``"phases"`` (whole arrays, in as few passes as may be),
      ``"tiles"`` (a loop), ``"whole"`` (the rule on decoded arrays), or ``"optax"``: its own rule
      on float32.
    reason: why that method, in words.
  """

  parameter: str
  shape: tuple[int, ...]
  held: dict[str, str]
  bytes: int
  method: str
  reason: str


class Explanation(tuple[Explained, ...]):
  """One `Explained` a parameter; `print` shows a table, `repr` a line.

  Attributes:
    platform: what updates are compiled for.
    other: the arrays of the state that have the shape of no parameter: rows and columns of factored
      moments, what `optax.flatten` joins. None if there are none; single numbers are left out. Its
      `parameter` is ``"other state"``, its `method` empty where it is that of the parameters.
  """

  platform: str
  other: Explained | None

  def __new__(
    cls, explained: Iterable[Explained], platform: str, other: Explained | None = None
  ) -> Explanation:
    new = super().__new__(cls, explained)
    new.platform, new.other = platform, other
    return new

  def __getnewargs__(self) -> tuple[Any, ...]:
    return tuple(self), self.platform, self.other  # for `copy` and `pickle`

  def __repr__(self) -> str:
    methods = collections.Counter(e.method for e in self)
    counts = {"parameters": len(self), "bytes": sum(e.bytes for e in self._rows()), **methods}
    return f"Explanation({', '.join(f'{what}={n}' for what, n in counts.items())})"

  def __str__(self) -> str:
    rows = [("parameter", "shape", "state", "bytes", f"updated by, on {self.platform}", "because")]
    for e in self._rows():
      held = ", ".join(f"{field}: {form}" for field, form in e.held.items()) or "none"
      shape = "" if e is self.other else str(e.shape)
      rows.append((e.parameter, shape, held, f"{e.bytes:,}", e.method, e.reason))
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    lines = []
    for *cells, last in rows:
      lines.append("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + "  " + last)
    return "\n".join(lines)

  def _rows(self) -> list[Explained]:
    return [*self] if self.other is None else [*self, self.other]


def explain(
  tx: optax.GradientTransformation,
  params: Any,
  platform: Literal["cuda", "rocm", "tpu", "cpu"] = "cuda",
) -> Explanation:
  """Says for every parameter how its state is held, by what method it is updated, and why.

  Nothing is computed: `tx` is traced on shapes.

  Args:
    tx: a transformation; chains, masks and wrappers around those of this library too.
    params: parameters, or their shapes; of an NNX model its `flax.nnx.State` of what is trained.
    platform: ``"cuda"``, ``"rocm"``, ``"tpu"`` or ``"cpu"``: what updates are compiled for.

  Returns:
    An `Explanation`: a tuple with an `Explained` for each parameter, which prints as a table. State
    that belongs to no parameter is its `other`, the last row.

  Raises:
    ValueError: for an unknown platform.
    TypeError: if `tx` is no transformation, or `params` an NNX model, which says not what is
      trained.

  Examples:
    >>> import jax.numpy as jnp, optax_lowmem as lowmem
    >>> params = {"w": jnp.zeros((256, 256)), "b": jnp.zeros(256), "r": jnp.zeros((100, 100))}
    >>> for e in lowmem.explain(lowmem.adamw(1e-3), params):
    ...   print(e.parameter, e.held["mu"], e.method)
    ['b'] float32 optax
    ['r'] power8 in blocks of 100 phases
    ['w'] power8 in blocks of 64 kernel
  """
  if platform not in _PLATFORMS:
    raise ValueError(
      f"`platform` must be one of {', '.join(_PLATFORMS)}, got {platform!r}. JAX's 'gpu' is 'cuda' "
      "on NVIDIA's cards and 'rocm' on AMD's."
    )
  check_transformation("tx", tx)
  if is_model(params):
    raise TypeError(
      "`params` must be what is trained, got an NNX model. Pass `nnx.state(model, nnx.Param)`, or "
      "whatever `wrt` of its `nnx.Optimizer` is."
    )
  shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), unbox(params))
  state = jax.eval_shape(tx.init, shapes)
  with journal(platform) as notes:
    update = optax.with_extra_args_support(tx).update
    jax.eval_shape(lambda *args: update(*args), shapes, state, shapes)  # not from a cache
  flat, _ = jax.tree_util.tree_flatten_with_path(shapes)
  held: list[dict[str, Any]] = [{} for _ in flat]
  others: list[tuple[Place, Any]] = []
  for place, leaf in stored_places(state, shapes):
    if place.owner is None and math.prod(leaf.shape) > 1:
      others.append((place, leaf))
    elif place.owner is not None:
      held[place.owner][field_of(place) or jax.tree_util.keystr(place.prefix)] = leaf
  explained = []
  for (path, leaf), arrays in zip(flat, held, strict=True):
    name = jax.tree_util.keystr(path)
    why = "no array of the state has its shape" if others and not arrays else None
    note = notes.get(name, Note("optax", why or "nothing of its state is quantized"))
    method, reason = _on(platform, note)
    explained.append(
      Explained(
        parameter=name,
        shape=leaf.shape,
        held={field: _form(x) for field, x in arrays.items()},
        bytes=sum(state_bytes(arrays).values()),
        method=method,
        reason=reason,
      )
    )
  known = {e.parameter for e in explained}
  left = [note for name, note in notes.items() if name not in known]
  return Explanation(explained, platform, _other(others, left, platform))


def _other(arrays: list[tuple[Place, Any]], notes: list[Note], platform: str) -> Explained | None:
  """What is held for no parameter, and its update, if that is one by itself."""
  if not arrays:
    return None
  forms: dict[str, dict[str, None]] = {}
  for place, leaf in arrays:
    names = [k.name for k in place.path if isinstance(k, jax.tree_util.GetAttrKey)]
    field = names[-1] if names else jax.tree_util.keystr(place.path)
    forms.setdefault(field, {})[_form(leaf)] = None
  method, reason = "", "its arrays have the shape of no parameter"
  if notes:
    method, reason = _on(platform, notes[0])
  return Explained(
    parameter="other state",
    shape=(),
    held={field: " and ".join(found) for field, found in forms.items()},
    bytes=sum(state_bytes([leaf for _, leaf in arrays]).values()),
    method=method,
    reason=reason,
  )


def _form(x: Any) -> str:
  where = " in host memory" if holds_pages(x) else ""
  if not isinstance(x, QuantizedArray):
    return f"{x.dtype}{where}"
  block = " x ".join(map(str, x.block))
  return f"{x.codebook.name} in blocks of {block}{where}"


def _on(platform: str, note: Note) -> tuple[str, str]:
  """The method on a platform, and why."""
  if platform == "cpu":
    return ("tiles", "the rule is elementwise") if note.method == "elementwise" else note
  if note.method == "elementwise" and not note.reason:
    return "kernel", "the rule is elementwise"
  if note.method == "optax":
    return note
  return "whole" if platform == "tpu" else "phases", note.reason
