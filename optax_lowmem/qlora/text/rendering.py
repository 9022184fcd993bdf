"""The program that runs other people's chat templates and patterns, in a process of its own.

It reads requests from its standard input and writes the replies, each a line of JSON. It imports
nothing that is large, and ends when its input does. Whoever starts it stops it when it takes too
long; how much memory it may have it tells the system itself, where that can be told so (Linux).
"""

import datetime
import functools
import json
import re
import sys
import traceback
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(jinja2.ext.Extension):
  """``{% generation %}``, by which some templates mark the answers; what is in it is kept."""

  tags = {"generation"}  # noqa: RUF012

  def parse(self, parser: Any) -> Any:
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
  x: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """As transformers' templates are given it: Jinja's own escapes what HTML must not hold."""
  return json.dumps(
    x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _raise(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
  """A template, as transformers compiles it."""
  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
  )
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = _raise
  return environment.from_string(source)


def render(source: str, values: dict[str, Any], today: str, most: int = sys.maxsize) -> str:
  """The text that a template makes of `values`.

  Args:
    source: the template.
    values: its variables.
    today: what ``strftime_now`` speaks of, in ISO's format.
    most: the characters it may write.

  Raises:
    Exception: whatever a program can raise.
  """
  now = datetime.datetime.fromisoformat(today)
  parts, length = [], 0
  for part in compiled(source).generate(**values, strftime_now=now.strftime):
    length += len(part)
    if length > most:
      raise jinja2.TemplateError(f"it writes more than {most:,} characters")
    parts.append(part)
  return "".join(parts)


def complaint(error: BaseException) -> str:
  """What went wrong, and in which line of the template."""
  if isinstance(error, jinja2.TemplateSyntaxError):
    return f"line {error.lineno} cannot be read: {error.message}"
  lines = [
    f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<template>"
  ]
  place = f"line {lines[-1]}: " if lines else ""
  if isinstance(error, jinja2.TemplateError):
    return f"{place}{error}"
  said = str(error)
  return f"{place}{type(error).__name__}{': ' + said[:200] if said else ''}"


def match(pattern: str, names: list[str]) -> int:
  """How many of the names a regular expression matches."""
  compiled = re.compile(pattern)
  return sum(compiled.fullmatch(name) is not None for name in names)


def answer(request: dict[str, Any]) -> dict[str, Any]:
  """``{"text": …}`` of a template, ``{"matched": …}`` of a pattern, or ``{"error": …}``."""
  try:
    if "pattern" in request:
      return {"matched": match(**request)}
    return {"text": render(**request)}
  except MemoryError:
    return {"error": "memory"}
  except Exception as error:
    return {"error": complaint(error)}


def _limit(memory: int, seconds: float) -> None:
  """Sets what this process may have, as far as the system can be told so.

  The limit of time is for when whoever started this is killed, and stops it no more.
  """
  try:
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime + seconds)
    for what, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, until)):
      resource.setrlimit(what, (most, resource.getrlimit(what)[1]))
  except (ImportError, OSError, ValueError):
    pass


def main() -> None:
  for line in sys.stdin.buffer:
    asked = json.loads(line)
    _limit(asked["memory"], asked["seconds"])
    reply = json.dumps(answer(asked["request"]))
    sys.stdout.write(reply + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
  sys.setrecursionlimit(2000)
  main()
