"""Tokens a second of the example's generation, with the cache of keys and values and without it.

    python benchmarks/generation.py                             # a tiny random model
    python benchmarks/generation.py --model FILE [--quantize nf4] [--dtype bfloat16]

Both ways are compiled, greedy and timed in turn in one process, the best of `--repeats` each.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optax_lowmem.qlora.loading.llama import Llama, load_llama
from optax_lowmem.qlora.models.generation import generate
from optax_lowmem.qlora.models.llama_config import LlamaConfig


def without_cache(graph, new_tokens, variables, ids, start):
  """Each token costs a forward pass over the whole row."""

  def body(i, ids):
    model = nnx.merge(graph, *variables, copy=True)
    logits = model.head(model.hidden(ids)[:, start + i - 1])
    return ids.at[:, start + i].set(logits.argmax(axis=-1))

  ids = jnp.pad(ids, ((0, 0), (0, new_tokens)))
  return jax.lax.fori_loop(0, new_tokens, body, ids)[:, -new_tokens:]


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--model")
  parser.add_argument("--quantize", choices=["nf4"])
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--rows", type=int, default=2)
  parser.add_argument("--prompt", type=int, default=64)
  parser.add_argument("--new-tokens", type=int, default=64)
  parser.add_argument("--repeats", type=int, default=3)
  options = parser.parse_args()
  if options.model:
    model = load_llama(options.model, options.quantize, dtype=jnp.dtype(options.dtype))
  else:
    model = Llama(LlamaConfig(512, 128, 384, 4, 4, 2, 32), rngs=nnx.Rngs(0))
  graph, state = nnx.split(model)
  variables, new = (state,), options.new_tokens
  shape = (options.rows, options.prompt)
  ids = jax.random.randint(jax.random.key(0), shape, 0, model.config.vocab_size)
  lengths = jnp.full(options.rows, options.prompt)
  draw = jax.random.key(0), jnp.float32(0), jnp.float32(1)
  cached = jax.jit(partial(generate, graph, (), new))
  plain = jax.jit(partial(without_cache, graph, new))
  ways = {
    "with cache": lambda: cached(variables, ids, lengths, *draw).tokens,
    "without": lambda: plain(variables, ids, options.prompt),
  }
  tokens = {name: np.asarray(way()) for name, way in ways.items()}  # compiles
  equal = (tokens["with cache"] == tokens["without"]).mean()
  best = dict.fromkeys(ways, float("inf"))
  for _ in range(options.repeats):
    for name, way in ways.items():
      begun = time.perf_counter()
      jax.block_until_ready(way())
      best[name] = min(best[name], time.perf_counter() - begun)
  print(f"{options.rows} x {options.prompt} tokens read, {new} made; {equal:.0%} equal")
  for name, seconds in best.items():
    print(f"{name:>12}: {options.rows * new / seconds:8.1f} tokens/s")
  print(f"{'ratio':>12}: {best['without'] / best['with cache']:8.1f}")


if __name__ == "__main__":
  main()
