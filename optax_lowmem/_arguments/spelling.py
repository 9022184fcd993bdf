"""Known names that look like one that is not known."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, count: int = 1, cutoff: float = 0.6) -> list[str]:
  """At most `count` of the known names, the most alike first; of `cutoff` likeness at least.

  Letters are compared one by one, so no more than 2,000 names are looked at.
  """
  first = dict.fromkeys(itertools.islice(known, 2000))
  return difflib.get_close_matches(name, first, n=count, cutoff=cutoff)


def did_you_mean(name: str, known: Iterable[str], *, count: int = 1, cutoff: float = 0.6) -> str:
  """``" Did you mean 'this'?"``, to follow a sentence; nothing where no name is alike."""
  near = nearest(name, known, count=count, cutoff=cutoff)
  return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
