"""The kernel against the tile loop, bit for bit: run by test_kernels.py in a process of its own.

XLA contracts a product and a sum to one fused operation, and where two products are summed it may
take either: in `0.9 m + 0.1 g`, the tile loop fuses one product and the interpreted kernel the
other, and a scale in five differs by its last bit. Without instructions that fuse, both round each
step alike. No CPU client can be told so later, hence the process.
"""

import json
import os

os.environ["XLA_FLAGS"] = "--xla_cpu_max_isa=AVX --xla_allow_excess_precision=false"

import jax
import jax.numpy as jnp
import optax

from optax_lowmem._quantization.array import encode, encode_finite, is_finite
from optax_lowmem._quantization.codebooks import get_codebook
from optax_lowmem._update.tile_loop import map_tiles
from optax_lowmem.kernels._pallas import map_blocks

SIGNED = {"mu", "trace"}
RULES = {
  "adamw": optax.adamw(1e-3),
  "lion": optax.lion(1e-4),
  "sgd": optax.sgd(1e-2, momentum=0.9),
  "adabelief": optax.adabelief(1e-3),
  "rmsprop": optax.rmsprop(1e-3),
}
SIZES = {"whole tiles": 4096, "masked": 2048 + 192, "smaller than a tile": 320}


def problem(tx, bits, size):
  """A body for the kernel, what it reads and what it replaces, after two float32 steps."""
  keys = jax.random.split(jax.random.key(size), 4)
  param = jax.random.normal(keys[0], (size,)) * 0.02
  state = tx.init(param)
  for key in keys[1:3]:
    _, state = tx.update(jax.random.normal(key, (size,)) * 1e-3, state, param)
  grad = (jax.random.normal(keys[3], (size,)) * 1e-3).at[7].set(jnp.nan)
  flat, treedef = jax.tree_util.tree_flatten_with_path(state)
  books = [
    get_codebook(f"log{bits}" + ("" if path[-1].name in SIGNED else "_unsigned"))
    for path, x in flat
    if x.ndim
  ]
  moments = [x for _, x in flat if x.ndim]
  writes = [encode(x, book, (64,)) for x, book in zip(moments, books, strict=True)]
  scalars = [x for _, x in flat if not x.ndim]
  shaped = [x.ndim > 0 for _, x in flat]

  def body(scalars):
    def fn(read, write):
      grad, param = (x.astype(jnp.float32) for x in read)
      write = write[: len(books)]
      old = [q.dequantize(jnp.float32) for q in write]
      arrays, numbers = iter(old), iter(scalars)
      state = treedef.unflatten([next(arrays if s else numbers) for s in shaped])
      update, state = tx.update(grad, state, param)
      new = [x for x, s in zip(jax.tree.leaves(state), shaped, strict=True) if s]
      stored = [
        encode_finite(jnp.where(is_finite(x), x, o), q.codebook, q.block)
        for x, o, q in zip(new, old, write, strict=True)
      ]
      return [*stored, update.astype(jnp.bfloat16)]

    return fn

  reads = [grad.astype(jnp.bfloat16), param.astype(jnp.bfloat16)]
  return body, scalars, reads, writes


def differences(tx, bits, size):
  """How many elements differ, for each resulting array."""
  body, scalars, reads, writes = problem(tx, bits, size)
  update = jax.ShapeDtypeStruct((size,), jnp.bfloat16)

  @jax.jit
  def kernel(scalars, reads, writes):
    return map_blocks(body(scalars), reads, writes, [update], interpret=True)

  @jax.jit
  def xla(scalars, reads, writes):
    if bits == 4:  # the tile loop would hand over halves of blocks
      return body(scalars)(reads, writes)
    return map_tiles(body(scalars), reads, [*writes, jnp.zeros((size,), jnp.bfloat16)], tile=640)

  results = zip(*(jax.tree.leaves(f(scalars, reads, writes)) for f in (kernel, xla)), strict=True)
  return [int(((x != y) & ~(jnp.isnan(x) & jnp.isnan(y))).sum()) for x, y in results]


def main():
  cases = [(name, 8, "masked") for name in RULES]
  cases += [
    ("adamw", 8, "whole tiles"),
    ("adamw", 8, "smaller than a tile"),
    ("adamw", 4, "masked"),
  ]
  found = {
    f"{name}, {bits} bits, {sizes}": differences(RULES[name], bits, SIZES[sizes])
    for name, bits, sizes in cases
  }
  print(json.dumps(found))


if __name__ == "__main__":
  main()
