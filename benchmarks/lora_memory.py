"""Temporaries of a gradient through frozen packed layers, in layers' float32 weights.

    python benchmarks/lora_memory.py --json benchmarks/results/lora-memory-cpu.json

The model is 16 blocks of attention and SwiGLU with seven linear layers each, and an adapter of rank
8 on every one. What is printed is `memory_analysis().temp_size_in_bytes` of the compiled gradient
with respect to the adapters, over the bytes that the weights of one block have in float32: 16 would
be the whole model unpacked. "nf4 dora" has DoRA's magnitudes too. "float32 base" shows what the
activations alone need. "decode, then multiply" is the plain way to write a packed layer, without
the rule for its derivative. Nothing is computed: programs are compiled for shapes.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from _measure import write
from optax_lowmem import nn

LAYERS = 16
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


class Plain(nnx.Module):
  """A packed layer as one would write it first."""

  def __init__(self, layer: nn.NF4Linear):
    self.weight = layer.weight

  def __call__(self, x: jax.Array) -> jax.Array:
    return x @ self.weight.get_value().dequantize(x.dtype).T


class Block(nnx.Module):
  """One head of attention, and SwiGLU."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    def linear(inputs: int, outputs: int) -> nnx.Linear:
      return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)

    self.q, self.k, self.v, self.o = (linear(width, width) for _ in range(4))
    self.gate, self.up = linear(width, 3 * width), linear(width, 3 * width)
    self.down = linear(3 * width, width)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + self.o(jax.nn.softmax(self.q(x) @ self.k(x).T / x.shape[-1] ** 0.5) @ self.v(x))
    return x + self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def adapted(width: int, base: str, scanned: bool) -> nnx.Module:
  """The blocks, one module of stacked weights if they are to be scanned."""
  if scanned:
    many = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Block, in_axes=(None, 0)))
    model = nnx.List([many(width, nnx.Rngs(0))])
  else:
    model = nnx.List([Block(width, nnx.Rngs(i)) for i in range(LAYERS)])
  base, _, dora = base.partition(" ")
  if base != "float32":
    nn.quantize_model(model, codebook=cast(Any, "nf4" if base == "plain" else base))
  nn.add_lora(model, 8, 16, use_dora=dora == "dora", rngs=nnx.Rngs(1))
  if base == "plain":
    for block in model:
      for name in LINEARS:
        layer = getattr(block, name)
        layer.base = Plain(layer.base)
  return model


def temporaries(width: int, tokens: int, base: str, scanned: bool, remat: bool) -> dict[str, float]:
  """What the gradient needs beside its inputs and results, and the seconds to compile it."""
  model = nnx.eval_shape(lambda: adapted(width, base, scanned))
  graph, state = nnx.split(model)

  def loss(model: Any, x: jax.Array) -> jax.Array:
    def call(block: Any, x: jax.Array) -> jax.Array:
      return block(x)

    body = nnx.remat(call) if remat else call
    if scanned:
      x = nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(model[0], x)
    else:
      for block in model:
        x = body(block, x)
    return (x**2).mean()

  @jax.jit
  def gradient(state: Any, x: jax.Array) -> Any:
    return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(nnx.merge(graph, state), x)

  start = time.perf_counter()
  x = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
  memory = gradient.lower(state, x).compile().memory_analysis()
  assert memory is not None, "this backend does not count bytes"
  one = 13 * width * width * 4
  return {"layers": memory.temp_size_in_bytes / one, "compile_s": time.perf_counter() - start}


# Of a model's layers: scanned or not, with `jax.checkpoint` or not.
FORMS = [(s, r) for s in (True, False) for r in (False, True)]
NAMES = {
  "nf4 dora": "nf4, DoRA",
  "float32": "float32 base",
  "plain": "NF4, decode, then multiply",
}


def head() -> list[str]:
  """The first lines of the table."""
  columns = [f"{'scanned' if s else 'unrolled'}{', remat' if r else ''}" for s, r in FORMS]
  return ["| base | tokens | " + " | ".join(columns) + " |", "|" + "---|" * (len(FORMS) + 2)]


def line(rows: list[dict[str, Any]]) -> str:
  """The forms of one base and number of tokens as a line of the table."""
  base, tokens = rows[0]["base"], rows[0]["tokens"]
  cells = " | ".join(f"{row['layers']:.2f}" for row in rows)
  return f"| {NAMES.get(base, base)} | {tokens} | {cells} |"


def tables(found: dict[str, Any]) -> dict[str, list[str]]:
  """The lines of the table."""
  rows, n = found["rows"], len(FORMS)
  return {"temporaries": [*head(), *(line(rows[i : i + n]) for i in range(0, len(rows), n))]}


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--width", type=int, default=512)
  parser.add_argument("--tokens", type=int, nargs="+", default=[8, 32, 128])
  bases = ["nf4", "nf4 dora", "fp4", "int8", "float32", "plain"]
  parser.add_argument("--bases", nargs="+", default=bases)
  parser.add_argument("--json", help="also write the numbers here")
  args = parser.parse_args()
  print(*head(), sep="\n")
  rows = []
  for base in args.bases:
    for tokens in args.tokens:
      for scanned, remat in FORMS:
        found = temporaries(args.width, tokens, base, scanned, remat)
        rows.append({"base": base, "tokens": tokens, "scanned": scanned, "remat": remat} | found)
      print(line(rows[-len(FORMS) :]), flush=True)
  write(args.json, {"layers": LAYERS, "width": args.width, "rows": rows})


if __name__ == "__main__":
  main()
