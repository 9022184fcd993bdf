"""Names that people know from other trainers, and what they are called here."""

from collections.abc import Sequence

# Of transformers, PEFT, TRL, axolotl, LLaMA-Factory and unsloth.
SPELLINGS = {
  "model_name_or_path": "model",
  "model_name": "model",
  "base_model": "model",
  "data_path": "data",
  "dataset": "data",
  "dataset_name": "data",
  "train_file": "data",
  "max_seq_length": "seq_len",
  "max_length": "seq_len",
  "cutoff_len": "seq_len",
  "sequence_len": "seq_len",
  "sample_packing": "packing",
  "train_on_inputs": "train_on_prompt",
  "template": "chat_template",
  "num_train_epochs": "epochs",
  "num_epochs": "epochs",
  "max_steps": "steps",
  "per_device_train_batch_size": "batch_size",
  "micro_batch_size": "batch_size",
  "gradient_accumulation_steps": "grad_accum",
  "r": "rank",
  "lora_r": "rank",
  "lora_rank": "rank",
  "lora_alpha": "alpha",
  "lora_dropout": "dropout",
  "lora_target": "targets",
  "target_modules": "targets",
  "lora_target_modules": "targets",
  "init_lora_weights": "init",
  "use_rslora": "rslora",
  "use_dora": "dora",
  "neftune_noise_alpha": "neftune_alpha",
  "optimizer": "optim",
  "learning_rate": "lr",
  "loraplus_lr_ratio": "lora_plus_ratio",
  "lr_scheduler_type": "schedule",
  "lr_scheduler": "schedule",
  "warmup_steps": "warmup",
  "output_dir": "out",
  "resume_from_checkpoint": "resume",
  "eval_steps": "eval_every",
  "save_steps": "save_every",
  "early_stopping_patience": "patience",
  "attn_implementation": "attention",
}
# What has no counterpart, and what to do instead.
ELSEWHERE = {
  "load_in_4bit": "the base is held in 4 bits anyway; --quantize says how",
  "load_in_8bit": "use --quantize int8",
  "bf16": "use --dtype bfloat16",
  "fp16": "use --dtype bfloat16: float16 overflows in these models",
  "torch_dtype": "use --dtype",
  "warmup_ratio": "use --warmup, in steps",
  "logging_steps": "every step is logged, in metrics.jsonl",
  "report_to": "use --tensorboard",
  "gradient_checkpointing": "activations are always recomputed, layer by layer",
  "group_by_length": "use --buckets",
  "val_set_size": "a twentieth of the rows is held out; --eval-batches says how much is measured",
  "per_device_eval_batch_size": "batches to measure are as large as --batch-size",
  "lora_bias": "biases are not trained by this script; optax_lowmem.nn.add_lora does, with `bias`",
}


def known_as(name: str) -> str:
  """What a setting of that name is called here; other names stay what they are."""
  plain = name.replace("-", "_")
  return SPELLINGS.get(plain, plain)


def instead(name: str) -> str | None:
  """What to do where there is no setting of that name but others have one."""
  return ELSEWHERE.get(name.replace("-", "_"))


def translated(argv: Sequence[str], known: Sequence[str]) -> list[str]:
  """The arguments, those with another trainer's names under the names that they have here.

  Args:
    argv: the arguments.
    known: the names of all settings.

  Raises:
    ValueError: for a name that others have and that has no counterpart.

  >>> translated(["--learning_rate=1e-4", "--no-use-dora", "--r", "8"], ["lr", "dora", "rank"])
  ['--lr=1e-4', '--no-dora', '--rank', '8']
  """
  found = []
  for text in argv:
    flag, equals, value = text.partition("=")
    no = "no-" if flag.startswith("--no-") else ""
    name = flag.removeprefix("--").removeprefix(no).replace("-", "_")
    if flag.startswith("--") and name and name not in known:
      if why := instead(name):
        raise ValueError(f"{flag}: {why}.")
      if known_as(name) in known:
        name = known_as(name)
    ours = f"--{no}{name.replace('_', '-')}" if name in known and flag.startswith("--") else flag
    found.append(ours + equals + value)
  return found
