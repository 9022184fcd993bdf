"""What is read of a module: by the inputs that a model gives it, or by inputs that are guessed."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from optax_lowmem.nn._proofs.foreign_modules import NOTHING, Parts, Reading, parts_of
from optax_lowmem.nn._proofs.product import NotAProduct

_FREE = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # lengths of axes that the weight knows nothing of


# The attribute of a module with what a call that the model made of it showed. It stays while an
# adapter is on the module.
_SHOWN = "_optax_lowmem_shown"


def remember(module: Any, shown: Reading) -> None:
  """Makes `read` give what a call of the module showed."""
  setattr(module, _SHOWN, shown)


def forget(module: Any) -> None:
  if _SHOWN in vars(module):
    delattr(module, _SHOWN)


def read(module: Any) -> Reading:
  """Whether a module is a product of its input and a weight of its own.

  That is what a call of it showed, or else is looked for with inputs that are made up.
  """
  if isinstance(module, nnx.Module) and _SHOWN in vars(module):
    return vars(module)[_SHOWN]
  parts = parts_of(module)
  if isinstance(parts, Reading):
    return parts
  try:
    return _search(parts)
  except TypeError as error:
    return _not_hashed(error)


def read_called(module: Any, lead: int, inputs: Sequence[tuple[tuple[int, ...], Any]]) -> Reading:
  """The same for inputs of these shapes and dtypes, and a stack with `lead` leading axes."""
  parts = parts_of(module)
  if isinstance(parts, Reading):
    return parts
  foreign, contraction = parts.layer(lead), None
  if foreign is None:
    return Reading(reason="its arrays are not stacked alike")
  try:
    for shape, dtype in inputs:
      product = foreign.at(shape, dtype)
      contraction = foreign.contraction(product)
      plain = foreign.plain and product.plain
      foreign = dataclasses.replace(foreign, plain=plain, sides=contraction.sides)
  except NotAProduct as error:
    return Reading(reason=str(error))
  except TypeError as error:
    return _not_hashed(error)
  return Reading(foreign, contraction)


def may_be_product(module: Any) -> bool:
  """Whether a module has a matrix and a call."""
  return parts_of(module) is not NOTHING


def _not_hashed(error: TypeError) -> Reading:
  if "unhashable" not in str(error):
    raise error
  return Reading(reason="its settings cannot be hashed")


@functools.lru_cache(maxsize=4096)
def _search(parts: Parts) -> Reading:
  """Looks for the input that a module takes, and for the axes of its weight that stack layers."""
  reason = ""
  for free in (2, 1, 3):
    found: list[Reading] = []
    for lead in range(parts.rank - 1):
      foreign = parts.layer(lead)
      if foreign is None:
        continue
      for shape in _inputs(foreign.kernel_shape, free):
        try:
          product = foreign.at(shape, jnp.float32)
        except NotAProduct as error:
          reason = reason or str(error)
        except Exception:  # whatever a module raises when it is given what it does not take
          continue
        else:
          contraction = foreign.contraction(product)
          foreign = dataclasses.replace(foreign, plain=product.plain, sides=contraction.sides)
          found.append(Reading(foreign, contraction))
          break
    if len(found) > 1:
      return Reading(reason="what it computes with a stack of weights is not clear")
    if found:
      return found[0]
  return Reading(reason=reason or "it takes no input that could be guessed from its weight")


def _inputs(kernel: tuple[int, ...], free: int) -> Iterator[tuple[int, ...]]:
  """Shapes of inputs: `free` axes of their own, then some of the weight's."""
  own = [n for n in _FREE if n not in kernel][:free]
  for count in range(1, len(kernel) + 1):
    for axes in itertools.combinations(kernel, count):
      yield (*own, *axes)
