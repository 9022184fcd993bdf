"""Device memory of the QLoRA example's training step, as an accelerator's own compiler plans it.

    python benchmarks/accelerator_qlora.py [--card h100] [--only 65B] [--json rows.json]
    python benchmarks/accelerator_qlora.py --attention [--json rows.json]

Nothing is run and no weight is made: the step that `finetune.py` compiles is compiled from shapes,
for a card that need not be there.

The base is NF4, doubly quantized; everything else of it bfloat16; adapters of rank 64 on all linear
layers but the head; 8-bit AdamW; layers recomputed in the backward pass; one row. With
`--attention`: what the ways to attend take in one layer of a 7B, and in its step in all.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from _measure import write
from compiled import compile_for
from optax_lowmem.qlora.data.batches import Batch
from optax_lowmem.qlora.models.attention import AttentionKind, attend_within
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.run.recipe import abstract_model, optimizer
from optax_lowmem.qlora.run.settings import Settings
from optax_lowmem.qlora.training.devices import Spread, part_of
from optax_lowmem.qlora.training.step import split, train_step

GIB = 2**30
MODELS = {
  "7B": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128),
  "33B": LlamaConfig(32000, 6656, 17920, 60, 52, 52, 128),
  "65B": LlamaConfig(32000, 8192, 22016, 80, 64, 64, 128),
  "Llama-2-70B": LlamaConfig(32000, 8192, 28672, 80, 64, 8, 128),
}
# Model, tokens of the row, and what is not as in `settings`.
CASES: list[tuple[str, int, dict[str, Any]]] = [
  ("7B", 512, {}),
  ("7B", 512, {"adapter_dtype": "bfloat16"}),
  ("7B", 4096, {}),
  ("7B", 4096, {"adapter_dtype": "bfloat16"}),
  ("7B", 4096, {"attention": "xla"}),
  ("7B", 32768, {"adapter_dtype": "bfloat16"}),
  ("33B", 512, {}),
  ("33B", 512, {"adapter_dtype": "bfloat16"}),
  ("65B", 512, {}),
  ("65B", 512, {"adapter_dtype": "bfloat16"}),
  ("Llama-2-70B", 512, {}),
  ("Llama-2-70B", 512, {"adapter_dtype": "bfloat16"}),
]


class Compiled(Protocol):
  """What the compiler planned."""

  @property
  def device_bytes(self) -> int: ...

  @property
  def temp_bytes(self) -> int: ...


Compile = Callable[[Callable[..., Any], tuple[Any, ...], tuple[int, ...]], Compiled]


def training_step(
  config: LlamaConfig, tokens: int, rank: int = 64, rows: int = 1, **options: Any
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
  """The example's own step: the function, its arguments as shapes, and which are donated.

  Args:
    config: of the model.
    tokens: of a row.
    rank: of the adapters.
    rows: of the batch.
    options: other settings of the script, by their names in `Settings`.
  """
  s = Settings(
    batch_size=rows, seq_len=tokens, rank=rank, targets="all-linear", dtype="bfloat16", **options
  )
  tx, _ = optimizer(s)
  model = abstract_model(config, s)
  graph, state, frozen = split(model, functools.partial(jax.eval_shape, tx.init))
  shape = (s.grad_accum, s.batch_size, s.seq_len)
  ids, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool)
  batch = Batch(ids, ids, mask, jax.ShapeDtypeStruct(shape[:2], jnp.int32))
  return functools.partial(train_step, graph, tx), (state, frozen, batch), (0,)


def on_eight_cards(
  step: tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]], mesh: Any, in_parts: bool
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
  """A step with a row of the batch on each card, as `spreading.py` lays it out.

  Args:
    step: from `training_step`, of as many rows as there are cards.
    mesh: of the cards, with one axis, "data".
    in_parts: whether each card holds a part of the base (`--fsdp`), or all of it.
  """
  fn, (state, frozen, batch), donate = step

  def laid(x, *spec):
    where = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  def part(path, x):
    return laid(x, *part_of(path, x.shape, mesh.size)) if in_parts else laid(x)

  state, batch = jax.tree.map(laid, state), jax.tree.map(lambda x: laid(x, None, "data"), batch)
  frozen = jax.tree_util.tree_map_with_path(part, frozen)
  return functools.partial(fn, spread=Spread(mesh, in_parts)), (state, frozen, batch), donate


def rows(compile: Compile, only: str | None = None) -> Iterator[dict[str, Any]]:
  """One row for each case.

  Args:
    compile: see above.
    only: the one model to compile, by its name in `MODELS`; all by default.
  """
  for name, tokens, options in CASES:
    if only not in (None, name):
      continue
    fn, args, donate = training_step(MODELS[name], tokens, **options)
    state, frozen, _ = args
    planned = compile(fn, args, donate)
    yield {
      "model": name,
      "tokens": tokens,
      "adapters": options.get("adapter_dtype", "float32"),
      "attention": options.get("attention", "auto"),
      "device GiB": planned.device_bytes / GIB,
      "temporaries GiB": planned.temp_bytes / GIB,
      "base GiB": _nbytes(frozen) / GIB,
      "adapters GiB": _nbytes(state.trained) / GIB,
      "optimizer GiB": _nbytes(state.opt_state) / GIB,
    }


def attention(compile: Compile) -> Iterator[dict[str, Any]]:
  """Of each way to attend: one layer's attention and its gradient; the step, 16-bit adapters.

  `cudnn` only where cuDNN is installed.
  """
  kinds: list[AttentionKind] = ["chunked", "xla"]
  if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cudnn"):
    kinds.append("cudnn")
  for kind in kinds:
    for tokens in (4096, 32768):
      attend = attend_within(None, None, kind)

      def summed(q, k, v, attend=attend):
        return attend(q, k, v)[0].astype(jnp.float32).sum()

      heads = jax.ShapeDtypeStruct((1, tokens, 32, 128), jnp.bfloat16)
      one = compile(jax.grad(summed, (0, 1, 2)), (heads, heads, heads), ())
      options: dict[str, Any] = {"attention": kind, "adapter_dtype": "bfloat16"}
      whole = compile(*training_step(MODELS["7B"], tokens, **options))
      yield {
        "attention": kind,
        "tokens": tokens,
        "temporaries GiB": one.temp_bytes / GIB,
        "step GiB": whole.device_bytes / GIB,
      }


def _nbytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


HEAD = ["| `--attention` | tokens | one layer's, GiB | the step, GiB |", "|---|---|---|---|"]


def line(row: dict[str, Any]) -> str:
  """A way to attend as a line of its table."""
  sizes = f"{row['temporaries GiB']:.2f} | {row['step GiB']:.2f}"
  return f"| {row['attention']} | {row['tokens']:,} | {sizes} |"


def tables(found: dict[str, Any]) -> dict[str, list[str]]:
  """The lines of the table of ways to attend."""
  return {"attention": [*HEAD, *map(line, found["attention"])]}


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--card", default="h100")
  parser.add_argument("--only", choices=MODELS, help="the one model to compile")
  parser.add_argument("--json", help="file to write the result to")
  parser.add_argument("--attention", action="store_true", help="the ways to attend instead")
  args = parser.parse_args()
  compile = functools.partial(compile_for, card=args.card)
  found: list[dict[str, Any]] = []
  if args.attention:
    print(*HEAD, sep="\n", flush=True)
    for row in attention(compile):
      print(line(row), flush=True)
      found.append(row)
    write(args.json, {"card": args.card, "attention": found})
    return
  for row in rows(compile, args.only):
    print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    found.append(row)
  write(args.json, {"card": args.card, "qlora": found})


if __name__ == "__main__":
  main()
