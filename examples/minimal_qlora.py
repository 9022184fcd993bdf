"""QLoRA from beginning to end, to be read: a base model, 4 bits, adapters, a merged model.

    python examples/minimal_qlora.py                         # a minute or two on two CPU cores
    python examples/minimal_qlora.py --steps 1000 --out adapter

A small GPT learns English, is packed in 4 bits and frozen, and then learns Python: by adapters
alone, with 8-bit AdamW. The GPT and the texts are in tiny_gpt.py, and any other Flax NNX model will
do. For language models that others have trained there is `lowmem finetune`.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tiny_gpt import CODE, CONTEXT, ENGLISH, GPT, Text, loss_of

import optax_lowmem as lowmem
from optax_lowmem import nn as lowmem_nn


def train(model: nnx.Module, optimizer: nnx.Optimizer, text: Text, steps: int) -> None:
  """Lowers the loss on a text, by what the optimizer was made for."""

  # Donated: the old state's memory is given to the new one. Else both are held at once.
  @functools.partial(nnx.jit, donate_argnums=(0, 1))
  def step(model, optimizer, tokens):
    trained = nnx.DiffState(0, optimizer.wrt)  # gradients of these, and of nothing else
    loss, grads = nnx.value_and_grad(loss_of, argnums=trained)(model, tokens)
    optimizer.update(model, grads)
    return loss

  for i in range(steps):
    loss = step(model, optimizer, text.batch(i))
    if i % 50 == 0:
      print(f"  step {i}: loss {loss:.3f}", flush=True)


def held_out_loss(model: nnx.Module, text: Text) -> float:
  loss = nnx.jit(loss_of)
  return float(np.mean([loss(model, tokens) for tokens in text.measured()]))


def pretrained(steps: int) -> GPT:
  """What you would load from a checkpoint."""
  model = GPT(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
  train(model, optimizer, Text(ENGLISH), steps)
  return model


def sample(model: Callable[[jax.Array], jax.Array], prompt: str, count: int = 150) -> str:
  """Goes on from a prompt, by one of the likelier bytes each time."""
  next_logits = nnx.jit(lambda model, tokens, end: model(tokens)[0, end - 1])
  rng, said = np.random.default_rng(0), list(prompt.encode())
  for _ in range(count):
    seen = said[-CONTEXT:]
    tokens = jnp.asarray([seen + [0] * (CONTEXT - len(seen))])  # of one length: compiled once
    logits = np.asarray(next_logits(model, tokens, len(seen)), np.float64)
    likely = np.exp((logits - logits.max()) / 0.7)
    said.append(int(rng.choice(256, p=likely / likely.sum())))
  return bytes(said).decode(errors="replace")


def megabytes(tree: Any) -> str:
  return f"{sum(lowmem.state_bytes(tree).values()) / 1e6:6.2f} MB"


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--pretrain", type=int, default=300, help="steps on English")
  parser.add_argument("--steps", type=int, default=200, help="steps on Python, in 4 bits")
  parser.add_argument("--rank", type=int, default=16)
  parser.add_argument("--out", default="tiny-adapter", help="a folder for the adapter")
  args = parser.parse_args()
  python = Text(CODE)

  print("A base model learns English:")
  model = pretrained(args.pretrain)
  print(f"Base in float32:    {megabytes(nnx.state(model))}")
  print(f"Loss on Python:     {held_out_loss(model, python):.3f}")

  # Linear layers become NF4Linear, all but the output head: some 4.13 bits a weight.
  model = lowmem_nn.quantize_model(model)
  print(f"Base in NF4:        {megabytes(nnx.state(model))}")
  print(f"Loss on Python:     {held_out_loss(model, python):.3f}")

  # Beside each stands x A B, with B = 0: nothing changes until B is trained.
  model = lowmem_nn.add_lora(model, args.rank, 2 * args.rank, rngs=nnx.Rngs(1))
  optimizer = nnx.Optimizer(model, lowmem.adamw(3e-3, bits=8), wrt=nnx.LoRAParam)
  adapters = nnx.state(model, nnx.LoRAParam)
  print(f"Adapters:           {megabytes(adapters)}")
  print(f"Optimizer's state:  {megabytes(optimizer.opt_state)}")
  print(f"With optax.adamw:   {megabytes(jax.eval_shape(optax.adamw(3e-3).init, adapters))}")

  print("The adapters learn Python:")
  train(model, optimizer, python, args.steps)
  print(f"Loss on Python:     {held_out_loss(model, python):.3f}")

  lowmem_nn.save_peft(model, args.out)  # adapter_config.json, adapter_model.safetensors
  print(f"Adapter, in PEFT's format: {args.out}")

  model = lowmem_nn.merge_lora(model)  # plain nnx.Linear again, and float32
  print(f"Merged:             {megabytes(nnx.state(model))}")
  print(f"Loss on Python:     {held_out_loss(model, python):.3f}")
  print(sample(model, "def __add__(self, other"))


if __name__ == "__main__":
  main()
