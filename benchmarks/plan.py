"""What trains on which card: plans by an H100's own compiler, which need no H100.

    python benchmarks/plan.py [--card h100] [--only figure8 …] [--json rows.json]

QLoRA with rank 64 on all linear layers, one row, 8-bit AdamW, beside Figure 8 of the QLoRA paper
(Dettmers et al. 2023); a 7B model at growing lengths on a card of 24 GB; all parameters of a 7B
model by optimizer; the state of a 70B model by optimizer; one step by two compilers; and how long
such answers take. Nothing is run, no weight is made. GB are 10^9 bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_lowmem as lowmem
from _measure import write
from optax_lowmem.qlora.planning.budget import budget_of
from optax_lowmem.qlora.planning.case import Case
from optax_lowmem.qlora.planning.model_source import config_of
from optax_lowmem.qlora.run.settings import Settings

GB = 10**9
# Figure 8: GB of device memory, one row of 512 tokens.
PAPER = {"llama-7b": 6.9, "llama-13b": 11.3, "llama-33b": 24.7, "llama-65b": 45.0}
CARDS = {"llama-7b": "8GB", "llama-13b": "12GB", "llama-33b": "24GB", "llama-65b": "48GB"}
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
BF16 = {"adapter_dtype": "bfloat16"}
# Optimizer, dtype of the weights.
FULL = (
  ("adamw", "float32"),
  ("adamw_8bit", "float32"),
  ("paged_adamw", "float32"),
  ("adamw", "bfloat16"),
  ("adamw_8bit", "bfloat16"),
  ("adamw_4bit", "bfloat16"),
  ("came", "bfloat16"),
  ("paged_adamw", "bfloat16"),
  ("paged_adamw_8bit", "bfloat16"),
)


# Masters of bfloat16 weights: how they are called, and the setting.
MASTERS = {
  "master_weights(adamw_8bit)": "16",
  "master_weights(adamw_8bit, bits=8)": "8",
  "stochastic_rounding(adamw_8bit)": "stochastic",
}


# Model, optimizer, masters, tokens of the row.
BACKWARD = (
  ("llama-7b", "adamw_8bit", "16", 512),
  ("llama-7b", "adamw_8bit", "8", 512),
  ("llama-7b", "adamw_8bit", "stochastic", 512),
  ("llama-7b", "adamw_4bit", "8", 512),
  ("llama-7b", "came", "8", 512),
  ("llama-7b", "paged_adamw_8bit", "16", 512),
  ("llama-7b", "adamw_8bit", "16", 4096),
  ("llama-7b", "paged_adamw_8bit", "16", 4096),
  ("llama-3.2-1b", "adamw_8bit", "16", 2048),
  ("qwen3-0.6b", "adamw_8bit", "16", 1024),
  ("smollm2-135m", "adamw_8bit", "16", 512),
)


def case(model: str, **settings: Any) -> Case:
  base = Settings(batch_size=1, seq_len=512, rank=64, targets="all-linear", dtype="bfloat16")
  return Case(model, config_of(model), dataclasses.replace(base, **settings))


def whole(model: str, masters: str = "none", backward: bool = False, **settings: Any) -> Case:
  """All parameters, without masters; the update after the backward pass."""
  return case(model, full=True, masters=masters, update_in_backward=backward, **settings)


def row(planned: lowmem.MemoryPlan, memory: str | None = None) -> dict[str, Any]:
  found: dict[str, Any] = {
    "device GB": planned.device_bytes / GB,
    "host GB": planned.host_bytes / GB,
  }
  for kind in ("weights", "adapters", "state", "temporaries"):
    found[f"{kind} GB"] = planned.of(kind) / GB
  if memory is not None:
    budget = budget_of(memory, None)
    assert budget is not None
    found |= {"memory": memory, "below": planned.device_bytes <= budget.total}
    found["fits"] = budget.fits(planned)  # with what the driver keeps
  return found | {"seconds": planned.seconds}


def figure8(card: str) -> Iterator[dict[str, Any]]:
  """QLoRA, one row of 512 tokens, beside the paper."""
  for model, paper in PAPER.items():
    for options in ({}, BF16):
      planned = case(model, **options).plan(card)
      adapters = options.get("adapter_dtype", "float32")
      yield {
        "model": model, "adapters": adapters, "paper GB": paper, **row(planned, CARDS[model]),
      }  # fmt: skip


def lengths(card: str) -> Iterator[dict[str, Any]]:
  """QLoRA of 7B, one row of so many tokens, on 24 GB."""
  for tokens in LENGTHS:
    yield {
      "model": "llama-7b",
      "tokens": tokens,
      **row(case("llama-7b", seq_len=tokens).plan(card), "24GB"),
    }


def full(card: str) -> Iterator[dict[str, Any]]:
  """All parameters of 7B, one row of 512 tokens."""
  for optim, dtype in FULL:
    asked = whole("llama-7b", optim=optim, dtype=dtype)
    yield {
      "model": "llama-7b",
      "optimizer": optim,
      "weights": dtype,
      **row(asked.plan(card), "80GB"),
    }


def masters(card: str) -> Iterator[dict[str, Any]]:
  """The same in bfloat16, with what `full` loses of each update kept or rounded without bias."""
  for name, masters in MASTERS.items():
    asked = whole("llama-7b", masters, max_grad_norm=0.0)
    yield {
      "model": "llama-7b",
      "optimizer": name,
      "weights": "bfloat16",
      **row(asked.plan(card), "80GB"),
    }


def backward(card: str) -> Iterator[dict[str, Any]]:
  """The same with each layer updated in the backward pass, without a norm to clip to."""
  for model, optim, masters, tokens in BACKWARD:
    asked = whole(model, masters, True, optim=optim, seq_len=tokens, max_grad_norm=0.0)
    planned = asked.plan(card)
    yield {
      "model": model,
      "optimizer": optim,
      "masters": masters,
      "tokens": tokens,
      **row(planned, "80GB"),
      "B/param": planned.device_bytes / asked.config.parameter_count(),
    }


def devices(card: str) -> Iterator[dict[str, Any]]:
  """QLoRA on eight cards of 24 GB, a row of 512 tokens on each, the base in parts."""
  if jax.device_count() < 8:  # updates are cut only where there are several
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    with tempfile.TemporaryDirectory() as folder:
      command = [sys.executable, __file__, "--card", card, "--only", "devices"]
      command += ["--json", f"{folder}/rows.json"]
      subprocess.run(
        command, check=True, env=os.environ | {"XLA_FLAGS": flags}, stdout=subprocess.DEVNULL
      )
      yield from json.loads(pathlib.Path(folder, "rows.json").read_text())["devices"]
    return
  for model in ("llama-2-70b", "llama-3.1-405b"):
    asked = case(model, batch_size=8, fsdp=True, **BF16).but(devices=8)
    yield {"model": model, "cards": 8, **row(asked.plan(card), "24GB")}


def state(card: str) -> Iterator[dict[str, Any]]:
  """The optimizers' state for all parameters of Llama 2 70B, in units of 10^9 bytes."""
  trained = whole("llama-2-70b").step().state.trained
  for each in lowmem.compare_optimizer_memory(trained):
    yield {
      "optimizer": each.name, "device GB": each.device / GB, "host GB": each.host / GB,
      "B/param": each.per_parameter,
    }  # fmt: skip


def compilers(card: str) -> Iterator[dict[str, Any]]:
  """The step of the example in docs/planning.md, by the card's compiler and by the CPU's."""
  params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
  batch = jax.ShapeDtypeStruct((8, 4096), jnp.float32)
  tx = lowmem.adamw(3e-4)

  def train_step(params, state, batch):
    grads = jax.grad(lambda p: jnp.mean((batch @ p["w"]) ** 2))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  planned = lowmem.plan(params, tx, step=train_step, args=(batch,), card=card)
  yield {"compiler": card, "device MB": planned.device_bytes / 10**6}
  lowered = jax.jit(train_step, donate_argnums=(0, 1)).lower(
    params, jax.eval_shape(tx.init, params), batch
  )
  of: Any = lowered.compile().memory_analysis()
  held = of.argument_size_in_bytes + of.output_size_in_bytes - of.alias_size_in_bytes
  yield {"compiler": "cpu", "device MB": (held + of.temp_size_in_bytes) / 10**6}


# Questions to the command, and what they are an example of.
ASKED = {
  "it fits": "plan llama-2-7b --memory 24GB --rank 64",
  "it does not; what would": "plan llama-2-7b --full --optim adamw --memory 80GB",
  "nothing fits": "plan llama-2-13b --memory 8GB",
  "compare": "compare llama-2-70b",
  "recommend": "recommend llama-2-13b --memory 24GB",
  "compiled, 7B": "plan llama-2-7b --card {card}",
  "compiled, 405B": "plan llama-3.1-405b --card {card}",
}


def seconds(card: str) -> Iterator[dict[str, Any]]:
  """How long the command takes as a process, imports included: the fastest of three."""
  for what, line in ASKED.items():
    command = [sys.executable, "-m", "optax_lowmem.qlora", *line.format(card=card).split()]
    taken = []
    for _ in range(3):
      begun = time.perf_counter()
      subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
      taken.append(time.perf_counter() - begun)
    yield {"question": what, "command": f"lowmem {line.format(card=card)}", "seconds": min(taken)}


SECTIONS: dict[str, Callable[[str], Iterator[dict[str, Any]]]] = {
  f.__name__: f
  for f in (figure8, lengths, full, masters, backward, devices, state, compilers, seconds)
}


# The tables of the pages: the head, and how a row is written.
_FULL = (
  "optimizer | weights | on the device, GB | of it weights | state | gradients, activations "
  "| on the host | fits 80GB",
  "{optimizer} | {weights} | {device GB:.1f} | {weights GB:.1f} | {state GB:.1f} "
  "| {temporaries GB:.1f} | {host GB:.1f} | {fits}",
)
TABLES = {
  "figure8": (
    "model | adapters | paper, GB | here, GB | of it base | adapters and state "
    "| gradients, activations | card | fits",
    "{model} | {adapters} | {paper GB} | {device GB:.2f} | {weights GB:.2f} | {trained GB:.2f} "
    "| {temporaries GB:.2f} | {memory} | {fits}",
  ),
  "lengths": ("tokens | GB | fits 24GB", "{tokens:,} | {device GB:.2f} | {fits}"),
  "full": _FULL,
  "masters": _FULL,
  "backward": (
    "model | optimizer | masters | tokens | on the device, GB | of it weights | state "
    "| gradients, activations | B/param | on the host, GB",
    "{model} | {optimizer} | {masters} | {tokens:,} | {device GB:.1f} | {weights GB:.1f} "
    "| {state GB:.1f} | {temporaries GB:.1f} | {B/param:.2f} | {host GB:.1f}",
  ),
  "devices": (
    "model | on each card, GB | of it base | fits 24GB",
    "{model} | {device GB:.2f} | {weights GB:.2f} | {fits}",
  ),
  "state": (
    "optimizer | device, GB | host, GB | B/param",
    "{optimizer} | {device GB:.2f} | {host GB:.2f} | {B/param:.3f}",
  ),
  "compilers": ("compiler | on the device, MB", "{compiler} | {device MB:.1f}"),
  "seconds": ("question | command | seconds", "{question} | `{command}` | {seconds:.1f}"),
}


def head(section: str) -> Iterator[str]:
  """The first lines of a section's table."""
  columns = TABLES[section][0]
  yield f"| {columns} |"
  yield "|---" * (columns.count(" | ") + 1) + "|"


def line(section: str, found: dict[str, Any]) -> str:
  """A row of a section as a line of its table."""
  values = found | {"fits": "yes" if found.get("fits") else "**no**"}
  values["trained GB"] = found.get("adapters GB", 0.0) + found.get("state GB", 0.0)
  return f"| {TABLES[section][1].format_map(values)} |"


def tables(found: dict[str, Any]) -> dict[str, list[str]]:
  """The lines of each section's table."""
  there = [name for name in SECTIONS if name in found]
  return {name: [*head(name), *(line(name, row) for row in found[name])] for name in there}


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--card", default="h100")
  parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS))
  parser.add_argument("--json", help="file to write the result to")
  args = parser.parse_args()
  found: dict[str, Any] = {"card": args.card}
  for name in args.only:
    print(f"\n### {name}: {SECTIONS[name].__doc__}\n", flush=True)
    rows = found[name] = []
    print("\n".join(head(name)), flush=True)
    for each in SECTIONS[name](args.card):
      rows.append(each)
      print(line(name, each), flush=True)
  write(args.json, found)


if __name__ == "__main__":
  main()
