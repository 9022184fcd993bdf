"""Memory and traffic of each GPU, for 7B to 405B parameters trained whole on 8 to 4,096 of them.

    python benchmarks/scale.py [--only memory traffic check] [--json results/scale-h100.json]

Everything is in parts (FSDP): weights, gradients and state; each device has one row of 2,048 tokens
in bfloat16, and each layer is computed once more in the backward pass. `memory` is of the planner:
weights, gradients and state exactly, from shapes, and activations by its formula. `traffic` is
computed: what an update moves through device memory, by its programs compiled for an H100; what
goes over the network, and over the link to the host. `check` compiles the step for eight H100s and
compares. Nothing is run, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)  # updates are cut only where there are several

from _measure import write
from optax_lowmem._plan.memory_plan import MemoryPlan
from optax_lowmem.qlora.planning.case import Case
from optax_lowmem.qlora.planning.model_source import config_of
from optax_lowmem.qlora.planning.steps import Step
from optax_lowmem.qlora.run.settings import Settings

GB = 10**9
MODELS = ("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3.1-405b")
DEVICES = (8, 16, 64, 256, 1024, 4096)
TOKENS = 2048
CARD_GB = 80.0  # of which half a GiB is the driver's


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How all parameters are trained, and what an update moves.

  Attributes:
    optim: the name of the optimizer.
    dtype: of the weights and gradients.
    masters: of weights in bfloat16.
    hbm: the row and the dtype in `benchmarks/results/accelerator-h100.json` that says what an
      update moves through device memory; None where there is none.
  """

  optim: str
  dtype: str = "bfloat16"
  masters: str = "none"
  hbm: tuple[str, str] | None = None


RECIPES: dict[str, Recipe] = {
  "adamw, 32 bits, float32 weights": Recipe("adamw", "float32", hbm=("optax.adamw", "float32")),
  "adamw, 32 bits": Recipe("adamw"),
  "adamw, 8 bits": Recipe("adamw_8bit", hbm=("adamw, 8 bits", "bfloat16")),
  "adamw, 4 bits": Recipe("adamw_4bit", hbm=("adamw, 4 bits", "bfloat16")),
  "came, 8 bits": Recipe("came", hbm=("came, 8 bits", "bfloat16")),
  "adafactor, no momentum": Recipe("adafactor"),
  "master_weights(adamw, 8 bits)": Recipe("adamw_8bit", masters="16"),
  "offloaded(adamw, 32 bits)": Recipe("paged_adamw"),
  "offloaded(adamw, 8 bits)": Recipe("paged_adamw_8bit"),
  "offloaded(master_weights(adamw, 8 bits))": Recipe("paged_adamw_8bit", masters="16"),
}
CHECKED = (
  ("llama-2-7b", "adamw, 8 bits"),
  ("llama-2-70b", "adamw, 8 bits"),
  ("llama-2-7b", "came, 8 bits"),
  ("llama-2-7b", "master_weights(adamw, 8 bits)"),
  ("llama-2-7b", "offloaded(adamw, 8 bits)"),
  ("llama-2-7b", "adamw, 32 bits, float32 weights"),
  ("llama-2-7b", "adamw, 32 bits"),
  ("llama-2-7b", "adamw, 4 bits"),
  ("llama-2-7b", "adafactor, no momentum"),
  ("llama-2-70b", "came, 8 bits"),
)


def step(model: str, recipe: Recipe, devices: int) -> tuple[Step, MemoryPlan]:
  """The step of so many devices, and what the planner says of it."""
  settings = Settings(
    batch_size=devices,
    seq_len=TOKENS,
    dtype=recipe.dtype,
    optim=recipe.optim,
    masters=recipe.masters,
    fsdp=True,
    full=True,
    update_in_backward=False,
    max_grad_norm=0.0,
  )
  case = Case(model, config_of(model), settings, devices)
  return case.step(), case.plan()


def row(planned: MemoryPlan) -> dict[str, Any]:
  kinds = ("weights", "state", "gradients", "temporaries")
  found = {f"{kind} GB": planned.of(kind) / GB for kind in kinds}
  return found | {"device GB": planned.device_bytes / GB, "host GB": planned.host_bytes / GB}


def memory() -> Iterator[dict[str, Any]]:
  """GB on each device, as planned; of pages in host memory, for each device."""
  for model in MODELS:
    for name, recipe in RECIPES.items():
      for devices in DEVICES:
        _, planned = step(model, recipe, devices)
        yield {"model": model, "optimizer": name, "devices": devices, **row(planned)}


def traffic() -> Iterator[dict[str, Any]]:
  """GB that each device moves in a step beside computing it, by parts, on 64 devices."""
  devices = 64
  file = pathlib.Path(__file__).parent / "results/accelerator-h100.json"
  moved = {
    (each["rule"], each["dtype"]): each["hbm"]
    for section in ("one", "norms")
    for each in json.loads(file.read_text())[section]
    if each.get("program", "one array") == "one array"
  }
  for model in MODELS:
    for name, recipe in RECIPES.items():
      _, planned = step(model, recipe, devices)
      weights = planned.of("weights") * devices  # gathered twice; gradients scattered once
      count = sum(part.parameters for part in planned.parts) / devices
      hbm = moved[recipe.hbm] * count / GB if recipe.hbm else None
      yield {
        "model": model,
        "optimizer": name,
        "devices": devices,
        "network GB": 3 * weights * (devices - 1) / devices / GB,
        "update, device memory GB": hbm,
        "host link, both ways GB": 2 * planned.host_bytes / GB,
      }


def check() -> Iterator[dict[str, Any]]:
  """The plan of eight devices beside the step compiled for eight H100s."""
  for model, name in CHECKED:
    found, planned = step(model, RECIPES[name], 8)
    compiled = found.compiled("h100")
    yield {
      "model": model,
      "optimizer": name,
      "planned GB": planned.device_bytes / GB,
      "compiled GB": compiled.device_bytes / GB,
      "error %": 100 * (planned.device_bytes / compiled.device_bytes - 1),
      "host, planned GB": planned.host_bytes / GB,
      "host, compiled GB": compiled.host_bytes / GB,
      "seconds": compiled.seconds,
    }


def of_memory(rows: list[dict[str, Any]]) -> Iterator[str]:
  """A table for each model, a row for each optimizer."""
  for model in MODELS:
    yield from (f"**{model}**", "")
    yield "| | " + " | ".join(f"{n:,}" for n in DEVICES) + " | host, of 8 | fits |"
    yield "|---" * (len(DEVICES) + 3) + "|"
    for name in RECIPES:
      mine = [r for r in rows if (r["model"], r["optimizer"]) == (model, name)]
      cells = [f"{r['device GB']:.1f}" for r in mine]
      least = next((r["devices"] for r in mine if r["device GB"] <= CARD_GB - 0.54), None)
      yield f"| {name} | {' | '.join(cells)} | {mine[0]['host GB']:.1f} | {least or 'none'} |"
    yield ""


# Of `traffic`: the heads of the columns, of which optimizer, and what of it.
_UPDATE, _LINK = "update, device memory GB", "host link, both ways GB"
TRAFFIC = (
  ("network", "adamw, 32 bits", "network GB"),
  ("update, 32 bits, float32", "adamw, 32 bits, float32 weights", _UPDATE),
  ("8 bits", "adamw, 8 bits", _UPDATE),
  ("4 bits", "adamw, 4 bits", _UPDATE),
  ("CAME, 8 bits", "came, 8 bits", _UPDATE),
  ("host link, paged 32 bits", "offloaded(adamw, 32 bits)", _LINK),
  ("8 bits", "offloaded(adamw, 8 bits)", _LINK),
  ("masters, 8 bits", "offloaded(master_weights(adamw, 8 bits))", _LINK),
)


def of_traffic(rows: list[dict[str, Any]]) -> Iterator[str]:
  """A row for each model."""
  yield "| | " + " | ".join(head for head, *_ in TRAFFIC) + " |"
  yield "|---" * (len(TRAFFIC) + 1) + "|"
  for model in MODELS:
    mine = {r["optimizer"]: r for r in rows if r["model"] == model}
    cells = (f"{mine[name][key]:.{1 if key[0] == 'n' else 2}f}" for _, name, key in TRAFFIC)
    yield f"| {model} | {' | '.join(cells)} |"


def of_check(rows: list[dict[str, Any]]) -> Iterator[str]:
  """A row for each step that was compiled."""
  yield "| model | optimizer | planned | compiled | error | host, planned | host, compiled |"
  yield "|---|---|---|---|---|---|---|"
  for r in rows:
    found = f"{r['planned GB']:.2f} | {r['compiled GB']:.2f} | {r['error %']:.1f} %"
    host = f"{r['host, planned GB']:.2f} | {r['host, compiled GB']:.2f}"
    yield f"| {r['model']} | {r['optimizer']} | {found} | {host} |"


def tables(found: dict[str, Any]) -> dict[str, list[str]]:
  """The lines of each section's tables."""
  made = {"memory": of_memory, "traffic": of_traffic, "check": of_check}
  return {name: list(lines(found[name])) for name, lines in made.items() if name in found}


SECTIONS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
  f.__name__: f for f in (memory, traffic, check)
}


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS))
  parser.add_argument("--json", help="file to write the result to; sections not asked for stay")
  args = parser.parse_args()
  found: dict[str, Any] = {"card": "h100", "tokens of a device": TOKENS}
  if args.json and pathlib.Path(args.json).exists():
    old = json.loads(pathlib.Path(args.json).read_text())
    found |= {name: old[name] for name in SECTIONS if name in old}
  for name in args.only:
    print(f"\n### {name}: {SECTIONS[name].__doc__}\n", flush=True)
    rows = found[name] = []
    for each in SECTIONS[name]():
      rows.append(each)
      if name == "check":  # a minute each: what is done is kept
        write(args.json, found)
    print(*tables(found)[name], sep="\n", flush=True)
  write(args.json, found)


if __name__ == "__main__":
  main()
