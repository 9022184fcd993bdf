"""A batch far longer than the others: out of memory, unless the optimizer's state can give way.

    python examples/memory_spike.py                # on a GPU: the run with and without `offloaded`
    python examples/memory_spike.py --small        # a few parameters, on anything

Paged optimizers are for this: training fits, but for one long sequence. Here a model of `--width`
trains with AdamW in 32 bits on sequences of 128 tokens, and the last batch is `--spike` times as
long. The memory JAX may use is capped so that parameters, gradients, state and a short batch fit,
and the long one only if the state is elsewhere.
"""

import argparse
import os
import subprocess
import sys

SHORT, STEPS = 128, 4


def train(offload: bool, width: int, layers: int, spike: int) -> None:
  """Trains a few steps, the last on a long batch; raises what JAX raises when memory is out."""
  import jax
  import jax.numpy as jnp
  import optax

  import optax_lowmem as lowmem

  keys = jax.random.split(jax.random.key(0), layers)
  params = [jax.random.normal(k, (width, width)) / width**0.5 for k in keys]
  params = jax.device_put(params, jax.devices()[0])  # committed, as pages are: compiled once
  tx = lowmem.create("paged_adamw_32bit" if offload else "adamw", 1e-4)

  def loss(params, x):
    for w in params:
      x = x + jnp.tanh(x @ w)
    return jnp.mean(x**2)

  def step(params, state, x):
    value, grads = jax.value_and_grad(loss)(params, x)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  step = jax.jit(step, donate_argnums=(0, 1))
  state = tx.init(params)
  for t in range(STEPS):
    tokens = SHORT * (spike if t == STEPS - 1 else 1)
    x = jax.random.normal(jax.random.key(t), (tokens, width))
    params, state, value = step(params, state, x)
    print(f"  step {t + 1}: {tokens:,} tokens, loss {float(value):.4f}", flush=True)
  where = lowmem.state_bytes(state)
  print(f"  state: {where['device'] / 1e6:.1f} MB on the device, "
        f"{where['pinned_host'] / 1e6:.1f} MB on the host")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--width", type=int, default=8192)
  parser.add_argument("--layers", type=int, default=8)
  parser.add_argument("--spike", type=int, default=160, help="how much longer the last batch is")
  parser.add_argument("--fraction", type=float, default=0.0, help="of the memory; 0 computes it")
  parser.add_argument("--small", action="store_true", help="width 256, 2 layers, spike 4")
  parser.add_argument("--run", choices=("device", "host"), help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.small:
    args.width, args.layers, args.spike = 256, 2, 4
  if args.run:
    train(args.run == "host", args.width, args.layers, args.spike)
    return 0

  # Parameters, gradients and two moments in float32; a layer keeps two activations. The cap is
  # halfway between what the long batch takes with the state on the device and without it.
  weights = 4 * args.layers * args.width**2
  activations = 4 * 2 * args.layers * args.spike * SHORT * args.width
  needs = {"device": 4 * weights + activations, "host": 2 * weights + activations}
  environment = dict(os.environ)
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # this process only looks
  import jax

  stats = jax.local_devices()[0].memory_stats() or {}
  total = stats.get("bytes_limit", 0) / 0.75  # JAX takes three quarters unless told
  fraction = args.fraction or (sum(needs.values()) / 2 / total if total else 0.0)
  capped = bool(total) and not args.small  # a few parameters fit below any cap
  print(f"The long batch needs some {needs['device'] / 1e9:.2f} GB, "
        f"{needs['host'] / 1e9:.2f} GB with its state on the host.")  # fmt: skip
  if not total:
    print("This is no GPU: nothing caps the memory, and host and device are one.")
  elif not capped:
    print("Nothing caps the memory of so small a model.")
  results = {}
  for run in ("device", "host"):
    print(f"State on the {run}{f', {fraction:.3f} of the memory' * capped}:", flush=True)
    command = [sys.executable, __file__, "--run", run, "--width", str(args.width)]
    command += ["--layers", str(args.layers), "--spike", str(args.spike)]
    cap = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.6f}"} if capped else {}
    done = subprocess.run(command, env=environment | cap, stderr=subprocess.PIPE, text=True)
    results[run] = done.returncode == 0
    last = (done.stderr.strip().splitlines() or [""])[-1][:160]
    print("  done" if results[run] else f"  failed: {last}", flush=True)
  return 0 if results["host"] and (results["device"] == (not capped)) else 1


if __name__ == "__main__":
  sys.exit(main())
