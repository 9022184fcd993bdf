"""The names under which pickles hold public classes: of the package, not of a file within it."""

from __future__ import annotations

import inspect
import typing


def name_after(package: str, *public: typing.Any) -> None:
  """Lets classes and functions say that they are of `package`, from which they are imported.

  A pickle names what it holds by module and name, so one that names a private file cannot be read
  once that has moved.

  Args:
    package: the module's name.
    *public: classes and functions that are its attributes.
  """
  for one in public:
    if inspect.isclass(one):
      # Written as text, they are looked up in the module that a class says it is of.
      hints = typing.get_type_hints(one, include_extras=True)
      one.__annotations__ = {k: hints[k] for k in inspect.get_annotations(one)}
    one.__module__ = package
