"""Does quantized state train as well as float32? A small transformer on real text, seed by seed.

python benchmarks/train.py [factored] [--steps 800] [--seeds 3] [--json FILE] [--plot FILE.svg]

A byte-level causal transformer (2 layers, width 64, 137,000 parameters) learns the Chit-Chat
dialogues, the default data of the QLoRA example. Each seed draws one initialization and one order
of batches, which all optimizers share. The loss is that of 64 held-out batches.

Training is chaotic: any disturbance, however small, ends at another loss. How far that goes is
measured by a control: float32 with every element of a gradient off by 2 % at random.

With `factored`, the optimizers with factored second moments are compared instead, each at its own
learning rate: `--sweep` prints the loss of the first seed at seven of them.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_lowmem as lowmem
from _measure import write

WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 64, 2, 4, 64, 16
LR = 4e-3
POINTS = 40  # of a curve
# Learning rates by `LR`. That of CAME is the best of `--sweep`, those of the others are half of
# theirs, where training is not chaotic. CAME's is small: its confidence starts at zero and is not
# corrected, so after t steps it takes steps 1 / sqrt(1 - b3^t) times as large, 5 times after 400.
BEST = {"adamw": 1.0, "adafactor": 1.0, "came": 0.125, "debiased": 0.5}


def optimizers(steps: int, peak: float) -> dict[str, optax.GradientTransformation]:
  """What is compared; the first is the reference."""
  lr = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
  dynamic = {
    "mu": lowmem.Blockwise("dynamic", 256),
    "nu": lowmem.Blockwise("dynamic_unsigned", 256),
  }

  def disturb(updates, state, params=None):
    del params
    leaves, treedef = jax.tree.flatten(updates)
    state, *keys = jax.random.split(state, len(leaves) + 1)
    noise = (jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True))
    return treedef.unflatten(x * (1 + 0.02 * n) for x, n in zip(leaves, noise, strict=True)), state

  disturbed = optax.GradientTransformation(lambda params: jax.random.key(0), disturb)
  return {
    "optax.adamw": optax.adamw(lr),
    "control: gradients off by 2 %": optax.chain(disturbed, optax.adamw(lr)),
    "adamw, 8 bits": lowmem.adamw(lr),
    "adamw, 4 bits": lowmem.adamw(lr, bits=4),
    "adamw, dynamic map": lowmem.quantized(optax.adamw(lr), storage=dynamic),
  }


def factored(
  steps: int, peak: float, factors: Mapping[str, float] = BEST
) -> dict[str, optax.GradientTransformation]:
  """The optimizers with factored second moments, each at a factor of the learning rate."""

  def lr(name, times=1):
    largest = times * peak * factors[name]
    return optax.warmup_cosine_decay_schedule(0.0, largest, steps // 10, steps)

  adafactor = functools.partial(
    lowmem.adafactor,
    lr("adafactor"),
    min_dim_size_to_factor=32,
    multiply_by_parameter_scale=False,
  )
  came = functools.partial(lowmem.came, lr("came"))
  debiased = functools.partial(lowmem.came, lr("debiased"), debias=True)
  return {
    "optax.adamw": optax.adamw(lr("adamw")),
    "adamw, 8 bits": lowmem.adamw(lr("adamw")),
    "adafactor, no momentum": adafactor(),
    "adafactor, 32 bits": adafactor(momentum=0.9, bits=32),
    "adafactor, 8 bits": adafactor(momentum=0.9),
    "came, 32 bits": came(bits=32),
    "came, 8 bits": came(),
    "came, 4 bits": came(bits=4),
    "came, debiased, 32 bits": debiased(bits=32),
    "came, debiased, 8 bits": debiased(),
    "optax.adamw, at twice the rate": optax.adamw(lr("adamw", 2)),
    "came, debiased, at twice the rate": lowmem.came(lr("debiased", 2), debias=True),
  }


def sweep(steps: int, peak: float) -> None:
  """Prints the loss of the first seed at several learning rates, with 32-bit state."""
  factors = (0.03, 0.06, 0.125, 0.25, 0.5, 1.0, 2.0)
  learn, held = text()
  tokens, held_tokens = batches(learn, steps, 0), batches(held, 64, seed=10_000)
  print(f"| by {peak:g} | " + " | ".join(f"{f:g}" for f in factors) + " |")
  print("|---|" + "---|" * len(factors))
  for name in ("optax.adamw", "adafactor, 32 bits", "came, 32 bits", "came, debiased, 32 bits"):
    losses = []
    for f in factors:
      tx = factored(steps, peak, dict.fromkeys(BEST, f))[name]
      curve, _ = train(tx, init(jax.random.key(0)), tokens, held_tokens, steps // POINTS)
      losses.append(f"{curve[-1]:.4f}")
    print(f"| {name} | {' | '.join(losses)} |", flush=True)


def text() -> tuple[np.ndarray, np.ndarray]:
  """Bytes to learn from, and bytes held out."""
  from optax_lowmem.qlora.files.fetch import default_data

  rows = [json.loads(line) for line in default_data().read_text("utf-8").splitlines()]
  lines = "\n\n".join("\n".join(m["content"] for m in row["messages"]) for row in rows)
  data = np.frombuffer(lines.encode(), np.uint8)
  cut = len(data) * 9 // 10
  return data[:cut], data[cut:]


def init(key: jax.Array, width: int = WIDTH, layers: int = LAYERS) -> dict[str, jax.Array]:
  """The transformer's parameters, its layers stacked."""
  keys = iter(jax.random.split(key, 8))

  def matrix(*shape):
    return jax.random.normal(next(keys), shape) / np.sqrt(shape[-2])

  return {
    "embed": 0.02 * jax.random.normal(next(keys), (256, width)),
    "position": 0.02 * jax.random.normal(next(keys), (CONTEXT, width)),
    "qkv": matrix(layers, width, 3 * width),
    "out": matrix(layers, width, width),
    "up": matrix(layers, width, 4 * width),
    "down": matrix(layers, 4 * width, width),
    "norms": jnp.ones((layers, 2, width)),
    "head": matrix(width, 256),
  }


def loss_of(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
  """Mean next-byte cross-entropy of (batch, context + 1) tokens."""

  def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale

  def layer(x, p):
    q, k, v = jnp.split(norm(x, p["norms"][0]) @ p["qkv"], 3, -1)
    heads = (*x.shape[:-1], HEADS, x.shape[-1] // HEADS)
    q, k, v = (a.reshape(heads) for a in (q, k, v))
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + attended.reshape(x.shape) @ p["out"]
    return x + jax.nn.gelu(norm(x, p["norms"][1]) @ p["up"]) @ p["down"], None

  x = params["embed"][tokens[:, :-1]] + params["position"]
  stacked = {k: params[k] for k in ("qkv", "out", "up", "down", "norms")}
  x, _ = jax.lax.scan(layer, x, stacked)
  logits = norm(x, 1.0) @ params["head"]
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def batches(data: np.ndarray, count: int, seed: int) -> np.ndarray:
  """(count, batch, context + 1) tokens from random places."""
  starts = np.random.default_rng(seed).integers(0, len(data) - CONTEXT - 1, (count, BATCH))
  return data[starts[..., None] + np.arange(CONTEXT + 1)].astype(np.int32)


class Fitted(NamedTuple):
  """What training ends with.

  Attributes:
    params: the parameters.
    state: the optimizer's.
    curve: the held-out loss along the way.
  """

  params: Any
  state: Any
  curve: list[float]


def fit(
  tx: optax.GradientTransformation,
  params: Any,
  tokens: Any,
  held: Any,
  every: int,
  loss_of: Callable[[Any, Any], jax.Array] = loss_of,
) -> Fitted:
  """Trains over batches that are stacked; measures on stacked `held` after every `every` steps."""

  def step(carry, batch):
    params, state = carry
    grads = jax.grad(loss_of)(params, batch)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  @functools.partial(jax.jit, donate_argnums=0)
  def stretch(carry, tokens, held):
    carry, _ = jax.lax.scan(step, carry, tokens)
    weights: Any = carry[0]
    return carry, jax.lax.map(functools.partial(loss_of, weights), held).mean()

  carry, curve = (params, tx.init(params)), []
  for start in range(0, len(jax.tree.leaves(tokens)[0]), every):
    part = jax.tree.map(lambda x, start=start: x[start : start + every], tokens)
    carry, loss = stretch(carry, part, held)
    curve.append(float(loss))
  return Fitted(carry[0], carry[1], curve)


def train(tx: optax.GradientTransformation, params, tokens, held, every: int):
  """Trains the transformer over (steps, batch, context + 1) tokens.

  Returns:
    The held-out loss after every `every` steps, and the last state.
  """
  done = fit(tx, params, tokens, held, every)
  return done.curve, done.state


def run(
  steps: int, seeds: int, peak: float = LR, compared: Callable[..., Any] = optimizers
) -> dict[str, list[list[float]]]:
  """Held-out loss by optimizer and seed, along the way."""
  learn, held = text()
  held_tokens = batches(held, 64, seed=10_000)
  result: dict[str, list[list[float]]] = {}
  print(f"{steps} steps of {BATCH} x {CONTEXT} bytes, {seeds} seeds\n")
  print("| | held-out loss, by seed | against float32, by seed | mean | state |")
  print("|---|---|---|---|---|")
  for name, tx in compared(steps, peak).items():
    curves, held_bytes = [], 0
    for seed in range(seeds):
      tokens = batches(learn, steps, seed)
      curve, state = train(tx, init(jax.random.key(seed)), tokens, held_tokens, steps // POINTS)
      curves.append(curve)
      held_bytes = sum(lowmem.state_bytes(state).values())
    result[name] = curves
    print(f"{line(name, result)} {held_bytes / 1e6:.2f} MB |", flush=True)
  return result


def line(name: str, curves: dict[str, list[list[float]]]) -> str:
  """An optimizer as a line of the table, but for its last column, the bytes of its state."""
  last, first = (np.array(c)[:, -1] for c in (curves[name], next(iter(curves.values()))))
  change = 100 * (last / first - 1)
  by_seed = f"{', '.join(f'{x:.4f}' for x in last)} | {', '.join(f'{x:+.2f}' for x in change)} %"
  return f"| {name} | {by_seed} | {change.mean():+.2f} % |"


def tables(found: dict[str, Any]) -> dict[str, list[str]]:
  """The lines of the table, each but for its last column."""
  curves = found["held_out_loss"]
  return {"losses": [line(name, curves) for name in curves]}


def plot(path: str, steps: int, result: dict[str, list[list[float]]]) -> None:
  """Draws the curves, one line an optimizer and seed."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  at = np.arange(1, POINTS + 1) * (steps // POINTS)
  figure, (whole, end) = plt.subplots(1, 2, figsize=(10, 4))
  for color, (name, curves) in enumerate(result.items()):
    for seed, curve in enumerate(curves):
      label = name if seed == 0 else None
      for axes, part in ((whole, slice(None)), (end, slice(POINTS * 3 // 4, None))):
        axes.plot(at[part], curve[part], f"C{color}", lw=0.9, alpha=0.8, label=label)
  whole.set(xlabel="step", ylabel="held-out loss, nats a byte", yscale="log")
  end.set(xlabel="step", title="the last quarter")
  whole.legend(frameon=False)
  figure.tight_layout()
  figure.savefig(path, metadata={"Date": None})
  print(f"\ndrawn in {path}")


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("what", nargs="?", choices=("quantized", "factored"), default="quantized")
  parser.add_argument("--sweep", action="store_true", help="of `factored`: learning rates")
  parser.add_argument("--steps", type=int, default=800, help=f"a multiple of {POINTS}")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--lr", type=float, default=LR, help="largest learning rate")
  parser.add_argument("--json", help="also write the result to this file")
  parser.add_argument("--plot", help="also draw the curves in this file; needs matplotlib")
  args = parser.parse_args()
  if args.steps < POINTS or args.steps % POINTS:
    parser.error(f"--steps must be a positive multiple of {POINTS}, got {args.steps}")
  if args.sweep:
    return sweep(args.steps, args.lr)
  compared = factored if args.what == "factored" else optimizers
  result = run(args.steps, args.seeds, args.lr, compared)
  write(args.json, {"steps": args.steps, "learning_rate": args.lr, "held_out_loss": result})
  if args.plot:
    plot(args.plot, args.steps, result)


if __name__ == "__main__":
  main()
