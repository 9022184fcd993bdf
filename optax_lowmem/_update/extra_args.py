"""What else an update is given, beside gradients, state and parameters, and which of it is traced.

optax's rules may branch upon a flag, count to an integer or look up a name: outside `jit`, and in a
step that closes over them, these are Python values, and stay so here.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from optax_lowmem._arguments.hyperparameters import is_injected
from optax_lowmem.kernels import _choice

_INJECTED = (
  "`optax.inject_hyperparams` makes the optimizer anew in each update, which outside of `jax.jit` "
  "is compiled each time. Put the step into `jax.jit`, or inject within: "
  "`quantized(optax.inject_hyperparams(optax.adamw)(…))`."
)
_PLAIN = bool | int | str | np.bool_ | np.integer


@dataclasses.dataclass(frozen=True)
class Fixed:
  """Extra arguments without the arrays among them.

  Attributes:
    values: of each leaf the type and the value, for True is equal to 1; None in an array's place.
    tree: how the leaves stand.
  """

  values: tuple[tuple[type, Any] | None, ...]
  tree: Any

  @property
  def is_plain(self) -> bool:
    """Whether nothing but flags, integers and strings is among them, which can be compared."""
    return all(v is None or isinstance(v[1], _PLAIN) for v in self.values)

  def joined(self, arrays: Sequence[Any]) -> dict[str, Any]:
    """The extra arguments, with these arrays."""
    left = iter(arrays)
    return self.tree.unflatten([next(left) if v is None else v[1] for v in self.values])


def split(extra_args: dict[str, Any]) -> tuple[list[Any], Fixed]:
  """The arrays among extra arguments, which may be traced, and the rest, which may not.

  >>> arrays, fixed = split({"value": np.ones(2), "reset": True})
  >>> fixed.joined(arrays)
  {'reset': True, 'value': array([1., 1.])}
  """
  return _split(extra_args, lambda x: hasattr(x, "dtype") and not isinstance(x, _PLAIN))


def compiled_outside_jit(update: Callable[..., Any]) -> Callable[..., Any]:
  """`update(updates, state, params, extra_args)`, which is compiled if it is called outside `jit`.

  Retracing the rule and recompiling its loops each step would take seconds. Arrays and floats, as a
  loss is, are traced then; it is compiled anew for every other value of a flag, an integer or a
  string. Where there is something else, a function say, each call is traced.
  """
  injected = is_injected()

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def compiled(mode, fixed, trees, numbers):
    with _choice.using(mode):
      return update(*trees, fixed.joined(numbers))

  def call(updates, state, params, extra_args):
    trees = updates, state, params
    numbers, fixed = _split(extra_args, _is_number)
    if all(map(_is_concrete, jax.tree.leaves((trees, numbers)))) and fixed.is_plain:
      if injected:
        warnings.warn(_INJECTED, UserWarning, stacklevel=2)
      return compiled(_choice.setting(), fixed, trees, numbers)
    return update(*trees, extra_args)

  return call


def _split(extra_args: dict[str, Any], is_traced: Callable[[Any], bool]) -> tuple[list[Any], Fixed]:
  leaves, tree = jax.tree.flatten(extra_args)
  arrays = [x for x in leaves if is_traced(x)]
  return arrays, Fixed(tuple(None if is_traced(x) else (type(x), x) for x in leaves), tree)


def _is_number(x: Any) -> bool:
  return isinstance(x, jax.Array | np.ndarray | np.floating | float)


def _is_concrete(x: Any) -> bool:
  known = jax.Array | np.ndarray | np.generic | float | int
  return isinstance(x, known) and not isinstance(x, Tracer)
