"""Training rows from a file: conversations, instructions, completions or plain text.

================================================  =========================================
``{"messages": [{"role", "content"}, ...]}``      chat, as OpenAI's; answers are learned, but for
                                                  those with ``"weight": 0`` or ``"train": false``
``{"conversations": [{"from", "value"}, ...]}``   ShareGPT; answers are learned
``{"instruction", "input" (optional), "output"}`` Alpaca; the output is learned, and the answers
                                                  of an optional ``"history"``
``{"prompt", "completion"}``                      without a template; the completion is learned
``{"text"}``                                      all of it is learned
anything else                                     all of it is learned, cut at every ``seq_len``
================================================  =========================================

The rows may stand in a JSON list or one a line, or in a Parquet file: the content decides, not the
file's name. Files named .csv and .tsv are tables with these names in the first line, lists as JSON.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from optax_lowmem.qlora.data.batches import Batch as Batch
from optax_lowmem.qlora.data.batches import Row
from optax_lowmem.qlora.data.formats import CONVERSATIONS, read
from optax_lowmem.qlora.files.json_files import DEEP, decode, layout_of, lines, listed
from optax_lowmem.qlora.files.json_files import DataError as DataError
from optax_lowmem.qlora.files.tables import SEPARATORS, is_parquet, parquet, separated
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer
from optax_lowmem.qlora.text.text_blocks import BLOCK as BLOCK
from optax_lowmem.qlora.text.text_blocks import blocks

_Encoded = Iterator[tuple[str, Any, Any]]  # kind, tokens, which of them are learned


@dataclass(frozen=True)
class Dataset:
  """Rows, and sentences about what was cut or left out while making them."""

  kind: str
  rows: list[Row]
  notes: list[str] = field(default_factory=list)

  def split(self, fraction: float = 0.05) -> tuple[list[Row], list[Row]]:
    """``(training rows, held-out rows)``: the same on every call, whatever the run's seed."""
    order = np.random.default_rng(0).permutation(len(self.rows))
    held = max(1, round(fraction * len(self.rows)))
    return [self.rows[i] for i in order[held:]], [self.rows[i] for i in order[:held]]


def load(
  path: str | Path, tokenizer: ChatTokenizer, seq_len: int, *, train_on_prompt: bool = False
) -> Dataset:
  """Read, check and tokenize a data file.

  Rows longer than `seq_len` are cut, rows in which nothing is left to learn are dropped; both are
  counted in ``notes``. Nothing else is dropped: the first malformed row raises.

  Raises:
    FileNotFoundError: where there is no such file.
    DataError: for an empty or malformed file, or one with fewer than two usable rows.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"There is no data file at {path}.")
  unused: set[str] = set()
  if (rows := _rows(path)) is not None:
    encoded = _written(rows, tokenizer, seq_len, train_on_prompt, unused)
  else:
    encoded = _pieces(decode(path), tokenizer, seq_len)
  kinds, kept, count, cut = set(), [], 0, 0
  for kind, ids, learned in encoded:
    kinds.add(kind)
    count += 1
    cut += len(ids) > seq_len + 1
    row = Row(np.array(ids[: seq_len + 1], np.int32), np.array(learned[: seq_len + 1], bool))
    if row.learned[1:].any():
      kept.append(row)
  if not count:
    raise DataError(f"{path} has no rows: the list is empty.")
  dropped = count - len(kept)
  notes = []
  if cut:
    notes.append(f"{cut:,} of {count:,} rows were longer than {seq_len} tokens and were cut.")
  if dropped:
    notes.append(f"{dropped:,} rows were dropped: nothing in them was left to learn.")
  if unused:
    names = ", ".join(sorted(unused))
    notes.append(f"The chat template writes nothing of these fields of messages: {names}.")
  if kinds & CONVERSATIONS and tokenizer.end_of_answer is None:
    notes.append(
      f"The {tokenizer.template.name} template writes no control token behind an answer: a model "
      "trained with it does not learn where to stop. Choose another --chat-template."
    )
  if len(kept) < 2:
    if cut:
      remedy = f"Add rows, or choose another --seq-len (now {seq_len})"
    elif dropped:
      remedy = "Add rows in which there is an answer, which is what is learned"
    else:
      remedy = "Add rows"
    raise DataError(
      f"{path} gives {len(kept)} usable row{'s' * (len(kept) != 1)} of {count}; at least "
      f"2 are needed, one to learn from and one to measure with. {remedy}."
    )
  return Dataset(" and ".join(sorted(kinds)), kept, notes)


def _rows(path: Path) -> Iterator[tuple[str, Any]] | None:
  """``(place, row)`` for each row; None for a file of plain text."""
  if is_parquet(path):
    return parquet(path)
  text = decode(path)
  if path.suffix.lower() in SEPARATORS:
    return separated(path, text)
  layout = layout_of(path, text)
  return {"list": listed, "lines": lines}[layout](path, text) if layout != "text" else None


def _written(
  rows: Iterator[tuple[str, Any]],
  tokenizer: ChatTokenizer,
  seq_len: int,
  everything: bool,
  unused: set[str],
) -> _Encoded:
  """Each row. What no template has written of its messages' fields goes into `unused`."""
  used = {"role", "content"}
  for where, raw in rows:
    example = read(raw, where)
    try:
      if example.messages:
        fields = {key for message in example.messages for key in message} - used - unused
        unused |= {key for key in fields if not tokenizer.template.writes(key)}
        used |= fields - unused
        ids, learned = tokenizer.encode_chat(
          example.messages, example.silent, everything=everything, **example.extras
        )
      else:
        ids, learned = tokenizer.encode_completion(example.prompt, example.text, seq_len + 1)
        learned = [True] * len(ids) if everything else learned
    except ValueError as error:
      raise DataError(f"{where}: {str(error).rstrip('.')}.") from error
    except RecursionError as error:
      raise DataError(f"{where}: {DEEP}") from error
    except (TypeError, AttributeError, LookupError) as error:  # half a character, for example
      raise DataError(f"{where}: it holds what cannot be written ({error!s:.200}).") from error
    yield example.kind, ids, learned


def _pieces(text: str, tokenizer: ChatTokenizer, seq_len: int) -> _Encoded:
  """Plain text, cut at every `seq_len` tokens."""
  text = text.strip().removesuffix(tokenizer.eos)
  parts = [np.array(tokenizer.encode(part), np.int32) for part in blocks(text, BLOCK)]
  ids = np.concatenate([*parts, np.array([tokenizer.eos_id], np.int32)])
  # Neighbouring pieces share one token, so that each token but the first is a target once.
  for i in range(0, len(ids) - 1, seq_len):
    piece = ids[i : i + seq_len + 1]
    yield "plain text", piece, np.ones(len(piece), bool)
