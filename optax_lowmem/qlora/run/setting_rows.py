"""A row of the table of settings."""

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, Literal

Trained = Literal["adapters", "all parameters"]


def setting(
  default: Any,
  help: str,
  *,
  choices: Sequence[str] | None = None,
  least: int | None = None,
  most: int | None = None,
  changeable: bool = False,
  only: Trained | None = None,
  read: Callable[[Any], Any] | None = None,
) -> Any:
  """A row of the table.

  Args:
    default: the value where none is given.
    help: what `--help` says.
    choices: the only values there are.
    least: the smallest value.
    most: the largest: more than any machine holds, or than the system counts, for files that
      somebody else wrote.
    changeable: whether a resumed run may have another one; any else would make it another run.
    only: what is trained, where it says nothing of the other.
    read: makes a flag's text, or a value of YAML, the setting's value; by default its type does.
  """
  metadata = {"help": help, "choices": choices, "least": least, "most": most, "only": only}
  metadata |= {"changeable": changeable, "read": read}
  if isinstance(default, (dict, list)):
    return field(default_factory=type(default), metadata=metadata)
  return field(default=default, metadata=metadata)
