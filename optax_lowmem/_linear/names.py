"""The dotted paths of layers: how an argument names them, and what PyTorch calls them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from optax_lowmem._arguments.spelling import nearest as alike
from optax_lowmem._linear.head_names import HEAD


def patterns(argument: str, regex: str | Sequence[str]) -> list[re.Pattern[str]]:
  given = list(regex) if isinstance(regex, Iterable) and not isinstance(regex, str) else [regex]
  if not given:
    raise ValueError(f"`{argument}` is empty. Name the modules, for example 'q_proj|v_proj'.")
  compiled = []
  for pattern in given:
    try:
      compiled.append(re.compile(pattern))
    except (re.error, TypeError) as error:
      raise ValueError(
        f"`{argument}` must be a regular expression or a list of them, got {pattern!r}: {error}."
      ) from error
  return compiled


def matches(pattern: re.Pattern[str], path: str) -> bool:
  """Whether a pattern is of a whole path or of the last part of it."""
  return bool(pattern.fullmatch(path) or pattern.fullmatch(path.rpartition(".")[2]))


def matched(
  argument: str,
  regex: str | Sequence[str],
  possible: Sequence[str],
  others: Callable[[], Iterable[tuple[str, str]]],
  matches: Callable[[re.Pattern[str], str], bool] = matches,
  noun: str = "module",
) -> set[str]:
  """The possible paths that match; each pattern must match at least one.

  Args:
    argument: the name of what `regex` was given as.
    regex: the patterns.
    possible: the paths to choose from.
    others: paths that cannot be chosen, and what is there, for the error.
    matches: whether a pattern is of a path.
    noun: what the paths are of.
  """
  found: set[str] = set()
  for pattern in patterns(argument, regex):
    these = {path for path in possible if matches(pattern, path)}
    if not these:
      wrong = [f" `{path}` is {what}." for path, what in others() if matches(pattern, path)]
      raise ValueError(
        f"`{argument}` {pattern.pattern!r} matches no {noun} that can be changed."
        f"{''.join(wrong[:3])}{nearest(pattern.pattern, _ends(possible))} "
        f"Available {noun}s: {listing(possible)}."
      )
    found |= these
  return found


def excluded(
  exclude: str | Sequence[str] | None,
  paths: Sequence[str],
  heads: Callable[[], Iterable[str]],
  matches: Callable[[re.Pattern[str], str], bool] = matches,
  noun: str = "module",
) -> set[str]:
  """The paths that `exclude` names; each pattern must match one: a typo would pack the head."""
  found: set[str] = set()
  for pattern in [] if exclude is None else patterns("exclude", exclude):
    if pattern.pattern == HEAD:
      found |= set(heads())
      continue
    these = {path for path in paths if matches(pattern, path)}
    if not these:
      raise ValueError(
        f"`exclude` {pattern.pattern!r} matches no {noun}.{nearest(pattern.pattern, _ends(paths))} "
        f"Available {noun}s: {listing(paths)}."
      )
    found |= these
  return found


def _ends(paths: Sequence[str]) -> list[str]:
  """Paths, after their last parts."""
  return [*dict.fromkeys(path.rpartition(".")[2] for path in paths), *paths]


def nearest(name: str, known: Sequence[str]) -> str:
  """A sentence with the known names that look like `name`, or nothing."""
  close = alike(name, known, count=3)
  return f" Nearest: {', '.join(close)}." if close else ""


def folded(path: str) -> str:
  """A path with a star for layer numbers."""
  return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def listing(paths: Iterable[str]) -> str:
  """Paths for an error message, with layer numbers folded into a star."""
  return ", ".join(dict.fromkeys(folded(path) for path in paths)) or "none"


def summary(found: Sequence[str], others: Sequence[object]) -> str:
  """How many layers were found, and their names, numbers folded into a star."""
  short = dict.fromkeys(re.sub(r"(?<=[._])\d+(?=\.|$)", "*", name) for name in found)
  names = [*list(short)[:12], *["…"][: len(short) > 12]]
  return f"{len(found)} found: {', '.join(names)}; others: {len(others)}"


def names_in_stack(path: str, lead: tuple[int, ...], stack: str) -> list[str]:
  """`path`, with each layer's number after the part `stack` if there are leading axes.

  Nothing if it is not clear where the number belongs.
  """
  parts = path.split(".")
  if len(lead) == 0:
    return [path]
  if len(lead) > 1 or parts.count(stack) != 1:
    return []
  at = parts.index(stack) + 1
  return [".".join([*parts[:at], str(i), *parts[at:]]) for i in range(lead[0])]


def torch_names(path: str, lead: tuple[int, ...], stack: str) -> list[str]:
  """The same, and an error where it is not clear."""
  names = names_in_stack(path, lead, stack)
  if not names:
    raise ValueError(
      f"`{path}` is a stack of layers, and where its layer number belongs is not clear: the path "
      f"must have one part {stack!r} and the weight one leading axis. Name the part in `stack`."
    )
  return names
