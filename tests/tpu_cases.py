"""The kernel for TPUs against XLA, bit for bit: run by test_accelerator_tpu.py in its own process.

See kernel_cases.py for why products and sums must not be contracted here.
"""

import json
import os

os.environ["XLA_FLAGS"] = "--xla_cpu_max_isa=AVX --xla_allow_excess_precision=false"

import jax
import jax.numpy as jnp
import optax

import optax_lowmem as lowmem
from optax_lowmem import kernels
from optax_lowmem.kernels import _choice, _tpu

RULES = {
  "adam": optax.scale_by_adam(),
  "lion": optax.scale_by_lion(),
  "trace": optax.trace(0.9),
  "adabelief": optax.scale_by_belief(),
  "rms": optax.scale_by_rms(),
}
# What a shape is to show of how arrays are cut; see `_tpu_grid.Grid`.
SHAPES = {
  "one tile": (64, 512),
  "rows past the edge": (160, 256),
  "few rows": (3, 2048),
  "scales as the elements lie": (16, 8192),
  "a stack": (3, 40, 512),
  "a vector": (4096,),
  "several tiles": (128, 11264),
}


def differences(rule, shape, bits, block_size, dtype):
  """How many elements of the update, in bfloat16, and of each array of the state differ."""
  tx = lowmem.quantized(rule, bits=bits, block_size=block_size)
  params = jnp.zeros(shape, dtype)

  def run(mode):
    @jax.jit
    def step(grads, state):
      with kernels.using(mode):
        return tx.update(grads, state, params)

    state, updates = tx.init(params), params
    for seed in range(2):
      grads = (jax.random.normal(jax.random.key(seed), shape) * 1e-3).astype(dtype)
      grads = grads.at[(0,) * (len(shape) - 1) + (7,)].set(jnp.nan)
      updates, state = step(grads, state)
    return jax.tree.leaves((updates, state))

  (update, *kernel), (expected, *xla) = run("interpret"), run("xla")
  assert (jnp.isnan(update) == jnp.isnan(expected)).all()
  update, expected = (jnp.nan_to_num(x).astype(jnp.bfloat16) for x in (update, expected))
  pairs = zip([update, *kernel], [expected, *xla], strict=True)
  return [int((x != y).sum()) for x, y in pairs]


def main():
  _choice._kernel = lambda platform: _tpu
  f32, bf16 = jnp.float32, jnp.bfloat16
  cases = [(rule, "one tile", 8, None, f32) for rule in RULES]
  cases += [("adam", shape, 8 if i % 2 else 4, None, bf16) for i, shape in enumerate(SHAPES)]
  cases += [("adam", "rows past the edge", 8, None, f32)]
  cases += [("adam", "one tile", 4, 16, f32), ("adam", "one tile", 4, 256, f32)]
  found = {
    f"{rule}, {shape}, {bits} bits, blocks of {size or 64}, {jnp.dtype(dtype).name}": differences(
      RULES[rule], SHAPES[shape], bits, size, dtype
    )
    for rule, shape, bits, size, dtype in cases
  }
  print(json.dumps(found))


if __name__ == "__main__":
  main()
