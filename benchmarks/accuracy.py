"""How far quantized optimizers drift from float32, over many kinds of gradients.

python benchmarks/accuracy.py [--steps 50] [--json FILE]

For every rule, kind of gradient and form of the moments: the distance to the parameters of the
same rule with float32 moments, as a part of what those have travelled, after 2, 5, 20 and 50 steps;
after the first there is none. Beside our forms stand the formats of the peers, in the same rule and
all updated from unrounded moments: the dynamic map of bitsandbytes (8 bits, blocks of 256) and the
4 bits of torchao (blocks of 128). Where they are installed, the peers' own AdamW follow.

Gradients are noise, H (p - target), or both; those of `model` were recorded from the transformer of
train.py. *Reach*: of every 64 elements one has gradients r times the others'; how far the others
travel under Adam, of what they do in float32. *Weight*: the same, and the distances, for other
second moments in 4 bits.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_lowmem as lowmem
from _measure import write
from codebooks import record
from optax_lowmem._quantization.codebooks import Table
from optax_lowmem._quantization.power_codebook import Power

SHAPE = (256, 512)
AT = (1, 2, 5, 20, 50)
LR = 1e-2


class Kind(NamedTuple):
  """Gradients ``noise[t] + curvature * (p - target)``."""

  noise: jax.Array
  curvature: jax.Array
  target: jax.Array


def kinds(steps: int) -> dict[str, Kind]:
  """The gradients, by name."""
  keys = iter(jax.random.split(jax.random.key(0), 16))
  normal = jax.random.normal(next(keys), (steps, *SHAPE))
  signal = jax.random.normal(next(keys), SHAPE)
  lognormal = jnp.exp(jax.random.normal(next(keys), SHAPE))
  rows = jnp.exp(2 * jax.random.normal(next(keys), (SHAPE[0], 1)))
  columns = jnp.exp(2 * jax.random.normal(next(keys), (1, SHAPE[1])))
  rare = jax.random.uniform(next(keys), normal.shape) < 0.1
  heavy = jax.random.t(next(keys), 3.0, normal.shape)
  time = jnp.arange(1, steps + 1)[:, None, None]
  zero = jnp.zeros(SHAPE)

  def noise(x):
    return Kind(x, zero, zero)

  return {
    "independent normal": noise(normal),
    "with lognormal scales": noise(normal * lognormal),
    "0.3 of signal, 1 of noise": noise(normal + 0.3 * signal),
    "smooth (a quadratic)": Kind(jnp.zeros_like(normal), zero + 1, signal),
    "quadratic, curvature lognormal": Kind(jnp.zeros_like(normal), jnp.sqrt(lognormal), signal),
    "heavy tails (Student's t, 3)": noise(heavy),
    "one in ten": noise(normal * rare),
    "rows and columns of other scales": noise(normal * rows * columns),
    "falling by a tenth a step": noise(normal * jnp.exp(-time / 10)),
    "one in 64 is 100 times larger": noise(normal * outliers(100)),
    "model": noise(recorded(steps)),
  }


def outliers(ratio: float) -> jax.Array:
  """`ratio` in one element of 64, 1 elsewhere."""
  return jnp.where(jnp.arange(SHAPE[1]) % 64 == 0, ratio, 1.0) * jnp.ones(SHAPE)


@functools.cache
def recorded(steps: int) -> jax.Array:
  """Gradients of the transformer of train.py: of its first arrays, as many as fit."""
  return record(steps, 8e-3)[:, : SHAPE[0] * SHAPE[1]].reshape(steps, *SHAPE)


def rules() -> dict[str, optax.GradientTransformation]:
  """The rules, by name, with the defaults of their authors."""
  return {
    "adamw": optax.adamw(LR, weight_decay=0.0),
    "lion": optax.lion(LR, weight_decay=0.0),
    "rmsprop": optax.rmsprop(LR, decay=0.9),
    "adagrad": optax.adagrad(LR, initial_accumulator_value=0.0),
    "ademamix": optax.contrib.ademamix(LR, weight_decay=0.0),
    "sgd": optax.sgd(LR, momentum=0.9),
  }


def forms() -> dict[str, Callable[[Any], optax.GradientTransformation]]:
  """How moments are held, by name."""
  halves = [np.linspace(0.1, 1, 2**i + 1) for i in range(3)]
  positive = np.concatenate([10.0**i * (e[1:] + e[:-1]) / 200 for i, e in enumerate(halves)])
  signed = Table("signed", 4, True, (*-positive[::-1], 0.0, *positive, 1.0))
  unsigned = Table("unsigned", 4, False, tuple(np.arange(1, 17) / 16))

  def stored(first, second, block):
    first, second = (lowmem.Blockwise(book, block) for book in (first, second))
    fields = dict.fromkeys(("mu", "m1", "m2", "trace"), first)
    fields |= dict.fromkeys(("nu", "sum_of_squares"), second)

    def hold(rule):
      named = jax.tree_util.tree_leaves_with_path(jax.eval_shape(rule.init, jnp.zeros(SHAPE)))
      names = {getattr(key, "name", None) for path, _ in named for key in path}
      return lowmem.quantized(rule, storage={k: v for k, v in fields.items() if k in names})

    return hold

  return {
    "dynamic map (bitsandbytes)": stored("dynamic", "dynamic_unsigned", 256),
    "8 bits": lambda rule: lowmem.quantized(rule, 8),
    "torchao's 4 bits": stored(signed, unsigned, 128),
    "4 bits": lambda rule: lowmem.quantized(rule, 4),
  }


def runner(tx: optax.GradientTransformation) -> Callable[[Kind], jax.Array]:
  """The parameters after every step, from zero."""

  @jax.jit
  def run(kind):
    def step(carry, noise):
      p, state = carry
      updates, state = tx.update(noise + kind.curvature * (p - kind.target), state, p)
      p = optax.apply_updates(p, updates)
      return (p, state), p

    p = jnp.zeros(SHAPE)
    return jax.lax.scan(step, (p, tx.init(p)), kind.noise)[1]

  return run


def drift(found: np.ndarray, exact: np.ndarray) -> list[float]:
  """Distance by distance travelled, at the steps of `AT`; both distances are Euclidean."""
  at = [t for t in AT if t <= len(exact)]
  off = [np.linalg.norm(found[t - 1] - exact[t - 1]) for t in at]
  return [float(d / np.linalg.norm(exact[t - 1])) for d, t in zip(off, at, strict=True)]


def reach(
  ratio: float, signal: float, held: dict[str, Any] | None = None, steps: int = 100
) -> dict[str, float]:
  """How far elements travel beside one that has `ratio` times their gradients, by form."""
  keys = jax.random.split(jax.random.key(1), 2)
  noise = jax.random.normal(keys[0], (steps, *SHAPE))
  noise = (noise + signal * jax.random.normal(keys[1], SHAPE)) * outliers(ratio)
  kind = Kind(noise, jnp.zeros(SHAPE), jnp.zeros(SHAPE))
  others = np.asarray(outliers(ratio) == 1)

  def travelled(tx):
    return float(np.abs(np.asarray(runner(tx)(kind)[-1]))[others].sum())

  rule = optax.adam(LR)
  exact = travelled(rule)
  return {name: travelled(hold(rule)) / exact for name, hold in (held or forms()).items()}


def weights() -> Iterator[tuple[float, list[float], list[float]]]:
  """What the weight of the fourth power does to second moments in 4 bits.

  Yields the weight, the reach of Adam at r = 100 without a signal and with one, and the distance
  of AdamW from float32 after 50 steps for every kind of gradient.
  """
  gradients, rule = kinds(AT[-1]), rules()["adamw"]
  exact = {name: np.asarray(runner(rule)(kind)) for name, kind in gradients.items()}
  for weight in (0.75, 0.9, 0.95, 1.0):
    book = Power("nu", 4, False, fourth=weight)
    storage = {"mu": lowmem.Blockwise("power4"), "nu": lowmem.Blockwise(book)}
    hold = functools.partial(lowmem.quantized, storage=storage)
    run = runner(hold(rule))
    found = [drift(np.asarray(run(kind)), exact[name])[-1] for name, kind in gradients.items()]
    yield weight, [reach(100, signal, {"": hold})[""] for signal in (0.0, 1.0)], found


def peers() -> Iterator[tuple[str, Callable[[Any], Any]]]:
  """AdamW of the peers that are installed: name and optimizer of a list of parameters."""
  try:
    import torch  # noqa: F401
  except ImportError:
    return
  settings = {"lr": LR, "weight_decay": 0.0}
  try:
    import bitsandbytes

    yield "bitsandbytes AdamW8bit", lambda p: bitsandbytes.optim.AdamW8bit(p, **settings)
  except ImportError:
    pass
  try:
    import torchao.optim

    yield "torchao AdamW8bit", lambda p: torchao.optim.AdamW8bit(p, **settings)
    yield "torchao AdamW4bit", lambda p: torchao.optim.AdamW4bit(p, **settings)
  except ImportError:
    pass


def run_peer(make: Callable[[Any], Any], kind: Kind) -> np.ndarray:
  """The parameters after every step of an optimizer of PyTorch."""
  import torch

  p = torch.nn.Parameter(torch.zeros(SHAPE))
  optimizer, found = make([p]), []
  curvature, target = np.asarray(kind.curvature), np.asarray(kind.target)
  for noise in np.asarray(kind.noise):
    p.grad = torch.from_numpy(noise + curvature * (p.detach().numpy() - target))
    optimizer.step()
    found.append(p.detach().numpy().copy())
  return np.stack(found)


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--steps", type=int, default=50)
  parser.add_argument("--json", help="also write the result to this file")
  args = parser.parse_args()
  gradients, names = kinds(args.steps), list(forms())

  result: dict[str, Any] = {"drift": {}, "reach": {}, "weights": {}, "peers": {}}
  print(*head("rule", "gradients", *names), sep="\n")
  for rule_name, rule in rules().items():
    runs = {name: runner(hold(rule)) for name, hold in forms().items()}
    exact_run = runner(rule)
    for kind_name, kind in gradients.items():
      exact = np.asarray(exact_run(kind))
      row = {name: drift(np.asarray(run(kind)), exact) for name, run in runs.items()}
      result["drift"].setdefault(rule_name, {})[kind_name] = row
      print(line(rule_name, kind_name, *map(many, row.values())), flush=True)

  print("", *head("r", *names), sep="\n")
  for ratio in (100, 1000):
    for signal in (0.0, 1.0):
      row = result["reach"][f"{ratio}, {signal:g}"] = reach(ratio, signal)
      print(reached(f"{ratio}, {signal:g}", row), flush=True)

  print("", *head("w", "reach at r = 100, and with a signal", *WEIGHED), sep="\n")
  for weight, ends, found in weights():
    result["weights"][f"{weight:g}"] = {"reach": ends, "drift": found}
    print(weighed(f"{weight:g}", result), flush=True)

  exact_run = runner(rules()["adamw"])
  for name, make in peers():
    for kind_name, kind in gradients.items():
      found = drift(run_peer(make, kind), np.asarray(exact_run(kind)))
      result["peers"].setdefault(name, {})[kind_name] = found
      print(f"{name}, {kind_name}: {' '.join(map(shown, found[1:]))}", flush=True)
  write(args.json, result)


def head(*columns: str) -> list[str]:
  """The first lines of a table."""
  return [line(*columns), "|---" * len(columns) + "|"]


def line(*cells: str) -> str:
  return f"| {' | '.join(cells)} |"


def many(drifts: list[float]) -> str:
  """Distances after 2, 5, 20 and 50 steps."""
  return " ".join(map(shown, drifts[1:]))


def tables(result: dict[str, Any]) -> dict[str, list[str]]:
  """The lines of the tables, without their heads."""
  drift = [
    line(rule, kind, *map(many, row.values()))
    for rule, kinds in result["drift"].items()
    for kind, row in kinds.items()
  ]
  reach = [reached(*one) for one in result["reach"].items()]
  return {
    "drift": drift,
    "reach": reach,
    "weights": [weighed(weight, result) for weight in result["weights"]],
  }


# The gradients that are shown of other weights.
WEIGHED = (
  "independent normal",
  "with lognormal scales",
  "one in 64 is 100 times larger",
  "model",
)


def weighed(weight: str, result: dict[str, Any]) -> str:
  """A line of the table of weights."""
  found = result["weights"][weight]
  drifts = dict(zip(result["drift"]["adamw"], found["drift"], strict=True))
  both = ", ".join(f"{x:.2f}" for x in found["reach"])
  return line(weight, both, *(shown(drifts[kind]) for kind in WEIGHED))


def reached(key: str, row: dict[str, float]) -> str:
  """A line of the table of reach; the key is the ratio and the size of the signal."""
  ratio, signal = key.split(", ")
  name = ratio if signal == "0" else f"{ratio}, and a signal"
  return line(name, *(f"{x:.3g}" for x in row.values()))


def shown(x: float) -> str:
  """Four decimals, without the zero before the point."""
  return f"{x:.4f}".removeprefix("0") if x < 10 else f"{x:.0f}"


if __name__ == "__main__":
  main()
