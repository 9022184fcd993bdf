"""All parameters trained in float32, with an optimizer's state of a quarter of the size.

    python examples/training_loop.py                               # a minute or two on two cores
    python examples/training_loop.py --steps 600                   # goes on where that one ended
    python examples/training_loop.py --optim came --out of-came    # or lion_8bit, adamw_4bit, ...
    python examples/training_loop.py --offload --out offloaded     # the state in host memory

Against a loop with optax, one line is another: `lowmem.adamw` for `optax.adamw`. The model and its
text are in tiny_gpt.py. It starts from nothing, as there is nothing to download: parameters that
you load take the place of `nnx.split(GPT(...))`.
"""

import argparse
import functools
import pathlib
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tiny_gpt import ENGLISH, GPT, Text, loss_of

import optax_lowmem as lowmem


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--steps", type=int, default=300, help="in all, resumed ones included")
  parser.add_argument("--lr", type=float, default=1e-3)
  parser.add_argument("--optim", default="adamw_8bit", help="a name that lowmem.create knows")
  parser.add_argument("--offload", action="store_true", help="keep the state in host memory")
  parser.add_argument("--save-every", type=int, default=100)
  parser.add_argument("--out", default="loop-run", help="a folder for checkpoints")
  return parser.parse_args()


def transformation(args: argparse.Namespace) -> optax.GradientTransformation:
  warmup = optax.linear_schedule(0.0, args.lr, 20)
  schedule = optax.join_schedules([warmup, optax.constant_schedule(args.lr)], [20])
  if args.optim == "adamw_8bit":
    rule = lowmem.adamw(schedule)
  else:
    rule = lowmem.create(args.optim, schedule)
  if args.offload:
    rule = lowmem.offloaded(rule)
  # The norm over all gradients stays outside: what is within is updated a tile at a time.
  return optax.chain(optax.clip_by_global_norm(1.0), rule)


def main() -> None:
  args = arguments()
  text, tx = Text(ENGLISH), transformation(args)
  graph, params = nnx.split(GPT(nnx.Rngs(0)), nnx.Param)
  params = jax.device_put(params, jax.devices()[0])  # fixed there, as what a step returns is
  opt_state = tx.init(params)

  # Donated: the new state is written where the old one was. Else both are held at once.
  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, opt_state, tokens):
    loss, grads = jax.value_and_grad(lambda p: loss_of(nnx.merge(graph, p), tokens))(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  @jax.jit
  def measure(params, tokens):
    return loss_of(nnx.merge(graph, params), tokens)

  def held_out_loss() -> float:
    return float(np.mean([measure(params, tokens) for tokens in text.measured()]))

  options = ocp.CheckpointManagerOptions(max_to_keep=2)
  with ocp.CheckpointManager(pathlib.Path(args.out).resolve(), options=options) as checkpoints:
    done = checkpoints.latest_step() or 0
    if done:
      params, opt_state = restored(checkpoints, done, params, opt_state)
      print(f"Resumed from {args.out} after step {done}.")
    print(f"Held-out loss: {held_out_loss():.3f}")

    while done < args.steps:
      params, opt_state, loss = step(params, opt_state, text.batch(done))
      done += 1
      if done % 50 == 0:
        print(f"  step {done}: loss {loss:.3f}", flush=True)
      if done % args.save_every == 0 or done == args.steps:
        tree = {"params": params, "opt_state": opt_state}
        checkpoints.save(done, args=ocp.args.StandardSave(tree))

    print(f"Held-out loss: {held_out_loss():.3f}")
    print(f"Checkpoints are in {args.out}, the last of step {checkpoints.latest_step()}.")

  usual = lowmem.state_bytes(jax.eval_shape(optax.adamw(args.lr).init, params))
  print(f"Parameters:        {megabytes(lowmem.state_bytes(params))}")
  print(f"Optimizer's state: {megabytes(lowmem.state_bytes(opt_state))}")
  print(f"With optax.adamw:  {megabytes(usual)}")


def restored(checkpoints: ocp.CheckpointManager, done: int, params: Any, opt_state: Any) -> Any:
  """What was saved, in place of what training starts from.

  Codes are saved under the name of their form: a state of another optimizer is refused.
  """
  like = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": params, "opt_state": opt_state})
  tree = checkpoints.restore(done, args=ocp.args.StandardRestore(like))
  # Orbax restores to device memory; what was offloaded goes back to the host.
  return tree["params"], lowmem.paged(tree["opt_state"], like=opt_state)


def megabytes(count: dict[str, int]) -> str:
  where = {"device": "on the device", "pinned_host": "in host memory"}
  return ", ".join(f"{n / 1e6:.2f} MB {where[kind]}" for kind, n in count.items() if n)


if __name__ == "__main__":
  main()
