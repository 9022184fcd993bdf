"""Training rows from a file: conversations, instructions, completions or plain text.

================================================  =========================================
``{"messages": [{"role", "content"}, ...]}``      chat, as OpenAI's; answers are learned
``{"conversations": [{"from", "value"}, ...]}``   ShareGPT; answers are learned
``{"instruction", "input" (optional), "output"}`` Alpaca; the output is learned
``{"prompt", "completion"}``                      without a template; the completion is learned
``{"text"}``                                      all of it is learned
anything that is not JSON                         all of it is learned, cut at every ``seq_len``
================================================  =========================================

The rows may stand in a JSON list or one a line: the content decides, not the file's name.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from batches import Batch as Batch
from batches import Row
from chat import ChatTokenizer
from formats import read
from json_files import DataError as DataError
from json_files import decode, layout_of, lines, listed


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
  text = decode(path)
  layout = layout_of(path, text)
  encoded: list[tuple[list[int], list[bool]]] = []
  kinds = set()
  if layout == "text":
    kinds.add("plain text")
    ids = [*tokenizer.encode(text.strip()), tokenizer.eos_id]
    # Neighbouring pieces share one token, so that each token but the first is a target once.
    pieces = [ids[i : i + seq_len + 1] for i in range(0, len(ids) - 1, seq_len)]
    encoded = [(piece, [True] * len(piece)) for piece in pieces]
  else:
    for where, raw in (listed if layout == "list" else lines)(path, text):
      example = read(raw, where)
      kinds.add(example.kind)
      try:
        if example.messages:
          encoded.append(tokenizer.encode_chat(example.messages))
        else:
          encoded.append(tokenizer.encode_completion(example.prompt, example.text))
      except ValueError as error:
        raise DataError(f"{where}: {error}.") from error
  if not encoded:
    raise DataError(f"{path} has no rows: the list is empty.")

  if train_on_prompt:
    encoded = [(ids, [True] * len(ids)) for ids, _ in encoded]
  rows = [
    Row(np.asarray(ids[: seq_len + 1], np.int32), np.asarray(learned[: seq_len + 1], bool))
    for ids, learned in encoded
  ]
  cut = sum(len(ids) > seq_len + 1 for ids, _ in encoded)
  kept = [row for row in rows if row.learned[1:].any()]
  dropped = len(rows) - len(kept)
  notes = []
  if cut:
    notes.append(f"{cut:,} of {len(rows):,} rows were longer than {seq_len} tokens and were cut.")
  if dropped:
    notes.append(f"{dropped:,} rows were dropped: nothing in them was left to learn.")
  if len(kept) < 2:
    raise DataError(
      f"{path} gives {len(kept)} usable row{'s' * (len(kept) != 1)} of {len(rows)}; at least "
      "2 are needed, one to learn from and one to measure with. Add rows, or choose another "
      f"--seq-len (now {seq_len})."
    )
  return Dataset(" and ".join(sorted(kinds)), kept, notes)
