"""The files of PEFT, without a model."""
