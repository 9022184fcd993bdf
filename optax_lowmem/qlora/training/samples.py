"""What the model says: continuations of held-out prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from optax_lowmem.qlora.data.dataset import Row
from optax_lowmem.qlora.models.generation import Generator
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer

NEW_TOKENS = 48
TEMPERATURE = 0.7


class Samples:
  """Held-out prompts, to be continued before and after training.

  A prompt is what stands before the first answer of a row; in plain text, its first tokens.
  """

  def __init__(self, graph: Any, tokenizer: ChatTokenizer, rows: Sequence[Row], count: int):
    self.tokenizer, self.rows = tokenizer, list(rows[:count])
    self.prompts = [row.ids[: _prompt_length(row)] for row in self.rows]
    self.generate = Generator(graph, tokenizer.stop_ids, NEW_TOKENS)

  def __call__(self, *variables: Any) -> list[dict[str, str]]:
    """``{"prompt", "data", "model"}``: a prompt, its answer in the data, and the model's."""
    if not self.prompts:
      return []
    said = self.generate(variables, self.prompts, temperature=TEMPERATURE)
    return [
      {
        "prompt": self.tokenizer.decode(prompt),
        "data": self.tokenizer.decode(self._answer(row.ids[len(prompt) :])),
        "model": self.tokenizer.decode(answer),
      }
      for row, prompt, answer in zip(self.rows, self.prompts, said, strict=True)
    ]

  def _answer(self, ids: np.ndarray) -> np.ndarray:
    stops = np.flatnonzero(np.isin(ids, self.tokenizer.stop_ids))
    return ids[: stops[0]] if len(stops) else ids


def _prompt_length(row: Row) -> int:
  first = int(row.learned.argmax())
  return first if first > 0 else max(1, min(16, len(row.ids) // 2))
