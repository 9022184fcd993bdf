"""What a run learns from and measures with, and by what a resumed run knows it again."""

import datetime
from pathlib import Path
from typing import NamedTuple

from optax_lowmem.qlora.data.batches import Batches
from optax_lowmem.qlora.data.dataset import Dataset, Row, load
from optax_lowmem.qlora.files.disk import sha256_of
from optax_lowmem.qlora.files.fetch import default_data
from optax_lowmem.qlora.loading.fingerprints import check_same_base, of_model
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.run.checks import check_vocabulary
from optax_lowmem.qlora.run.runs import began, check_same_data, read_run
from optax_lowmem.qlora.run.settings import Settings
from optax_lowmem.qlora.run.terminal import say
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer


class Identity(NamedTuple):
  """What run.json keeps beside the settings, and is the same in a run that is resumed."""

  data_sha256: str
  today: datetime.date  # on which it began: templates write it
  base: dict[str, str] | None  # the base model's files; of runs from before they were kept, None
  template: str  # the chat template's name


class Inputs(NamedTuple):
  """The rows, and what reads them."""

  tokenizer: ChatTokenizer
  batches: Batches
  held_rows: list[Row]
  identity: Identity


def read_inputs(s: Settings, model_path: Path, config: LlamaConfig) -> Inputs:
  """Reads tokenizer and data, and says what they are.

  Raises:
    ValueError, OSError: where they do not belong to the model, or not to the run that is resumed.
  """
  resume = Path(s.resume) if s.resume else None
  base = read_run(resume)["base"] if resume else of_model(model_path)
  if resume:
    check_same_base(base, model_path, resume)
  today = (began(resume) if resume else None) or datetime.date.today()
  tokenizer = ChatTokenizer.from_model(model_path, s.chat_template, today)
  check_vocabulary(tokenizer, config)
  data, data_sha256 = read_data(s, tokenizer)
  say(f"Model: {model_path.name}, {config.parameter_count():,} parameters.")
  rows, held_rows = divided(s, data)
  batches = Batches(
    rows, s.batch_size, s.grad_accum, s.seq_len, tokenizer.pad_id, s.seed,
    packing=s.packing, buckets=s.buckets,
  )  # fmt: skip
  return Inputs(
    tokenizer, batches, held_rows, Identity(data_sha256, today, base, tokenizer.template.title)
  )


def divided(s: Settings, data: Dataset) -> tuple[list[Row], list[Row]]:
  """The rows to learn from, and those to measure with; says how many they are."""
  rows, held_rows = data.split()
  if not s.packing:  # what is not measured is learned from
    most = s.eval_batches * s.batch_size
    rows, held_rows = rows + held_rows[most:], held_rows[:most]
  say(f"{len(rows):,} rows to learn from, {len(held_rows):,} to measure with.")
  return rows, held_rows


def read_data(s: Settings, tokenizer: ChatTokenizer) -> tuple[Dataset, str]:
  """The rows, and the SHA-256 of their file; says what they are."""
  path = Path(s.data) if s.data else default_data(say)
  sha256 = sha256_of(path)
  if s.resume:
    check_same_data(Path(s.resume), sha256, path)
  data = load(path, tokenizer, s.seq_len, train_on_prompt=s.train_on_prompt)
  say(f"Data: {path.name}, {data.kind}, {tokenizer.template.name} template.")
  for note in data.notes:
    say(note)
  return data, sha256
