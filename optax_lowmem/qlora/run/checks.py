"""What no run can have is refused before anything slow begins."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowmem.qlora.files.hub import check_model
from optax_lowmem.qlora.loading.weights import expected_shapes
from optax_lowmem.qlora.models.attention import attend_within, windows_of_layers
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.models.scores import Scoring
from optax_lowmem.qlora.run.settings import LEAST, MOST, ONLY, Settings, flag_of, trained_by
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer
from optax_lowmem.qlora.text.confined import TooMuchError, elsewhere
from optax_lowmem.qlora.training.evaluation import since_best


def check(s: Settings) -> None:
  """Raises ValueError for a setting no run can have."""
  for name, low in LEAST.items():
    if (value := getattr(s, name)) < low:
      raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, got {value}.")
  for name, most in MOST.items():
    if (value := getattr(s, name)) > most:
      raise ValueError(f"--{name.replace('_', '-')} must be at most {most:,}, got {value!r:.50}.")
  for name, value in s.rank_pattern.items():
    if not 1 <= value <= MOST["rank"]:
      raise ValueError(
        f"--rank-pattern {name!r:.100} must be from 1 to {MOST['rank']:,}, got {value!r:.50}."
      )
  for name in ("alpha", "lr"):
    if not (math.isfinite(value := getattr(s, name)) and value > 0):
      raise ValueError(f"--{name} must be a positive number, got {value}.")
  if not 0 <= s.dropout < 1:
    raise ValueError(f"--dropout must be at least 0 and less than 1, got {s.dropout}.")
  for name in ("max_grad_norm", "neftune_alpha", "weight_decay", "lora_plus_ratio", "epochs"):
    value = getattr(s, name)
    if value is not None and not (math.isfinite(value) and value >= 0):
      flag = name.replace("_", "-")
      raise ValueError(f"--{flag} must be 0 or a positive number, got {value}.")
  if s.warmup is not None and not (0 <= s.warmup and (s.epochs or s.warmup < s.steps)):
    raise ValueError(
      f"--warmup must be at least 0 and less than --steps {s.steps}, got {s.warmup}."
    )
  if s.full and s.update_in_backward and s.grad_accum > 1:
    raise ValueError(
      f"--grad-accum {s.grad_accum}: with --full each layer is updated as soon as its gradients "
      "are there, so that there are none to add others to. Choose a larger --batch-size, or "
      "--no-update-in-backward, which holds the gradients of all layers."
    )
  if s.init == "loftq" and s.quantize == "none":
    raise ValueError("--init loftq makes up for quantization; --quantize none leaves nothing to.")
  if s.packing and s.buckets:
    raise ValueError(
      f"--packing fills every row, so there is nothing left for --buckets {s.buckets} to save. "
      "Choose one of the two."
    )
  if s.packing and s.attention == "cudnn":
    raise ValueError(
      "--attention cudnn cannot keep the rows apart that --packing puts into one. "
      "Choose --attention chunked."
    )
  if s.patience and not s.eval_every:
    raise ValueError(f"--patience {s.patience} needs --eval-every, which says when to measure.")
  if s.model is not None:
    check_model(s.model)
  if s.data is not None and not Path(s.data).is_file():
    raise FileNotFoundError(f"--data {s.data}: there is no such file.")


def check_sort(s: Settings, given: Sequence[str]) -> None:
  """Raises ValueError for a setting that was given, and is of another kind of training."""
  for name in given:
    if ONLY.get(name, trained_by(s)) == trained_by(s):
      continue
    if s.full:
      raise ValueError(
        f"{flag_of(name)} is for adapters, and --full trains all parameters. Leave out one of the "
        "two."
      )
    raise ValueError(f"{flag_of(name)} is for --full, which trains all parameters. Add that.")


def check_masters(s: Settings) -> None:
  """Raises ValueError where masters are asked for of weights that are masters themselves."""
  if s.full and s.dtype == "float32":
    raise ValueError(
      f"--masters {s.masters} is for bfloat16 weights: of float32 ones nothing is lost. Add "
      "--dtype bfloat16, or leave it out."
    )


def only_results_left(
  s: Settings, start: int, folder: Path, records: Sequence[dict[str, Any]]
) -> bool:
  """Whether the run that is resumed was killed after its last step, before its results.

  Raises:
    ValueError: where there is nothing left to do.
  """
  patient = bool(s.patience) and since_best(records)[1] >= s.patience
  whole = (folder / "summary.json").exists()
  measured = any(r["step"] == start and "samples" in r for r in records)  # as at the end of a run
  if start > s.steps or (start == s.steps and (whole or not measured)):
    raise ValueError(
      f"--resume {folder}: all {start} steps are done already. `--steps {2 * start}` or "
      "`--epochs N` trains longer."
    )
  if patient and whole:
    raise ValueError(f"--resume {folder}: --patience {s.patience} ended it at step {start}.")
  if s.stop_after and start >= s.stop_after:
    raise ValueError(f"--stop-after {s.stop_after}: the run in {folder} is at step {start}.")
  return patient or start == s.steps


def check_vocabulary(tokenizer: ChatTokenizer, config: LlamaConfig) -> None:
  """Raises ValueError where the tokenizer does not suit the model."""
  if tokenizer.vocab_size > config.vocab_size:
    raise ValueError(
      f"The tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}: "
      "they do not belong together."
    )


def check_length(s: Settings, config: LlamaConfig) -> None:
  """Raises ValueError where rows are longer than the model's positions."""
  if s.seq_len > config.max_position_embeddings:
    raise ValueError(
      f"--seq-len {s.seq_len} is more than the {config.max_position_embeddings} positions "
      "this model was made for."
    )


def check_rank(s: Settings, config: LlamaConfig) -> None:
  """Raises ValueError where adapters would be larger than the layers that they adapt."""
  most = max(config.hidden_size, config.intermediate_size)
  for name, rank in (("--rank", s.rank), *(("--rank-pattern", r) for r in s.rank_pattern.values())):
    if rank > most:
      raise ValueError(f"{name} must be at most {most:,} for this model, got {rank:,}.")


def check_patterns(s: Settings, config: LlamaConfig) -> None:
  """Raises ValueError where a setting's regular expression takes too long for the layers' names."""
  names = [name.rpartition(".")[0] for name in expected_shapes(config)]
  names += [re.sub(r"\.\d+\.", ".", name) for name in names]  # the layers as one stack
  names = list(dict.fromkeys([*names, *(name.rpartition(".")[2] for name in names)]))
  targets = [s.targets] if isinstance(s.targets, str) else s.targets
  patterns = {"--targets": targets, "--modules-to-save": s.modules_to_save}
  patterns |= {"--rank-pattern": s.rank_pattern, "--alpha-pattern": s.alpha_pattern}
  for flag, each in patterns.items():
    for pattern in each:
      form = f"(.*\\.)?({pattern})$" if flag.endswith("-pattern") else pattern
      try:
        elsewhere(json.dumps({"pattern": form, "names": names}), pattern)
      except TooMuchError as error:
        raise ValueError(f"{flag} {pattern!r:.200} cannot be matched: {error}.") from error


def check_attention(s: Settings, config: LlamaConfig) -> None:
  """Raises ValueError where --attention cudnn cannot be had for this model, or on this machine."""
  if s.attention != "cudnn":
    return
  heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
  shapes = [
    jax.ShapeDtypeStruct((s.batch_size, s.seq_len, n, config.head_dim), jnp.dtype(s.dtype))
    for n in heads
  ]
  scoring = Scoring(config.attention_scale, config.attn_logit_softcapping)
  jax.eval_shape(attend_within(None, windows_of_layers(config), "cudnn", scoring), *shapes)
