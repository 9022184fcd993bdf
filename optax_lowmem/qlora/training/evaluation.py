"""How good the model is: the loss on rows it never learns from."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from optax_lowmem.qlora.data.batches import Batch
from optax_lowmem.qlora.training.devices import dealt
from optax_lowmem.qlora.training.step import State, eval_step


class HeldOut:
  """Loss in nats, and perplexity, per learned token of held-out rows; without dropout or noise.

  Args:
    graph: of the model in evaluation.
    frozen: the base model.
    batches: the held-out rows.
    mesh: the devices, or None for one.
  """

  def __init__(self, graph: Any, frozen: Any, batches: Sequence[Batch], mesh: Any = None):
    shards = 1 if mesh is None else mesh.size
    self.step = jax.jit(partial(eval_step, graph, shards=shards))
    self.frozen, self.batches = frozen, [dealt(batch, mesh) for batch in batches]
    self.tokens = sum(int(batch.learned.sum()) for batch in batches)

  def __call__(self, state: State) -> dict[str, float]:
    # The optimizer's state is not needed, and may be in another memory.
    state = state._replace(opt_state=None)
    total = sum(float(self.step(state, self.frozen, batch)) for batch in self.batches)
    loss = total / self.tokens
    return {"held_out_loss": loss, "perplexity": math.exp(min(loss, 700.0))}


class Measured(NamedTuple):
  """A held-out loss, and the step after which it was measured."""

  loss: float
  step: int


def better_than_last(records: Sequence[dict[str, Any]]) -> Measured | None:
  """The lowest held-out loss after a step of training; None where that is the last one's."""
  best, _ = since_best(records)
  found = [(r["held_out_loss"], r["step"]) for r in records if "held_out_loss" in r and r["step"]]
  if math.isinf(best) or found[-1][0] == best:
    return None
  return next(Measured(loss, step) for loss, step in found if loss == best)


def since_best(records: Sequence[dict[str, Any]]) -> tuple[float, int]:
  """The lowest held-out loss after a step of training, and how often it was missed since."""
  best, missed = math.inf, 0
  for record in records:
    if "held_out_loss" in record and record["step"] > 0:
      loss = record["held_out_loss"]
      best, missed = (loss, 0) if loss < best else (best, missed + 1)
  return best, missed
