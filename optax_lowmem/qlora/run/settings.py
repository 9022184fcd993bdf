"""The settings of a run: a table of defaults, help, bounds, and what may change on resume."""

import types
import typing
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from optax_lowmem._arguments.name_lists import names_of
from optax_lowmem.qlora.models.attention import KINDS
from optax_lowmem.qlora.run.setting_rows import Trained as Trained
from optax_lowmem.qlora.run.setting_rows import setting


@dataclass
class Settings:
  """All of a run's settings. The defaults are those of the run without arguments."""

  model: str | None = setting(
    None,
    "Hugging Face directory or GGUF file (default: SmolLM2-135M-Instruct, by pip)",
    changeable=True,
  )
  data: str | None = setting(
    None,
    "JSON or JSONL of Alpaca, chat, ShareGPT or completion rows, or plain text (default: "
    "Chit-Chat, by pip)",
    changeable=True,
  )
  config: str | None = setting(
    None,
    "a YAML file of these settings, named as the flags are; flags go before it",
    changeable=True,
  )
  # data
  seq_len: int = setting(128, "tokens a row; longer rows are cut", least=2, most=1 << 24)
  packing: bool = setting(False, "put several short rows into one sequence")
  buckets: int = setting(
    0,
    "pad rows to one of so many lengths, not all to --seq-len; 0: do not",
    least=0,
    most=1 << 16,
  )
  train_on_prompt: bool = setting(False, "learn the questions too, not only the answers")
  chat_template: str = setting(
    "auto",
    "how conversations are written; auto: as the model's own template says",
    choices=("auto", "chatml", "llama-2", "llama-3", "mistral", "plain"),
  )
  # steps
  steps: int = setting(80, "training steps", least=1, most=10**9, changeable=True)
  epochs: float = setting(
    0.0,
    "passes over the rows, in the place of --steps; 0: as many as --steps says",
    changeable=True,
  )
  batch_size: int = setting(4, "rows a forward pass", least=1, most=1 << 16)
  grad_accum: int = setting(
    1,
    "forward passes a step; with several, all gradients are held twice, those of a pass and their "
    "sums, in the same dtype: in bfloat16 sums are rounded at random",
    least=1,
    most=1 << 16,
  )
  seed: int = setting(
    0,
    "of the adapters, the order of the rows, dropout, and what is rounded at random",
    least=0,
    most=2**32 - 2,
  )
  devices: int = setting(
    0,
    "local devices to spread a batch's rows over; 0: all",
    least=0,
    most=1 << 16,
  )
  fsdp: bool = setting(
    False, "hold a part of the base model, or of all with --full, on each device, not a copy"
  )
  # base model
  full: bool = setting(False, "train all parameters, in the place of adapters")
  quantize: str = setting(
    "nf4",
    "how the base model's linear layers are held",
    choices=("nf4", "fp4", "int8", "none"),
    only="adapters",
  )
  dtype: str = setting(
    "auto",
    "dtype of everything else in the base model, and of its arithmetic; with --full, of all; auto "
    "is float32 on a CPU, bfloat16 elsewhere",
    choices=("auto", "float32", "bfloat16"),
  )
  attention: str = setting(
    "auto",
    "chunked: in memory that grows with --seq-len, not with its square; xla: all scores "
    "of a layer at once; cudnn: NVIDIA's kernel, without --packing; auto: chunked",
    choices=KINDS,
  )
  # all parameters
  masters: str = setting(
    "16",
    "of bfloat16 weights: how many bits more of each are kept in the state, where updates add up, "
    "or stochastic: they are rounded at random",
    choices=("16", "8", "none", "stochastic"),
    only="all parameters",
  )
  update_in_backward: bool = setting(
    True,
    "update each layer as soon as its gradients are there, so that those of one exist at a time",
    only="all parameters",
  )
  # adapters
  rank: int = setting(16, "rank of the adapters", least=1, most=1 << 16, only="adapters")
  alpha: float = setting(32.0, "the adapters are scaled by alpha / rank", only="adapters")
  dropout: float = setting(0.0, "dropout in the adapters", only="adapters")
  targets: str | list[str] = setting(
    "([qkvo]|qkv|gate|up|gate_up|down)_proj",
    "layers to adapt: names, such as q_proj,v_proj, each of which must be there, or a regular "
    "expression for names or full paths; all-linear is every linear layer but the head",
    only="adapters",
    read=names_of,
  )
  init: str = setting(
    "default",
    "how adapters start",
    choices=("default", "gaussian", "pissa", "loftq"),
    only="adapters",
  )
  adapter_dtype: str = setting(
    "float32",
    "dtype of the adapters and their gradients; bfloat16 halves both, and rounds away "
    "updates of less than 1/512 of a value, so it wants a higher --lr",
    choices=("float32", "bfloat16"),
    only="adapters",
  )
  rslora: bool = setting(False, "scale the adapters by alpha / sqrt(rank)", only="adapters")
  dora: bool = setting(
    False, "train the magnitude of the weights apart from their direction", only="adapters"
  )
  rank_pattern: dict[str, int] = setting(
    {}, "ranks of some layers, such as q_proj=8,down_proj=32, or JSON", only="adapters"
  )
  alpha_pattern: dict[str, float] = setting(
    {}, "alphas of some layers, the same way", only="adapters"
  )
  modules_to_save: list[str] = setting(
    [], "modules to train whole, such as lm_head,embed_tokens", only="adapters"
  )
  neftune_alpha: float = setting(
    0.0,
    "noise on the embeddings in training, 5 for example; 0: none",
  )
  # optimizer
  optim: str = setting("adamw_8bit", "optimizer, by the names of optax_lowmem.create")
  lr: float = setting(1e-3, "peak learning rate; with --full 2e-5, if none is given")
  lora_plus_ratio: float = setting(
    0.0,
    "learning rate of the second factors over that of the first; 0: the same",
    only="adapters",
  )
  schedule: str = setting(
    "cosine",
    "what follows the warmup: constant, or a fall to 0",
    choices=("constant", "linear", "cosine"),
  )
  warmup: int | None = setting(
    None,
    "steps in which the learning rate rises from 0 (default: a twentieth of the steps)",
  )
  weight_decay: float | None = setting(
    None,
    "the optimizer's weight decay (default: the optimizer's own)",
  )
  max_grad_norm: float = setting(
    1.0,
    "clip gradients to this norm; 0 does not; where layers are updated in the backward pass, it "
    "takes a second one",
  )
  # results
  out: str | None = setting(
    None,
    "folder for the results, new or empty (default: qlora-out, or qlora-out-2, ...)",
    changeable=True,
  )
  resume: str | None = setting(
    None,
    "folder of a run to continue, with the settings that it had; --steps and --epochs are totals",
    changeable=True,
  )
  eval_every: int = setting(
    0,
    "measure the held-out loss every so many steps too; 0: only first and last",
    least=0,
    most=10**9,
  )
  eval_batches: int = setting(16, "held-out batches to measure", least=1, most=1 << 24)
  samples: int = setting(
    2,
    "held-out prompts to continue before and after; 0: none",
    least=0,
    most=1 << 24,
  )
  patience: int = setting(
    0,
    "stop after so many measurements without a lower held-out loss; 0: never",
    least=0,
    most=10**9,
  )
  save_every: int = setting(
    50,
    "save the training state every so many steps; 0: only at the end",
    least=0,
    most=10**9,
    changeable=True,
  )
  stop_after: int = setting(
    0,
    "stop at this step, as if by Ctrl-C, to be continued with --resume; 0: do not",
    least=0,
    most=10**9,
    changeable=True,
  )
  tensorboard: bool = setting(False, "write TensorBoard's event files too", changeable=True)
  dry_run: bool = setting(
    False,
    "print shapes and memory; load no weights, train nothing",
    changeable=True,
  )


def _column(name: str) -> dict[str, Any]:
  """A column of the table: what each setting has of it, where it has any."""
  found = {each.name: each.metadata[name] for each in fields(Settings)}
  return {name: value for name, value in found.items() if value is not None}


HELP, CHOICES, LEAST, MOST, ONLY = map(_column, ("help", "choices", "least", "most", "only"))
READ = _column("read")
FULL = {"lr": 2e-5}  # what other defaults are with --full
CHANGEABLE = {name for name, changes in _column("changeable").items() if changes}


def trained_by(s: Settings) -> Trained:
  """What a run with these settings trains."""
  return "all parameters" if s.full else "adapters"


def flag_of(name: str) -> str:
  """A setting as a flag: `--seq-len`."""
  return f"--{name.replace('_', '-')}"


def text_of(value: Any) -> str:
  """A setting's value as a flag takes it, but for a switch."""
  if isinstance(value, dict):
    return ",".join(f"{name}={each}" for name, each in value.items())
  return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def default_of(each: "Field[Any]") -> Any:
  """A setting's default."""
  if each.default is not MISSING:
    return each.default
  assert each.default_factory is not MISSING  # every setting has a default
  return each.default_factory()


def usual_of(each: "Field[Any]", full: bool) -> Any:
  """A setting's default where all parameters are trained, or adapters."""
  return FULL.get(each.name, default_of(each)) if full else default_of(each)


def type_of(each: "Field[Any]") -> Any:
  """A setting's type, without the None it may be."""
  given = each.type
  if isinstance(given, types.UnionType):
    return next(t for t in typing.get_args(given) if t is not type(None))
  return given
