"""Which codes should hold Adam's moments? Errors against float32 on real gradients, and cost.

python benchmarks/codebooks.py [--steps 300] [--lr 8e-3] [--elements 1048576] [--json FILE]

The transformer of train.py is trained in float32 and its gradients are kept. Two things are then
measured for each pair of codes, both as the relative error of Adam's update, elements that float32
does not move left out:

- one store: float32's own moments, stored once (after steps 20, 100, …, averaged);
- closed loop: Adam over the same gradients with its moments stored after every step, at the end.
  Codes that round to the nearest *stall* here: nu moves by 0.1 % a step, less than half a step of
  any 8-bit code, so only a block's scale follows. "log v" is the mean logarithm of stored nu over
  float32's, "rms" the norm of the update's error over that of the update, "v -> 0" the share of
  positive second moments that are zero.

An error above 10 counts as 10: a few elements whose mu is nearly zero would decide every mean.
Scales are float32, the largest magnitude of a block. Nu of the log codes is dithered unless its row
says nearest; power codes are rounded as `Power` says. Times are nanoseconds a parameter for both
moments, on one core; 4-bit codes are timed unpacked.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from _measure import seconds, write
from optax_lowmem._quantization.codebooks import Codebook, Log, Power, Table, get_codebook
from train import batches, init, loss_of, text

STEPS = (20, 100, 300)  # where one store is measured, and after the last
MIN_SIZE = 4096


@dataclasses.dataclass(frozen=True)
class Zeroed:
  """A code whose smallest value is zero instead."""

  code: Log

  def encode(self, r: jax.Array) -> jax.Array:
    return self.code.encode(r)

  def decode(self, codes: jax.Array) -> jax.Array:
    return jnp.where(codes == 0, 0.0, self.code.decode(codes))


@dataclasses.dataclass(frozen=True)
class Linear:
  """Values least / steps, …, 1; `least` is -steps if signed, 1 for a code without zero, or 0."""

  steps: int
  least: int

  def encode(self, r: jax.Array) -> jax.Array:
    return (jnp.maximum(jnp.round(r * self.steps), self.least) - self.least).astype(jnp.uint8)

  def decode(self, codes: jax.Array) -> jax.Array:
    return (codes.astype(jnp.float32) + self.least) / self.steps


@dataclasses.dataclass(frozen=True)
class Held:
  """One moment: its code and its block."""

  code: Codebook | Linear | Zeroed
  bits: int
  block: int

  def encode(self, x: jax.Array, old: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    blocks = x.reshape(-1, self.block)
    scales = jnp.abs(blocks).max(-1, keepdims=True)
    if isinstance(self.code, Power):
      old = None if old is None else old.reshape(blocks.shape)
      return self.code.encode_blocks(blocks, scales, old), scales
    return self.code.encode(jnp.where(scales > 0, blocks / scales, 0.0)), scales

  def decode(self, stored: tuple[jax.Array, jax.Array]) -> jax.Array:
    codes, scales = stored
    return (self.code.decode(codes) * scales).reshape(-1)

  def __call__(self, x: jax.Array, old: jax.Array | None = None) -> jax.Array:
    return self.decode(self.encode(x, old))


def rows() -> dict[str, tuple[Held, Held]]:
  """What is compared: how mu and nu are held."""
  mu8, mu4, nf4 = map(get_codebook, ("log8", "log4", "nf4"))

  def power(bits, mu, nu, mu_still, nu_still, block=64):
    return books(
      Power("mu", bits, True, mu, mu_still), Power("nu", bits, False, nu, nu_still), bits, block
    )

  even, bent = (16, 0, 16), (32, 6, 4)  # one slope, two slopes
  even4, bent4 = (2, 0, 2), (2, 4, 1)
  halves = [np.linspace(0.1, 1, 2**i + 1) for i in range(3)]
  positive = np.concatenate([10.0**i * (e[1:] + e[:-1]) / 200 for i, e in enumerate(halves)])
  dynamic4 = Table("dynamic4", 4, True, (*-positive[::-1], 0.0, *positive, 1.0))

  def books(signed, unsigned, bits, block):
    return Held(signed, bits, block), Held(unsigned, bits, block)

  def log8(nu, block=64, mu=mu8, dithered=True, zero=False):
    code = Log("nu", 8, False, *nu, dithered=dithered)
    return books(mu, Zeroed(code) if zero else code, 8, block)

  def log4(nu, mu=mu4, dithered=True):
    return books(mu, Log("nu", 4, False, *nu, dithered=dithered), 4, 64)

  dynamic = get_codebook("dynamic"), get_codebook("dynamic_unsigned")
  return {
    "power: the default": power(8, 0.75, 1.0, 0.5, 0.5),
    "power, mu between square and fourth power": power(8, 0.5, 1.0, 0.5, 0.5),
    "power, all fourth": power(8, 1.0, 1.0, 0.5, 0.5),
    "power, rounded to the nearest": power(8, 0.75, 1.0, 0.0, 0.0),
    "power, rounded at random": power(8, 0.75, 1.0, np.inf, np.inf),
    "power, block 32": power(8, 0.75, 1.0, 0.5, 0.5, 32),
    "power, block 128": power(8, 0.75, 1.0, 0.5, 0.5, 128),
    "4 bits: power: the default": power(4, 0.0, 0.75, 0.25, 0.5),
    "4 bits: power, rounded to the nearest": power(4, 0.0, 0.75, 0.0, 0.0),
    "4 bits: power, rounded at random": power(4, 0.0, 0.75, np.inf, np.inf),
    "4 bits: power, block 32": power(4, 0.0, 0.75, 0.25, 0.5, 32),
    "dynamic, block 256 (bitsandbytes)": books(*dynamic, 8, 256),
    "dynamic, block 64": books(*dynamic, 8, 64),
    "linear, block 256": books(Linear(127, -127), Linear(255, 0), 8, 256),
    "nu one slope, nearest": log8(even, dithered=False),
    "nu one slope": log8(even),
    "nu one slope, with a zero": log8(even, zero=True),
    "nu two slopes, nearest": log8(bent, dithered=False),
    **{f"nu two slopes, block {n}": log8(bent, n) for n in (32, 64, 128, 256)},
    "nu two slopes, with more reach": log8((16, 10, 4)),
    "nu two slopes, with less reach": log8((32, 5, 8)),
    "nu two slopes, mu dithered too": log8(bent, mu=dataclasses.replace(mu8, dithered=True)),
    "nu two slopes, mu with more reach": log8(bent, mu=Log("mu", 8, True, 16, 6, 4)),
    "nu two slopes, mu finer near the largest": log8(bent, mu=Log("mu", 8, True, 32, 3, 4)),
    "4 bits, block 128 (torchao)": books(dynamic4, Linear(16, 1), 4, 128),
    "4 bits: log / one slope, nearest": log4(even4, dithered=False),
    "4 bits: log / one slope": log4(even4),
    "4 bits: log / two slopes": log4(bent4),
    "4 bits: nf4 / one slope": log4(even4, nf4),
    "4 bits: nf4 / two slopes": log4(bent4, nf4),
  }


def record(steps: int, lr: float) -> jax.Array:
  """Gradients of a float32 training run, (steps, parameters), small arrays left out."""
  tokens = jnp.asarray(batches(text()[0], steps, seed=0))
  tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, lr, 60, 600))

  def step(carry, batch):
    params, state = carry
    grads = jax.grad(loss_of)(params, batch)
    updates, state = tx.update(grads, state, params)
    flat = [g.reshape(-1) for g in jax.tree.leaves(grads) if g.size >= MIN_SIZE]
    return (optax.apply_updates(params, updates), state), jnp.concatenate(flat)

  params = init(jax.random.key(0))
  return jax.jit(functools.partial(jax.lax.scan, step))((params, tx.init(params)), tokens)[1]


def errors(u: jax.Array, v: jax.Array, stored_u: jax.Array, stored_v: jax.Array):
  """The columns of one comparison."""
  e = jnp.minimum(jnp.abs(stored_u - u) / jnp.where(u == 0, jnp.nan, jnp.abs(u)), 10.0)
  both = (v > 0) & (stored_v > 0)
  return {
    "mean": jnp.nanmean(e),
    "median": jnp.nanmedian(e),
    "p99": jnp.nanquantile(e, 0.99),
    "rms": jnp.linalg.norm(stored_u - u) / jnp.linalg.norm(u),
    "v_to_0": jnp.mean((v > 0) & (stored_v == 0)),
    "log_v": jnp.nanmean(jnp.where(both, jnp.log(stored_v / v), jnp.nan)),
  }


def compare(grads: jax.Array, mu: Held, nu: Held) -> dict[str, dict[str, float]]:
  """Errors of one store, averaged over `STEPS`, and those of the closed loop at its end."""
  marks = sorted({s for s in STEPS if s < len(grads)} | {len(grads)})

  def ema(m, v, g):
    return 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g

  def step(carry, g):
    (m, v), (stored_m, stored_v) = carry
    new_m, new_v = ema(stored_m, stored_v, g)
    return (ema(m, v, g), (mu(new_m, stored_m), nu(new_v, stored_v))), None

  @jax.jit
  def everything(grads):
    zero = jnp.zeros(grads.shape[1])
    carry, stores, loop, at = ((zero, zero), (zero, zero)), [], None, 0
    for mark in marks:
      carry, _ = jax.lax.scan(step, carry, grads[at:mark])
      (m, v), stored = carry
      at = mark

      def update(m, v, t=mark):
        return m / (1 - 0.9**t) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)

      stores.append(errors(update(m, v), v, update(mu(m), nu(v)), nu(v)))
      loop = errors(update(m, v), v, update(*stored), stored[1])
    return jax.tree.map(lambda *x: sum(x) / len(x), *stores), loop

  one, loop = jax.tree.map(float, everything(grads))
  return {"one_store": one, "closed_loop": loop}


def cost(mu: Held, nu: Held, elements: int) -> dict[str, float]:
  """Nanoseconds a parameter to encode and to decode both moments."""
  m = 1e-3 * jax.random.normal(jax.random.key(0), (elements,))
  v = m * m
  encode = jax.jit(lambda m, v: (mu.encode(m), nu.encode(v)))
  decode = jax.jit(lambda m, v: (mu.decode(m), nu.decode(v)))
  stored = encode(m, v)
  runs = {"encode_ns": lambda: encode(m, v), "decode_ns": lambda: decode(*stored)}
  return {name: 1e9 / elements * seconds(run, 15)["min"] for name, run in runs.items()}


HEAD = [
  "| | B/param | one store: mean | median | p99 | closed loop: mean | median | p99 "
  "| rms | log v | v -> 0 | encode | decode |",
  "|---" * 13 + "|",
]


def line(name: str, r: dict[str, Any]) -> str:
  """A format as a line of the table."""
  cells = [f"{r['bytes']:.3f}"]
  cells += [f"{r['one_store'][c]:.4f}" for c in ("mean", "median", "p99")]
  cells += [f"{r['closed_loop'][c]:.3f}" for c in ("mean", "median", "p99", "rms", "log_v")]
  cells += [f"{100 * r['closed_loop']['v_to_0']:.2f} %"]
  cells += [f"{r[c]:.2f} ns" for c in ("encode_ns", "decode_ns")]
  return f"| {name} | {' | '.join(cells)} |"


def tables(found: dict[str, Any]) -> dict[str, list[str]]:
  """The lines of the table."""
  return {"moments": [*HEAD, *(line(*one) for one in found["rows"].items())]}


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--steps", type=int, default=300, help="steps that are recorded")
  parser.add_argument("--lr", type=float, default=8e-3, help="peak learning rate of the recording")
  parser.add_argument("--elements", type=int, default=2**20, help="size that is timed")
  parser.add_argument("--json", help="also write the result to this file")
  args = parser.parse_args()
  if hasattr(os, "sched_setaffinity"):  # before the backend makes its threads, which inherit it
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

  grads = record(args.steps, args.lr)
  print(f"{args.steps} recorded steps, {grads.shape[1]:,} parameters, peak lr {args.lr}\n")
  print(*HEAD, sep="\n")
  results = {}
  for name, (mu, nu) in rows().items():
    r: dict[str, Any] = (
      compare(grads, mu, nu)
      | cost(mu, nu, args.elements)
      | {"bytes": sum(h.bits / 8 + 4 / h.block for h in (mu, nu))}
    )
    results[name] = r
    print(line(name, r), flush=True)
  write(args.json, {"steps": args.steps, "lr": args.lr, "rows": results})


if __name__ == "__main__":
  main()
