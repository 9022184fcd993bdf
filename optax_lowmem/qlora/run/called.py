"""How this process was called, for the commands that it tells a user to type."""

import sys
from pathlib import Path


def called(command: str = "finetune") -> str:
  """The words that call a command: ``lowmem chat``, or those of the script in a clone."""
  if Path(sys.argv[0]).name != "finetune.py":
    return f"lowmem {command}"
  return f"python {sys.argv[0]}" + ("" if command == "finetune" else f" {command}")
