"""What programs become that are compiled for an accelerator which is not here.

    python benchmarks/accelerator.py [--card h100] [--only one step] [--json results/….json]

XLA's own compiler answers, without the device: buffers, launches, bytes moved, copies. Times it
cannot tell. Needs jax's CUDA plugins, or `libtpu` for ``--card v5e``: docs/accelerators.md.

Sections: `one` (update and apply of one array), `step` (a training step, gradients from a backward
pass), `compile` (time to compile many arrays), `paged`, `norms`, `qlora`; and on eight cards
`devices`, `paged_devices`, `qlora_devices`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

if __name__ == "__main__":
  os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowmem as lowmem
from _measure import write
from compiled import CARDS, Compiled, compile_for, mesh_of, missing
from compiled.steps import CUTS, apply_step, backward, cut_step, parameters, training_step

MIB = 1 << 20
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
DYNAMIC = {
  "mu": lowmem.Blockwise("dynamic", 256),
  "nu": lowmem.Blockwise("dynamic_unsigned", 256),
}
RULES: dict[str, Callable[[], optax.GradientTransformation]] = {
  "optax.adamw": lambda: optax.adamw(1e-3),
  "adamw, 8 bits": lambda: lowmem.adamw(1e-3),
  "adamw, 4 bits": lambda: lowmem.adamw(1e-3, bits=4),
  "lion, 8 bits": lambda: lowmem.lion(1e-3),
  "sgd, 8 bits": lambda: lowmem.sgd(1e-3, momentum=0.9),
  "rmsprop, 8 bits": lambda: lowmem.rmsprop(1e-3),
  "adagrad, 8 bits": lambda: lowmem.adagrad(1e-3),
  "ademamix, 8 bits": lambda: lowmem.ademamix(1e-3),
  "ademamix, 4 bits": lambda: lowmem.ademamix(1e-3, bits=4),
  "adamw, dynamic map": lambda: lowmem.quantized(optax.adamw(1e-3), storage=DYNAMIC),
}
NORMED: dict[str, Callable[[], optax.GradientTransformation]] = {
  "optax.adafactor": lambda: optax.adafactor(1e-3),
  "optax.adafactor, momentum": lambda: optax.adafactor(1e-3, momentum=0.9),
  "adafactor, 8 bits": lambda: lowmem.adafactor(1e-3, momentum=0.9),
  "came, 8 bits": lambda: lowmem.came(1e-3),
  "came, 4 bits": lambda: lowmem.came(1e-3, bits=4),
  "optax.lamb": lambda: optax.lamb(1e-3),
  "lamb, 8 bits": lambda: lowmem.lamb(1e-3),
  "optax.lars": lambda: optax.lars(1e-3),
  "lars, 8 bits": lambda: lowmem.lars(1e-3),
}
Rows = Iterator[dict[str, Any]]


def one(card: str, rules: dict[str, Any]) -> Rows:
  """Update and apply of one array of 4096 x 4096, all donated.

  A gradient that is an argument, even if donated, is copied before a kernel can leave the update in
  its place: 8 B/param of traffic and 4 of temporaries in float32 that no training step has.
  """
  for dtype, kind in DTYPES.items():
    params = parameters(1, 4096, kind)
    cases = list(rules.items())
    if "optax.adamw" in rules:
      cases.append(("adamw, 8 bits, no kernel", rules["adamw, 8 bits"]))
    for name, make in cases:
      with lowmem.kernels.using("xla" if "no kernel" in name else "auto"):
        yield row(name, dtype, compile_for(*apply_step(make(), params), card=card), 4096**2)


def step(card: str, rules: dict[str, Any], rows: int = 256) -> Rows:
  """A training step of 16 matrices of 2048 x 2048; traffic without that of the backward pass."""
  for dtype, kind in DTYPES.items():
    params, size = parameters(16, 2048, kind), 16 * 2048**2
    behind = compile_for(*backward(params, rows), card=card).traffic
    for name, make in rules.items():
      compiled = compile_for(*training_step(make(), params, rows), card=card)
      found = row(name, dtype, compiled, size)
      found["hbm"] -= behind.hbm / size
      found["kernels"] = (found["kernels"] - behind.kernels) / 16
      yield found


def compile_times(card: str, rules: dict[str, Any]) -> Rows:
  """Time to trace and compile update and apply of many arrays of 512 x 512, beside optax's."""
  compile_for(*apply_step(optax.adamw(1e-3), parameters(1, 512)), card=card)
  families = [
    ["optax.adamw", "adamw, 8 bits", "adamw, 4 bits", "adamw, 8 bits, no kernel"],
    ["optax.adafactor, momentum", "adafactor, 8 bits", "came, 8 bits"],
    ["optax.lamb", "lamb, 8 bits"],
  ]
  for count, family in [(60, f) for f in families] + [(300, families[0][:3])]:
    params, reference = parameters(count, 512), 0.0
    for name in family:
      make = (rules | NORMED)[name.removesuffix(", no kernel")]
      with lowmem.kernels.using("xla" if "no kernel" in name else "auto"):
        found = [compile_for(*apply_step(make(), params), card=card) for _ in range(2)]
      seconds = min(c.seconds for c in found)
      reference = reference or seconds
      yield {"rule": name, "arrays": count, "seconds": seconds, "ratio": seconds / reference}


def paged(card: str, rules: dict[str, Any]) -> Rows:
  """A training step whose state is stored in host memory, beside the same step without."""
  bound = 32 * MIB
  names = ("optax.adamw", "adamw, 8 bits", "adamw, 4 bits", "came, 8 bits")
  cases = [(16, 2048, d, n) for d in DTYPES for n in names]
  cases += [(4, 4096, d, n) for d in DTYPES for n in names if "4 bits" not in n]
  cases += [(1, 16384, "float32", n) for n in names if "4 bits" not in n]
  for count, width, dtype, name in cases:
    make = (rules | NORMED)[name]
    params = parameters(count, width, DTYPES[dtype])
    plain = compile_for(*training_step(make(), params), card=card)
    tx = lowmem.offloaded(make(), max_bytes=bound)
    state = tx.init({k: jnp.zeros(p.shape, p.dtype) for k, p in params.items()})
    held = lowmem.state_bytes(state)["pinned_host"]
    compiled = compile_for(*training_step(tx, params, state=state), card=card)
    yield {
      "rule": name,
      "dtype": dtype,
      "matrices": f"{count} of {width}",
      "without": plain.device_bytes,
      "paged": compiled.device_bytes,
      "bound": plain.device_bytes - held + bound,
      "host": compiled.host_argument_bytes,
      "host_temporaries": compiled.host_temp_bytes,
      "host_compute": len(compiled.traffic.host_compute),
      "seconds": compiled.seconds,
      "seconds without": plain.seconds,
    }


def paged_devices(card: str, rules: dict[str, Any]) -> Rows:
  """Eight cards, 8 matrices of 2048 x 2048, `max_bytes` of 4 MiB: what each card holds."""
  if jax.device_count() < 8:
    yield from with_eight_devices(card, "paged_devices")
    return
  cases = [(n, AxisType.Explicit) for n in ("optax.adamw", "optax.lamb")]
  for name, kind in [*cases, ("optax.adamw", AxisType.Auto)]:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))  # of CPUs, which have host memory
    for axes, spec in (("rows", PartitionSpec("x")), ("columns", PartitionSpec(None, "x"))):
      where = NamedSharding(mesh, spec)
      params = {k: jax.device_put(jnp.ones(p.shape), where) for k, p in parameters(8, 2048).items()}
      plain = (rules | NORMED)[name]()
      found = []
      for tx in (plain, lowmem.offloaded(plain, max_bytes="4MiB")):

        def step(params, state, tx=tx):
          updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
          return optax.apply_updates(params, updates), state

        found.append(compile_for(step, (params, tx.init(params)), (0, 1), card=card, count=8))
      yield {
        "rule": name,
        "mesh": kind.name,
        "cut along": axes,
        "without": found[0].device_bytes,
        "paged": found[1].device_bytes,
        "collectives": found[1].traffic.collectives,
      }


def norms(card: str, rules: dict[str, Any]) -> Rows:
  """Rules that take norms: one array, and the training step."""
  for found in one(card, NORMED):
    yield {"program": "one array"} | found
  for found in step(card, NORMED):
    yield {"program": "step"} | found


def devices(card: str, rules: dict[str, Any]) -> Rows:
  """Eight cards: update and apply of a stack of 8 x 1024 x 2048, cut along its axes."""
  if jax.device_count() < 8:
    yield from with_eight_devices(card, "devices")
    return
  for name in ("optax.adamw", "adamw, 8 bits", "adamw, 4 bits", "came, 8 bits"):
    tx = (rules | NORMED)[name]()
    for kind in (AxisType.Auto, AxisType.Explicit):
      for axes, (sizes, names, spec) in CUTS.items():
        mesh = mesh_of(card, sizes, names, kind)
        with jax.set_mesh(mesh):
          compiled = compile_for(*cut_step(tx, mesh, spec), card=card, count=8)
        yield {
          "rule": name,
          "mesh": kind.name,
          "cut along": axes,
          "device_bytes": compiled.device_bytes,
          "kernels": compiled.kernels,
          "collectives": compiled.traffic.collectives,
        }


def qlora_devices(card: str, rules: dict[str, Any]) -> Rows:
  """The step of `lowmem finetune` on eight cards: a row of 512 tokens each, 16-bit adapters."""
  if jax.device_count() < 8:
    yield from with_eight_devices(card, "qlora_devices")
    return
  from accelerator_qlora import MODELS, on_eight_cards, training_step

  mesh = mesh_of(card, (8,), ("data",), AxisType.Auto)
  for name, in_parts in (("7B", False), ("7B", True), ("65B", True)):
    one = training_step(MODELS[name], 512, rows=8, adapter_dtype="bfloat16")
    compiled = compile_for(*on_eight_cards(one, mesh, in_parts), card=card, count=8)
    yield {
      "model": name,
      "each card holds": "a part of the base" if in_parts else "all of the base",
      "device GiB": compiled.device_bytes / 2**30,
      "temporaries GiB": compiled.temp_bytes / 2**30,
      "collectives": compiled.traffic.collectives,
    }


def with_eight_devices(card: str, section: str) -> Rows:
  """The rows of a section, from a process that has eight: updates are cut only where there are."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, __file__, "--card", card, "--only", section]
    command += ["--json", f"{folder}/rows.json"]
    env = os.environ | {"XLA_FLAGS": flags}
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    yield from json.loads(pathlib.Path(folder, "rows.json").read_text())[section]


def qlora(card: str, rules: dict[str, Any]) -> Rows:
  """The training step of `lowmem finetune`, rank 64 on all linear layers."""
  from accelerator_qlora import rows

  yield from rows(lambda fn, args, donate: compile_for(fn, args, donate, card=card))


SECTIONS = {
  "one": one,
  "step": step,
  "compile": compile_times,
  "paged": paged,
  "paged_devices": paged_devices,
  "norms": norms,
  "devices": devices,
  "qlora": qlora,
  "qlora_devices": qlora_devices,
}
ON_TPU = ("one", "step", "norms")


def row(name: str, dtype: str, compiled: Compiled, size: int) -> dict[str, Any]:
  return {
    "rule": name,
    "dtype": dtype,
    "device_bytes": compiled.device_bytes,
    "temporaries": compiled.temp_bytes / size,
    "hbm": compiled.traffic.hbm / size,
    "kernels": compiled.kernels,
    "seconds": compiled.seconds,
  }


def written(key: str, value: Any) -> str:
  if isinstance(value, dict):
    return ", ".join(f"{n} {k}" for k, n in value.items()) or "none"
  if key.endswith("bytes") or key in ("without", "paged", "bound", "host", "host_temporaries"):
    return f"{value / MIB:,.0f} MiB"
  if isinstance(value, float):
    return f"{value:.2f}"
  return str(value)


def line(found: dict[str, Any]) -> str:
  """A row as a line of its section's table."""
  return "| " + " | ".join(written(k, v) for k, v in found.items()) + " |"


def tables(result: dict[str, Any]) -> dict[str, list[str]]:
  """The lines of each section's table."""
  return {
    name: [*head(result[name][0]), *map(line, result[name])] for name in SECTIONS if name in result
  }


def head(found: dict[str, Any]) -> list[str]:
  """The first lines of the table of such rows."""
  return [f"| {' | '.join(found)} |", "|---" * len(found) + "|"]


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--card", default="h100", help=f"{', '.join(CARDS)}, or a TPU such as v5e")
  parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections to run")
  parser.add_argument("--json", help="file to write the result to")
  args = parser.parse_args()
  if reason := missing(args.card):
    sys.exit(f"To compile for {args.card!r}, install {reason}.")
  known = list(SECTIONS) if args.card in CARDS else list(ON_TPU)
  result: dict[str, Any] = {"card": args.card}
  for name in args.only or known:
    section = SECTIONS[name]
    print(f"\n### {name}: {section.__doc__.splitlines()[0]}\n", flush=True)
    result[name] = []
    for found in section(args.card, RULES):
      if not result[name]:
        print(*head(found), sep="\n")
      result[name].append(found)
      print(line(found), flush=True)
  write(args.json, result)


if __name__ == "__main__":
  main()
