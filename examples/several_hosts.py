"""Parameters and 8-bit state in parts over the devices of several hosts, with one checkpoint.

    python examples/several_hosts.py                   # two processes of four CPU devices, here
    python examples/several_hosts.py --processes 1     # goes on with one of eight: the same run

On hosts with devices of their own, start it once on each:

    python examples/several_hosts.py --coordinator host0:8476 --processes 2 --process 0
    python examples/several_hosts.py --coordinator host0:8476 --processes 2 --process 1

Nothing about the optimizer differs from a run on one device. The model is that of tiny_gpt.py.
"""

import argparse
import functools
import pathlib
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_gpt import ENGLISH, GPT, Text, loss_of

import optax_lowmem as lowmem

DEVICES = 8  # of the CPU, over all processes, where they are started here


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--steps", type=int, default=20, help="in all, resumed ones included")
  parser.add_argument("--offload", action="store_true", help="keep the state in host memory")
  parser.add_argument("--out", default="several-hosts", help="a folder that all processes see")
  parser.add_argument("--processes", type=int, default=2)
  parser.add_argument("--process", type=int, help="which of them this is; by default all, here")
  parser.add_argument("--coordinator", help="host:port of process 0")
  return parser.parse_args()


def start_here(count: int) -> int:
  """Runs all processes on this machine. If one fails, the others would wait for it: they end."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  command = [sys.executable, *sys.argv, "--coordinator", f"localhost:{port}", "--process"]
  processes = [subprocess.Popen([*command, str(k)]) for k in range(count)]
  try:
    while None in (codes := [p.poll() for p in processes]) and not any(codes):
      time.sleep(0.1)
  finally:
    for p in processes:
      p.kill()
  return next((1 for code in codes if code != 0), 0)


def join(args: argparse.Namespace) -> None:
  """Makes this process one of several. On Cloud TPUs and under SLURM `initialize()` knows more."""
  if args.coordinator.startswith("localhost:"):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES // args.processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if args.processes > 1:
    where = args.coordinator, args.processes, args.process
    jax.distributed.initialize(*where, shutdown_timeout_seconds=30)  # for others that have failed


def in_parts(mesh: jax.sharding.Mesh, tree: Any) -> Any:
  """FSDP: each array is cut along its first axis that the devices divide, or else copied."""

  def one(x):
    even = [k for k in range(x.ndim) if x.shape[k] % mesh.size == 0]
    spec = PartitionSpec(*[None] * even[0], "data") if even else PartitionSpec()
    return NamedSharding(mesh, spec)

  return jax.tree.map(one, tree)


def main() -> None:
  args = arguments()
  if args.process is None:
    sys.exit(start_here(args.processes))
  join(args)
  say = functools.partial(print, flush=True) if args.process == 0 else lambda *_: None
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  tx = lowmem.adamw(1e-3)
  if args.offload:
    tx = lowmem.offloaded(tx)

  # Every process makes the same parameters, and keeps its part.
  graph, params = nnx.split(GPT(nnx.Rngs(0)), nnx.Param)
  where = in_parts(mesh, params)
  params = jax.jit(lambda: nnx.state(GPT(nnx.Rngs(0)), nnx.Param), out_shardings=where)()
  # How the state lies follows from the parameters: codes, scales and pages.
  state_where = lowmem.state_shardings(tx, params, where)
  state = jax.jit(tx.init, out_shardings=state_where)(params)

  # The results are to lie as the arguments do, or XLA would choose.
  @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(where, state_where, None))
  def step(params, state, tokens):
    loss, grads = jax.value_and_grad(lambda p: loss_of(nnx.merge(graph, p), tokens))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  text, rows = Text(ENGLISH), NamedSharding(mesh, PartitionSpec("data"))

  def batch(k: int) -> jax.Array:
    """A batch, of which this process reads the rows of its own devices."""
    whole = np.asarray(text.batch(k))
    return jax.make_array_from_callback(whole.shape, rows, lambda part: whole[part])

  with ocp.CheckpointManager(pathlib.Path(args.out).resolve()) as checkpoints:
    done = checkpoints.latest_step() or 0
    if done:  # of any number of processes: what is restored lies as is said here
      like = {"params": _shapes(params), "state": _shapes(state)}
      tree = checkpoints.restore(done, args=ocp.args.StandardRestore(like))
      params, state = tree["params"], tree["state"]
      say(f"Resumed from {args.out} after step {done}.")
    for k in range(done, args.steps):
      params, state, loss = step(params, state, batch(k))
      if (k + 1) % 5 == 0 or k + 1 == args.steps:
        say(f"  step {k + 1}: loss {float(loss):.4f}")
    if done < args.steps:
      tree = {"params": params, "state": state}
      checkpoints.save(args.steps, args=ocp.args.StandardSave(tree))
  held = lowmem.state_bytes(state)
  say(f"{jax.process_count()} processes, {jax.device_count()} devices. State on each device:")
  say(*(f"{n / jax.device_count() / 1e3:.0f} kB in memory of kind {k}" for k, n in held.items()))


def _shapes(tree: Any) -> Any:
  return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


if __name__ == "__main__":
  main()
