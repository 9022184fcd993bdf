"""QLoRA fine-tuning from the command line: `lowmem finetune`, `chat`, `merge`, `export`, `plan`."""
