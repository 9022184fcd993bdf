"""Regular expressions that come from a file, and so from somebody else: they are tried out first.

A pattern such as ``(a+)+$`` takes twice the time for each letter more. No library of Python's can
stop a match, a thread cannot be stopped, and signals reach the main thread only: what is not
plainly quick is matched in another process once, with a limit, before it is matched here.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable

SECONDS = 5.0
LONGEST = 10_000  # characters of a pattern
MEMORY = 160 << 20

_PROGRAM = """
import json, re, sys
given = json.load(sys.stdin)
try:
  import resource
  resource.setrlimit(resource.RLIMIT_AS, (given["memory"],) * 2)
  resource.setrlimit(resource.RLIMIT_CPU, (given["seconds"],) * 2)
except (ImportError, ValueError, OSError):
  pass
compiled = re.compile(given["pattern"])
for name in given["names"]:
  compiled.fullmatch(name)
  compiled.match(name)
"""


def check_pattern(what: str, pattern: object, names: Iterable[str], form: str = "{}") -> None:
  """Refuses a pattern that is none, or takes too long for these names.

  Args:
    what: the file and its key, for the message.
    pattern: the regular expression.
    names: what it will be matched with, from the start or whole.
    form: a regular expression with ``{}`` where the pattern will stand in it.

  Raises:
    ValueError: for what is no regular expression, or takes more time or memory than the limit.
  """
  if not isinstance(pattern, str):
    raise ValueError(f"{what} must hold texts, got {pattern!r:.100}.")
  if len(pattern) > LONGEST:
    raise ValueError(
      f"{what} has a pattern of {len(pattern):,} characters; at most {LONGEST:,} are read."
    )
  every, whole = tuple(dict.fromkeys(names)), form.replace("{}", pattern)
  if _is_quick(pattern, every):
    _compiled(what, whole)
  else:
    _try(what, whole, every)


def _compiled(what: str, pattern: str) -> None:
  try:
    re.compile(pattern)
  except (re.error, OverflowError, RecursionError) as error:
    raise ValueError(
      f"{what}: {pattern!r:.200} is no regular expression ({error}). Mend it, or list the names."
    ) from error


def _is_quick(pattern: str, names: tuple[str, ...]) -> bool:
  """Whether a match takes no more than the cube of a name's length: few repeats, in no group."""
  repeats = pattern.count("*") + pattern.count("+")
  short = max(map(len, names), default=0) <= 300
  return repeats <= 2 and short and not set(pattern) & set("()?{")


@functools.lru_cache(maxsize=256)
def _try(what: str, pattern: str, names: tuple[str, ...]) -> None:
  given = {"pattern": pattern, "names": names, "memory": MEMORY, "seconds": int(SECONDS) + 1}
  shown = f"{what}: the regular expression {pattern!r:.200}"
  try:
    done = subprocess.run(
      [sys.executable, "-I", "-S", "-c", _PROGRAM],
      input=json.dumps(given).encode(),
      capture_output=True,
      timeout=SECONDS,
    )
  except subprocess.TimeoutExpired as error:
    raise ValueError(
      f"{shown} takes more than {SECONDS:g} seconds for this model's names. List the names instead."
    ) from error
  if done.returncode:
    if b"MemoryError" in done.stderr or not done.stderr:
      raise ValueError(f"{shown} takes more than {MEMORY >> 20} MiB. List the names instead.")
    _compiled(what, pattern)  # says what is wrong with it
    raise ValueError(f"{shown} cannot be matched ({done.stderr.decode(errors='replace')[-200:]}).")
