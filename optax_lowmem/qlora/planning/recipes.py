"""How to train, in order of preference: a table, and what of it fits."""

from __future__ import annotations

from typing import Any, NamedTuple

from optax_lowmem._plan.memory_plan import MemoryPlan
from optax_lowmem.qlora.planning.budget import Budget
from optax_lowmem.qlora.planning.case import Case
from optax_lowmem.qlora.run.settings import Trained


class Recipe(NamedTuple):
  """One way to train.

  Attributes:
    name: in words.
    trained: what is.
    settings: that differ from those of the run that was asked for.
    reason: why one would, and what it costs.
  """

  name: str
  trained: Trained
  settings: dict[str, Any]
  reason: str

  def of(self, case: Case) -> Case:
    """The run that it makes of one."""
    return case.but(full=self.trained == "all parameters", **self.settings)


_RANK = {"rank": 64}
_NARROW = {"adapter_dtype": "bfloat16"}

# Of each kind, the best first; below it, what gives up a little more.
RECIPES = (
  Recipe(
    "float32 weights, 8-bit AdamW",
    "all parameters",
    {"dtype": "float32", "optim": "adamw_8bit"},
    "nothing is rounded away; results of float32 AdamW to 0.1 % (docs/training.md)",
  ),
  Recipe(
    "bfloat16 weights, 16-bit masters, 8-bit AdamW",
    "all parameters",
    {"dtype": "bfloat16", "masters": "16", "optim": "adamw_8bit"},
    "half of weights and gradients; what updates add up to is kept as in float32 (docs/bf16.md)",
  ),
  Recipe(
    "bfloat16 weights, 8-bit masters, 8-bit AdamW",
    "all parameters",
    {"dtype": "bfloat16", "masters": "8", "optim": "adamw_8bit"},
    "a byte less a parameter; masters of 24 bits, right in the mean",
  ),
  Recipe(
    "bfloat16 weights, 8-bit masters, CAME",
    "all parameters",
    {"dtype": "bfloat16", "masters": "8", "optim": "came"},
    "half of the moments; another rule, with another learning rate",
  ),
  Recipe(
    "bfloat16 weights, 16-bit masters, 8-bit AdamW, all in host memory",
    "all parameters",
    {"dtype": "bfloat16", "masters": "16", "optim": "paged_adamw_8bit"},
    "no state stays on the device; it travels there and back in each step",
  ),
  Recipe(
    "LoRA on 16-bit weights",
    "adapters",
    {"quantize": "none", "optim": "adamw_8bit", **_RANK},
    "the base is exact, and nothing is unpacked in a step",
  ),
  Recipe(
    "LoRA on 8-bit weights",
    "adapters",
    {"quantize": "int8", "optim": "adamw_8bit", **_RANK},
    "half of the base; its rounding is far below that of 4 bits",
  ),
  Recipe(
    "QLoRA, rank 64",
    "adapters",
    {"quantize": "nf4", "optim": "adamw_8bit", **_RANK},
    "a quarter of the base, as in the QLoRA paper",
  ),
  Recipe(
    "QLoRA, rank 64, bfloat16 adapters",
    "adapters",
    {"quantize": "nf4", "optim": "adamw_8bit", **_RANK, **_NARROW},
    "half of adapters and their gradients; wants a higher --lr",
  ),
  Recipe(
    "QLoRA, rank 16, bfloat16 adapters, state in host memory",
    "adapters",
    {"quantize": "nf4", "optim": "paged_adamw_8bit", "rank": 16, **_NARROW},
    "the least there is: the base, and what a step needs",
  ),
)  # fmt: skip

# What recipes choose, and nobody else.
CHOSEN = ("full", "qlora", *dict.fromkeys(name for each in RECIPES for name in each.settings))

# What is to be learned -> which kind comes first, and why.
TASKS: dict[str, tuple[tuple[Trained, ...], str]] = {
  "instructions": (
    ("adapters", "all parameters"),
    "Style, format, a task: adapters learn it, in a file that is small.",
  ),
  "domain": (
    ("all parameters", "adapters"),
    "Much new text, another language: more than adapters of a low rank hold.",
  ),
  "pretraining": (
    ("all parameters",),
    "From the start, there is no base to adapt.",
  ),
}


class Fit(NamedTuple):
  """A recipe, and what it takes."""

  recipe: Recipe
  case: Case
  plan: MemoryPlan
  fits: bool


def ranked(case: Case, task: str, budget: Budget, card: str | None = None) -> list[Fit]:
  """All recipes for a task in order of preference, and whether they fit.

  Args:
    case: the model, and the settings that no recipe sets.
    task: a name in `TASKS`.
    budget: what there is.
    card: whose compiler is asked of the first that fits by the estimate, and of those after it if
      it does not.
  """
  order, _ = TASKS[task]
  recipes = [recipe for trained in order for recipe in RECIPES if recipe.trained == trained]
  found, chosen = [], False
  for recipe in recipes:
    changed = recipe.of(case)
    plan = changed.plan()
    if card is not None and not chosen and budget.fits(plan):
      plan = changed.plan(card)
    found.append(Fit(recipe, changed, plan, budget.fits(plan)))
    chosen = chosen or found[-1].fits
  return found
