"""The files of PEFT, written and read."""
