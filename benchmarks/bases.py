"""What packing a base costs: bits a parameter and perplexity of a real model, without an adapter.

    python benchmarks/bases.py --json benchmarks/results/bases-cpu.json
    python benchmarks/bases.py --model DIR --text FILE

By default SmolLM2-135M-Instruct on the held-out conversations of the example. Its file is a GGUF in
4 bits of another kind (Q4_1): "none" is that file, decoded.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from _measure import write
from optax_lowmem import nn as lowmem_nn
from optax_lowmem.qlora.data.batches import Batches
from optax_lowmem.qlora.data.dataset import load
from optax_lowmem.qlora.files.fetch import default_data, default_model
from optax_lowmem.qlora.loading.llama import load_llama
from optax_lowmem.qlora.loading.weights import open_checkpoint
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer
from optax_lowmem.qlora.training.evaluation import HeldOut
from optax_lowmem.qlora.training.step import State


def bits(model: nnx.Module) -> float:
  """Bits a parameter of the packed layers; 32 where there are none."""
  found = (value for _, value in nnx.iter_graph(model))
  packed = [v.get_value() for v in found if isinstance(v, lowmem_nn.QuantizedWeight)]
  return 8 * sum(q.nbytes for q in packed) / sum(q.size for q in packed) if packed else 32.0


HEAD = ["| base | bits a parameter | perplexity | against none |", "|---|---|---|---|"]


def line(row: dict[str, Any], none: dict[str, Any]) -> str:
  """A base as a line of the table; `none` is the row without one."""
  ratio = row["perplexity"] / none["perplexity"] - 1
  return f"| {row['base']} | {row['bits']:.3f} | {row['perplexity']:.3f} | {ratio:+.1%} |"


def tables(found: dict[str, Any]) -> dict[str, list[str]]:
  """The lines of the table."""
  rows = found["rows"]
  return {"bases": [*HEAD, *(line(row, rows[0]) for row in rows)]}


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--model", type=pathlib.Path, help="a Hugging Face folder or a GGUF file")
  parser.add_argument("--text", type=pathlib.Path, help="any file that the example reads")
  parser.add_argument("--rows", type=int, default=128)
  parser.add_argument("--tokens", type=int, default=256)
  parser.add_argument("--json", help="also write the numbers here")
  args = parser.parse_args()
  path, text = args.model or default_model(), args.text or default_data()
  tokenizer = ChatTokenizer.from_model(path)
  _, held = load(text, tokenizer, args.tokens, train_on_prompt=True).split()
  batches = Batches(held, 8, 1, args.tokens, tokenizer.pad_id, 0, packing=True).once(
    held[: args.rows]
  )
  checkpoint, rows = open_checkpoint(path), []
  print(*HEAD, sep="\n")
  for base in (None, "int8", "nf4", "fp4"):
    model = load_llama(checkpoint, base, dtype=jnp.float32)
    graph, random, weights = nnx.split(model, nnx.RngState, ...)
    held_out = HeldOut(graph, weights, batches)
    found = held_out(State(nnx.State({}), None, random))["perplexity"]
    rows.append({"base": base or "none", "bits": bits(model), "perplexity": found})
    print(line(rows[-1], rows[0]), flush=True)
    jax.clear_caches()
  counted = {"tokens": held_out.tokens, "model": path.name, "text": text.name}
  write(args.json, counted | {"rows": rows})


if __name__ == "__main__":
  main()
