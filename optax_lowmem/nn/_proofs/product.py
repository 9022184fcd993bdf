"""The proof that a traced function is one product of an input and a weight.

Putting an adapter on a layer, or packing its weight, is right only if the layer multiplies its
input by that weight, once, and does nothing else with either. The name of a class says nothing
about it, so it is read off the jaxpr: every axis of every value is followed back to axes of the
input, of the weight and of a bias, through the primitives that only move axes. One `dot_general`
of input and weight may join them, one `add` may bring in the bias; anything else refutes the claim.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from optax_lowmem._programs.flat_jaxpr import Flat, Operation, flattened

_SAME = frozenset(("copy", "copy_p", "name", "sharding_constraint", "optimization_barrier"))


class NotAProduct(Exception):
  """The function computes something else; the message says what."""


class Product(NamedTuple):
  """What the function computes: `jnp.einsum(equation, x, weight)`, and perhaps a bias.

  Attributes:
    equation: with one letter for each axis of the input, of the weight and of the output.
    has_bias: whether a bias is added.
    dtype: of the multiplication.
    out_dtype: of the output.
    precision: of the multiplication.
    plain: whether it accumulates in its own dtype, as far as the program says.
  """

  equation: str
  has_bias: bool
  dtype: Any
  out_dtype: Any
  precision: Any
  plain: bool


class _Value(NamedTuple):
  """What a value is made of ("x", "w", "b", "xw" or "xwb"), and the labels of each of its axes.

  An axis has several labels where axes were merged, and none where it was made up, with length 1
  or by repetition.
  """

  kind: str
  axes: tuple[tuple[int, ...], ...]


def prove(closed: Any, kinds: str) -> Product:
  """Reads a jaxpr whose inputs are of these kinds, one letter for each.

  They are "x" of the input, "w" of the weight, "b" of the bias, and "c" of constants, which may not
  meet the others.

  Raises:
    NotAProduct: it is something else.
  """
  return _Proof().run(closed, kinds)


class _Proof:
  def __init__(self):
    self.sizes: list[int] = []
    self.same: list[int] = []  # which label a label was found equal to
    self.dot: Any = None

  def run(self, closed: Any, kinds: str) -> Product:
    flat = flattened(closed, custom=False)
    inputs: list[Any] = [
      None if kind == "c" else self._new(kind, value.aval.shape)
      for kind, value in zip(kinds, flat.inputs, strict=True)
    ]
    outputs = self._follow(flat, inputs)
    if len(outputs) != 1 or outputs[0] is None or outputs[0].kind not in ("xw", "xwb"):
      raise NotAProduct("its result is no product of its input and its weight")
    equation = self._equation(inputs[kinds.index("x")], inputs[kinds.index("w")], outputs[0])
    if "b" in kinds:
      if outputs[0].kind != "xwb":
        raise NotAProduct("it does not add its bias")
      self._check_bias(inputs[kinds.index("b")], inputs[kinds.index("w")], outputs[0])
    dtype, precision, plain = self.dot
    out_dtype = flat.outputs[0].aval.dtype
    return Product(equation, "b" in kinds, dtype, out_dtype, precision, plain)

  def _new(self, kind: str, shape: tuple[int, ...]) -> _Value:
    first = len(self.sizes)
    self.sizes += shape
    self.same += range(first, first + len(shape))
    return _Value(kind, tuple((first + i,) for i in range(len(shape))))

  def _root(self, label: int) -> int:
    while self.same[label] != label:
      label = self.same[label]
    return label

  def _join(self, one: tuple[int, ...], other: tuple[int, ...]) -> None:
    if [self.sizes[a] for a in one] != [self.sizes[a] for a in other]:
      raise NotAProduct("it multiplies or adds along axes that are merged in different ways")
    for a, b in zip(one, other, strict=True):
      self.same[self._root(b)] = self._root(a)

  def _follow(self, flat: Flat, inputs: Sequence[_Value | None]) -> list[_Value | None]:
    known = dict(zip(flat.inputs, inputs, strict=True))
    for operation in flat.operations:
      values = [known.get(value) for value in operation.inputs]
      if any(value is not None for value in values):  # else it is a constant
        made = self._apply(operation, values)
        known[operation.outputs[0]] = made
    return [known.get(value) for value in flat.outputs]

  def _apply(self, operation: Operation, values: list[Any]) -> _Value:
    name, params = operation.primitive.name, operation.params
    if any(value is None for value in values):
      raise NotAProduct(f"it does more than multiply: `{name}` with a constant")
    value = values[0]
    if name == "dot_general":
      return self._multiply(operation, *values)
    if name in ("add", "add_any"):
      return self._add(*values)
    if name in _SAME and len(values) == 1:
      return value
    if name == "convert_element_type" and jnp.issubdtype(params["new_dtype"], jnp.floating):
      return value
    if name == "transpose":
      return value._replace(axes=tuple(value.axes[i] for i in params["permutation"]))
    if name == "squeeze":
      gone = params["dimensions"]
      return value._replace(axes=tuple(a for i, a in enumerate(value.axes) if i not in gone))
    if name == "reshape" and params["dimensions"] is None:
      return value._replace(axes=self._regroup(value.axes, operation.outputs[0].aval.shape))
    if name == "broadcast_in_dim":
      shape = operation.outputs[0].aval.shape
      return self._broadcast(value, shape, params["broadcast_dimensions"])
    raise NotAProduct(f"it does more than multiply: `{name}`")

  def _regroup(self, axes: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    left = [label for axis in axes for label in axis]
    found: list[list[int]] = []
    for size in shape:
      axis: list[int] = []
      while left and math.prod(self.sizes[a] for a in axis) * self.sizes[left[0]] <= size:
        if self.sizes[left[0]] == 1 and axis:
          break
        axis.append(left.pop(0))
        if size == 1:
          break
      if math.prod(self.sizes[a] for a in axis) != size:
        raise NotAProduct("it cuts an axis of its input, weight or output in pieces")
      found.append(axis)
    if any(self.sizes[a] != 1 for a in left):
      raise NotAProduct("it cuts an axis of its input, weight or output in pieces")
    return tuple(tuple(axis) for axis in found)

  def _broadcast(self, value: _Value, shape: Any, places: Any) -> _Value:
    axes: list[tuple[int, ...]] = [()] * len(shape)
    for axis, place in zip(value.axes, places, strict=True):
      if math.prod(self.sizes[a] for a in axis) == shape[place]:
        axes[place] = axis
    if value.kind != "b" and any(n > 1 and not a for n, a in zip(shape, axes, strict=True)):
      raise NotAProduct("it repeats its input, weight or output")
    return value._replace(axes=tuple(axes))

  def _multiply(self, operation: Operation, left: _Value, right: _Value) -> _Value:
    if {left.kind, right.kind} != {"x", "w"}:
      raise NotAProduct("it multiplies other things than its input and its weight")
    (sum_l, sum_r), (batch_l, batch_r) = operation.params["dimension_numbers"]
    for i, j in zip((*sum_l, *batch_l), (*sum_r, *batch_r), strict=True):
      self._join(left.axes[i], right.axes[j])
    free_l = [a for i, a in enumerate(left.axes) if i not in (*sum_l, *batch_l)]
    free_r = [a for i, a in enumerate(right.axes) if i not in (*sum_r, *batch_r)]
    dtype = jnp.promote_types(*(value.aval.dtype for value in operation.inputs))
    wanted = operation.params["preferred_element_type"]
    self.dot = dtype, operation.params["precision"], wanted is None or wanted == dtype
    return _Value("xw", (*(left.axes[i] for i in batch_l), *free_l, *free_r))

  def _add(self, one: _Value, other: _Value) -> _Value:
    if one.kind == "b":
      one, other = other, one
    if (one.kind, other.kind) != ("xw", "b"):
      raise NotAProduct("it adds something that is not a bias")
    for axis, bias in zip(one.axes, other.axes, strict=True):
      if bias:
        self._join(axis, bias)
    return _Value("xwb", one.axes)

  def _check_bias(self, b: _Value, w: _Value, y: _Value) -> None:
    """One value for each output, laid out as the output is."""
    own = {self._root(axis[0]) for axis in w.axes}
    outputs = [self._root(axis[0]) for axis in y.axes]
    if [self._root(axis[0]) for axis in b.axes] != [root for root in outputs if root in own]:
      raise NotAProduct("its bias is not one value for each output")

  def _equation(self, x: _Value, w: _Value, y: _Value) -> str:
    letters: dict[int, str] = {}

    def side(value: _Value) -> str:
      if any(len(axis) != 1 for axis in value.axes):
        raise NotAProduct("its output has axes that are merged, or of its own")
      roots = [self._root(axis[0]) for axis in value.axes]
      for root in roots:
        letters.setdefault(root, string.ascii_letters[len(letters)])
      return "".join(letters[root] for root in roots)

    lhs, rhs, out = side(x), side(w), side(y)
    if any(len(set(s)) < len(s) for s in (lhs, rhs, out)):
      raise NotAProduct("it takes a diagonal")
    if (set(lhs) - set(rhs) - set(out)) or (set(rhs) - set(lhs) - set(out)):
      raise NotAProduct("it drops an axis of its input or weight")
    return f"{lhs},{rhs}->{out}"
