"""A plan as a picture: memory by part, stacked, with the line of what there is."""

from __future__ import annotations

from pathlib import Path

from optax_lowmem._plan.memory_plan import MemoryPlan
from optax_lowmem.qlora.planning.budget import GIB, Budget

_COLORS = {
  "weights": "#2864a8",
  "adapters": "#5b9bd5",
  "gradients": "#e0a030",
  "state": "#4a9a5b",
  "batch": "#999999",
  "temporaries": "#c8501e",
}


def draw(path: Path, plans: dict[str, MemoryPlan], budget: Budget | None = None) -> None:
  """Writes a PNG with a bar for each plan.

  Args:
    path: the file to write.
    plans: by their names.
    budget: what there is, as a line; None for none.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 1.6 + 0.6 * len(plans)), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  start = [0.0] * len(plans)
  for kind, color in _COLORS.items():
    sizes = [sum(p.device for p in plan.parts if p.kind == kind) / GIB for plan in plans.values()]
    if any(sizes):
      axes.barh(list(plans), sizes, left=start, color=color, label=kind, height=0.6)
      start = [a + b for a, b in zip(start, sizes, strict=True)]
  if budget is not None:
    axes.axvline(budget.usable / GIB, color="black", linestyle="--", linewidth=1)
    axes.annotate(
      f" {budget.name}", (budget.usable / GIB, 1), xycoords=("data", "axes fraction"), va="top"
    )
  axes.set_xlabel("GiB of device memory")
  axes.invert_yaxis()
  axes.margins(x=0.1)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.35))
  figure.savefig(path, dpi=150)
