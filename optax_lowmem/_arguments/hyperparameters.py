"""Arguments of the optimizers, refused with a remedy where they would mean something else.

Most of them come through `optax.inject_hyperparams`, which makes numbers arrays of the parameters'
dtype, and calls functions as schedules, with the number of the step.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_lowmem._arguments.argument_names import check_names

P = ParamSpec("P")
T = TypeVar("T")

# What no array can stand for, besides masks and dtypes: the program depends on it.
_NUMBERS = ("bits", "block_size", "min_size", "min_dim_size_to_factor")
_DECAYS = ("b1", "b2", "b3", "decay", "momentum")
# What PyTorch and bitsandbytes call what optax calls otherwise, or does otherwise.
_ELSEWHERE = {
  "betas": "b1, b2, b3",
  "lr": "learning_rate",
  "optim_bits": "bits",
  "min_8bit_size": "min_size",
  "is_paged": "Wrap it: `offloaded(…)` keeps its state in host memory.",
  "block_wise": "It is by blocks always; `block_size` says of how many elements.",
  "percentile_clipping": "Clip before it: `optax.chain(optax.clip_by_global_norm(1.0), …)`.",
  "amsgrad": "Wrap optax's: `quantized(optax.amsgrad(…))`.",
}
_INJECTING = {getattr(f, "__code__", None) for f in optax.inject_hyperparams(optax.scale)(1.0)}


def checked(rule: Callable[P, T]) -> Callable[P, T]:
  """`rule`, with its arguments checked by their names before it is called.

  Refused are: arguments that it does not have; text; a mask, a dtype or a size that
  `optax.inject_hyperparams` has made an array or called as a schedule; a decay in 16 bits, where
  0.999 is 1; and a dtype for quantized moments, which have none.
  """
  signature = inspect.signature(rule)
  known = signature.parameters

  @functools.wraps(rule)
  def checking(*args: P.args, **kwargs: P.kwargs) -> T:
    check_names(rule.__name__, kwargs, known, _ELSEWHERE)
    try:
      given = signature.bind(*args, **kwargs).arguments
    except TypeError:
      return rule(*args, **kwargs)  # raises, and says what is missing
    groups = _groups_of_inject()
    for name, value in given.items():
      _check(name, value, known, given, _is_scheduled(name, value, groups))
    return rule(*args, **kwargs)

  return checking


def is_array(x: Any) -> bool:
  """Whether `x` is an array, traced or not."""
  return isinstance(x, jax.Array | np.ndarray)


def check_static(name: str, value: Any, names: Sequence[str], scheduled: bool = False) -> None:
  """Refuses an array, traced or not, for an argument on which the program depends.

  Args:
    name: the argument's name.
    value: the argument.
    names: of all arguments of its function.
    scheduled: whether the value is what `optax.inject_hyperparams` got when it called it.

  Raises:
    TypeError: if it is, or holds, an array, or is scheduled.
  """
  if not scheduled and not any(map(is_array, jax.tree.leaves(value))):
    return
  kind = "made of Python bools" if _is_mask(name) else "a Python number"
  kind = "a dtype" if _is_dtype(name) else kind
  got = "an array"
  if scheduled:
    got = "what it returned for the number of a step, as if it were a schedule"
  static = tuple(name for name in names if _is_static(name))
  raise TypeError(
    f"`{name}` must be {kind}, got {got}. Under `optax.inject_hyperparams`, pass "
    f"`static_args={static}`."
  )


def _is_static(name: str) -> bool:
  return name in _NUMBERS or _is_mask(name) or _is_dtype(name)


def _is_mask(name: str) -> bool:
  return name.endswith("mask")


def _is_dtype(name: str) -> bool:
  return "dtype" in name


def _check(
  name: str, value: Any, known: Mapping[str, Any], given: Mapping[str, Any], scheduled: bool
) -> None:
  if isinstance(value, str) and name not in _NUMBERS and not _is_dtype(name):
    raise TypeError(
      f"`{name}` takes no text, got {value!r}. Pass the value itself: YAML reads 1e-3 as text, and "
      "1.0e-3 as a number."
    )
  if name == "dtype_momentum" and given.get("momentum") is None:
    return  # it is heeded nowhere
  if _is_static(name):
    check_static(name, value, list(known), scheduled)
    if _is_dtype(name) and value is not None:
      _check_dtype(name, value, given.get("bits", known["bits"].default))
  elif name == "learning_rate":
    _check_rate(value, known[name].default)
  elif name in _DECAYS and is_array(value):
    _check_decay(name, value)


def _check_rate(rate: Any, default: Any) -> None:
  number = isinstance(rate, int | float | np.number) or is_array(rate)
  if not number and not callable(rate) and rate is not default:
    raise TypeError(f"`learning_rate` must be a number or a schedule, got {rate!r}.")


def _check_decay(name: str, decay: Any) -> None:
  dtype = decay.dtype
  if dtype.itemsize < 4:
    raise ValueError(
      f"`{name}` must not be {dtype.name}, too coarse for a decay: in bfloat16, 0.999 is 1. Unless "
      "told, `optax.inject_hyperparams` casts hyperparameters to the dtype of the parameters: pass "
      "it `hyperparam_dtype=jnp.float32`."
    )


def _check_dtype(name: str, value: Any, bits: int) -> None:
  """Refuses a dtype for what is quantized."""
  try:
    dtype = jnp.dtype(value)
  except TypeError as error:
    raise TypeError(f"`{name}` must be a dtype such as jnp.bfloat16, got {value!r}.") from error
  if bits != 32 and dtype != jnp.float32:
    raise ValueError(
      f"`{name}` {dtype.name} needs `bits=32`, got {bits}: a quantized moment has no dtype. "
      "Leave it out, or hold that moment in its own way: `quantized(optax.adamw(…), storage={"
      f'"mu": Dense(jnp.{dtype.name})}})`.'
    )


def is_injected() -> bool:
  """Whether `optax.inject_hyperparams` is calling, which makes an optimizer anew in each update."""
  return _frame_of_inject() is not None


def _groups_of_inject() -> list[dict[str, Any]]:
  """What `optax.inject_hyperparams`, if it is calling, holds by the names of arguments."""
  frame = _frame_of_inject()
  return [] if frame is None else [d for d in frame.f_locals.values() if isinstance(d, dict)]


def _frame_of_inject() -> Any:
  frame: Any = sys._getframe(1)
  while frame is not None and frame.f_code not in _INJECTING:
    frame = frame.f_back
  return frame


def _is_scheduled(name: str, value: Any, groups: Sequence[dict[str, Any]]) -> bool:
  """Whether it holds a function by that name, and beside it the value, which that returned."""
  held = [group[name] for group in groups if name in group]
  return any(map(callable, held)) and any(x is value for x in held if not callable(x))
