"""A product of an input and a kernel of any arrangement of axes, seen as one of matrices."""

from __future__ import annotations

import dataclasses
import math
import string

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Contraction:
  """Which axes of a kernel are inputs, outputs, and shared with the input (one matrix for each).

  Attributes:
    equation: of an `Einsum`, such as ``"BTD,NDH->BTNH"``; None for other layers.
    axis: without an equation: the axes of the input that are summed over.
    batch: without an equation: how many leading axes the input shares with the kernel.
    kernel_shape: of one layer.
  """

  equation: str | None
  axis: tuple[int, ...]
  batch: int
  kernel_shape: tuple[int, ...]

  @classmethod
  def dense(cls, inputs: int, outputs: int) -> Contraction:
    """Of a kernel (in, out), multiplied with the last axis of the input."""
    return cls(None, (-1,), 0, (inputs, outputs))

  @classmethod
  def of_equation(cls, equation: str, kernel_shape: tuple[int, ...]) -> Contraction:
    """The contraction of an equation of an input and a kernel.

    Raises:
      ValueError: the equation sums over an axis of one operand alone, or repeats a letter.
    """
    lhs, rhs, out = _split(equation)
    letters = [c for c in lhs + out if c != "."]
    lonely = (set(rhs) - set(lhs) - set(out)) | (set(lhs) - set(rhs) - set(out) - {"."})
    repeated = any(
      len(set(side)) < len(side) for side in (lhs.replace("...", ""), rhs, out.replace("...", ""))
    )
    if lonely or repeated or "." in rhs or not letters:
      raise ValueError(
        f"the equation {equation!r} is not a plain product of an input and a kernel: it "
        "sums over an axis of one of them alone, repeats a letter, or has an ellipsis in the "
        "kernel. Leave this module out of `targets`."
      )
    return cls(equation, (), 0, kernel_shape)

  def letters(self, ndim: int) -> tuple[str, str, str]:
    """Letters of the axes of an input of rank `ndim`, of the kernel and of the output."""
    if self.equation is not None:
      lhs, rhs, out = _split(self.equation)
      used = set(lhs + rhs + out)
      free = [c for c in string.ascii_letters if c not in used]
      dots = "".join(free[: ndim - len(lhs.replace("...", ""))])
      return lhs.replace("...", dots), rhs, out.replace("...", dots)
    rhs = self.rhs
    lhs = list(string.ascii_lowercase[:ndim])
    axis = sorted(a % ndim for a in self.axis)  # as flax does, whatever their order
    for place, letter in zip((*range(self.batch), *axis), rhs, strict=False):
      lhs[place] = letter
    batch, _, outputs = self.groups()
    free = "".join(c for c in lhs if c not in rhs)
    return "".join(lhs), rhs, batch + free + outputs

  @property
  def rhs(self) -> str:
    """The kernel's letters."""
    if self.equation is None:  # whatever the rank of the input
      return string.ascii_uppercase[: len(self.kernel_shape)]
    return _split(self.equation)[1]

  def groups(self) -> tuple[str, str, str]:
    """The kernel's letters that are batch, input and output axes, each in the kernel's order."""
    rhs = self.rhs
    if self.equation is None:
      ends = self.batch + len(self.axis)
      return rhs[: self.batch], rhs[self.batch : ends], rhs[ends:]
    lhs, _, out = _split(self.equation)
    batch = "".join(c for c in rhs if c in lhs and c in out)
    inputs = "".join(c for c in rhs if c in lhs and c not in out)
    return batch, inputs, "".join(c for c in rhs if c not in lhs)

  @property
  def sides(self) -> tuple[tuple[int, ...], ...]:
    """The kernel's axes that are batch, input and output axes."""
    return tuple(tuple(map(self.rhs.index, group)) for group in self.groups())

  def sizes(self, letters: str) -> tuple[int, ...]:
    rhs = self.rhs
    return tuple(self.kernel_shape[rhs.index(c)] for c in letters)

  @property
  def matrix_shape(self) -> tuple[int, ...]:
    """(out, in), or (batch, out, in) if the kernel has axes in common with input and output."""
    batch, inputs, outputs = (self.sizes(group) for group in self.groups())
    shape = (math.prod(outputs), math.prod(inputs))
    return (math.prod(batch), *shape) if batch else shape

  def to_matrix(self, kernel: jax.Array) -> jax.Array:
    """A kernel (..., *kernel_shape) as matrices (..., *matrix_shape)."""
    rhs, (batch, inputs, outputs) = self.rhs, self.groups()
    lead = kernel.ndim - len(rhs)
    order = [lead + rhs.index(c) for c in batch + outputs + inputs]
    kernel = kernel.transpose(*range(lead), *order)
    return kernel.reshape(*kernel.shape[:lead], *self.matrix_shape)

  def to_kernel(self, matrix: jax.Array) -> jax.Array:
    """The inverse of `to_matrix`."""
    rhs, (batch, inputs, outputs) = self.rhs, self.groups()
    here = batch + outputs + inputs
    lead = matrix.ndim - len(self.matrix_shape)
    kernel = matrix.reshape(*matrix.shape[:lead], *self.sizes(here))
    return kernel.transpose(*range(lead), *(lead + here.index(c) for c in rhs))

  def flatten(self, x: jax.Array) -> jax.Array:
    """The input with its summed axes last and as one: (..., in), or (batch, n, in)."""
    lhs, _, _ = self.letters(x.ndim)
    batch, inputs, _ = self.groups()
    free = [c for c in lhs if c not in batch + inputs]
    x = x.transpose([lhs.index(c) for c in (*batch, *free, *inputs)])
    n = math.prod(self.sizes(inputs))
    if batch:
      return x.reshape(math.prod(self.sizes(batch)), -1, n)
    return x.reshape(*x.shape[: len(free)], n)

  def unflatten(self, y: jax.Array, like: jax.Array) -> jax.Array:
    """The product (..., out) of `flatten(like)`, with the axes of the layer's output."""
    lhs, _, out = self.letters(like.ndim)
    batch, inputs, outputs = self.groups()
    free = [c for c in lhs if c not in batch + inputs]
    sizes = [like.shape[lhs.index(c)] for c in free]
    y = y.reshape(*self.sizes(batch), *sizes, *self.sizes(outputs))
    here = (*batch, *free, *outputs)
    return y.transpose([here.index(c) for c in out])

  def spread(self, values: jax.Array, ndim: int) -> jax.Array:
    """One value an output (out,) or (batch, out), to broadcast against the layer's output."""
    _, _, out = self.letters(ndim)
    batch, _, outputs = self.groups()
    here = batch + outputs
    order = [here.index(c) for c in out if c in here]
    return self.spread_bias(jnp.reshape(values, self.sizes(here)).transpose(order), ndim)

  def spread_bias(self, bias: jax.Array, ndim: int) -> jax.Array:
    """A bias, which flax lays out as the output, to broadcast against the output."""
    _, rhs, out = self.letters(ndim)
    bias = bias.reshape(self.sizes("".join(c for c in out if c in rhs)))
    return jax.lax.expand_dims(bias, [i for i, c in enumerate(out) if c not in rhs])

  def bias_to_vector(self, bias: jax.Array, lead: int = 0) -> jax.Array:
    """A bias with `lead` axes of a stack as (..., out), in the order of the matrix's rows."""
    rows, here = self._rows()
    bias = bias.reshape(*bias.shape[:lead], *self.sizes(here))
    bias = bias.transpose(*range(lead), *(lead + here.index(c) for c in rows))
    return bias.reshape(*bias.shape[:lead], *self.matrix_shape[:-1])

  def vector_to_bias(self, values: jax.Array) -> jax.Array:
    """The inverse of `bias_to_vector`, with one axis for each of the output's."""
    rows, here = self._rows()
    lead = values.ndim - len(self.matrix_shape) + 1
    values = values.reshape(*values.shape[:lead], *self.sizes(rows))
    return values.transpose(*range(lead), *(lead + rows.index(c) for c in here))

  def _rows(self) -> tuple[str, str]:
    """The letters of a bias as the matrix orders them, and as flax does: as the output."""
    batch, _, outputs = self.groups()
    rows = batch + outputs
    if self.equation is None:
      return rows, rows
    return rows, "".join(c for c in _split(self.equation)[2] if c in rows)


def _split(equation: str) -> tuple[str, str, str]:
  inputs, out = equation.replace(" ", "").split("->")
  lhs, rhs = inputs.split(",")
  return lhs, rhs, out
