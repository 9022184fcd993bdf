"""Arguments that a function does not have, refused with what to say instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import ParamSpec, TypeVar

from optax_lowmem._arguments.spelling import did_you_mean

P = ParamSpec("P")
T = TypeVar("T")


def check_names(
  function: str, given: Iterable[str], known: Iterable[str], elsewhere: Mapping[str, str]
) -> None:
  """Refuses names that are not known.

  Args:
    function: its name.
    given: the names of arguments.
    known: those that it has.
    elsewhere: of names that other libraries have for what this one says otherwise: the sentence
      that says how, or names that are known, with commas between them.

  Raises:
    TypeError: if there is one.
  """
  known = list(known)
  for name in given:
    if name not in known:
      raise TypeError(
        f"{function}() takes no argument {name!r}. {_instead(name, known, elsewhere)}"
      )


def knowing(elsewhere: Mapping[str, str]) -> Callable[[Callable[P, T]], Callable[P, T]]:
  """A decorator: `check_names` of the function's arguments before it is called."""

  def decorate(function: Callable[P, T]) -> Callable[P, T]:
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def checking(*args: P.args, **kwargs: P.kwargs) -> T:
      check_names(function.__name__, kwargs, known, elsewhere)
      return function(*args, **kwargs)

    return checking

  return decorate


def _instead(name: str, known: list[str], elsewhere: Mapping[str, str]) -> str:
  other = elsewhere.get(name, "")
  if other.endswith("."):
    return other
  if names := [f"{n}=" for n in other.split(", ") if n in known]:
    return f"Say {', '.join(names)}."
  return did_you_mean(name, known).strip() or f"It takes: {', '.join(known)}."
