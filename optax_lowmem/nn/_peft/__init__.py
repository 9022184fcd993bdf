"""Models, and the files of PEFT."""
