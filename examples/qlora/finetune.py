"""Fine-tune a language model in 4 bits: QLoRA with 8-bit AdamW, in plain JAX, Flax and optax.

    python finetune.py                                      # a small real model and data set
    python finetune.py --model DIR --data rows.json --out my-adapter
    python finetune.py --model DIR --seq-len 2048 --dry-run      # would it fit?
    python finetune.py --resume my-adapter                  # go on where it stopped

The base model is frozen, its linear layers packed in 4 bits (NF4). Beside each stands a trained
low-rank correction (LoRA), in float32, and only for these does an optimizer state exist, in 8 bits.
Read from `finetune` down to see how it is put together; the rest of this file are the pieces.
"""

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optax_lowmem as lowmem
from arguments import Settings, check_same_data, output_folder, parse, save_settings
from chat import ChatTokenizer
from data import Batch, Batches, load, pad
from fetch import MODEL_NAME, default_data, default_model, sha256_of
from llama import abstract_llama, load_llama
from llama_config import LlamaConfig
from optax_lowmem import nn as lowmem_nn
from report import (
  Metrics,
  byte_parts,
  loss_picture,
  memory_in_use,
  read_records,
  running_mean,
)
from resume import load_state, save_state
from sampling import Samples
from terminal import (
  CtrlC,
  StepBar,
  complain,
  conclude,
  print_bytes,
  print_shapes,
  say,
  sentences,
)
from weights import open_checkpoint


class State(NamedTuple):
  """All that training changes, and all that a resumed run needs."""

  lora: Any  # the adapters, nnx.LoRAParam
  opt_state: Any
  rngs: Any  # of dropout; empty without


# ------------------------------------------------------------------------ the model and its pieces


def optimizer(s: Settings) -> tuple[optax.GradientTransformation, Callable[[int], Any]]:
  """Clipping, then the named optimizer, at a learning rate that rises and falls."""
  warmup = s.steps // 20 if s.warmup is None else s.warmup
  rest = max(1, s.steps - warmup)
  after = {
    "constant": optax.constant_schedule(s.lr),
    "linear": optax.linear_schedule(s.lr, 0.0, rest),
    "cosine": optax.cosine_decay_schedule(s.lr, rest),
  }[s.schedule]
  # The first step's rate is lr / (warmup + 1), not 0: a step at 0 would be wasted.
  rise = optax.linear_schedule(s.lr / (warmup + 1), s.lr, max(1, warmup))
  schedule = optax.join_schedules([rise, after], [warmup])
  clip = optax.clip_by_global_norm(s.max_grad_norm) if s.max_grad_norm else optax.identity()
  return optax.chain(clip, lowmem.create(s.optim, schedule)), schedule


def adapted(model: nnx.Module, s: Settings) -> nnx.Module:
  """The model with fresh adapters, which change nothing yet."""
  rngs = nnx.Rngs(params=s.seed, dropout=s.seed + 1)
  model = lowmem_nn.add_lora(model, s.rank, s.alpha, s.targets, dropout=s.dropout, rngs=rngs)
  if "lm_head" in nnx.state(model, nnx.LoRAParam):
    raise ValueError(
      f"--targets {s.targets!r} matches lm_head too, which this script keeps frozen (see "
      "head_loss). Name the layers inside the blocks only, for example '.*_proj'."
    )
  return model


def split(model: nnx.Module, init: Callable[[Any], Any]) -> tuple[Any, State, Any]:
  """``(graph, what is trained, what is frozen)``; `merged` puts them together again."""
  graph, lora, rngs, frozen = nnx.split(model, nnx.LoRAParam, nnx.RngState, ...)
  return graph, State(lora, init(lora), rngs), frozen


def merged(graph: Any, state: State, frozen: Any) -> Any:
  return nnx.merge(graph, state.lora, state.rngs, frozen, copy=True)


def head_loss(
  model: Any,
  hidden: jax.Array,
  batch: Batch,
  *,
  divisor: jax.Array | float,
  with_gradient: bool,
  chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy summed over the learned tokens, by `divisor`; its gradient in `hidden`.

  The logits of all positions would be the largest array of the run: 49,152 numbers a token for
  SmolLM2. So the head is applied to `chunk` positions at a time, and only to learned ones. As the
  head is frozen, a chunk's gradient is taken at once and its logits are never needed again.
  """
  flat, targets = hidden.reshape(-1, hidden.shape[-1]), batch.targets.reshape(-1)
  first = jnp.argsort(~batch.learned.reshape(-1), stable=True)  # learned positions first
  first = jnp.pad(first, (0, -len(first) % chunk)).reshape(-1, chunk)
  counted = jnp.arange(first.size).reshape(-1, chunk) < batch.learned.sum()

  def losses(rows: jax.Array, targets: jax.Array, counted: jax.Array) -> jax.Array:
    logits = model.head(rows).astype(jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(counted, each, 0.0).sum() / divisor

  def one_chunk(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    total, gradient = carry
    rows = (flat[first[i]], targets[first[i]], counted[i])
    if not with_gradient:
      return total + losses(*rows), gradient
    loss, slope = jax.value_and_grad(losses)(*rows)
    return total + loss, gradient.at[first[i]].add(slope)

  chunks = counted.any(axis=1).sum()
  start = jnp.zeros(()), jnp.zeros_like(flat if with_gradient else flat[:0])
  total, gradient = jax.lax.fori_loop(0, chunks, one_chunk, start)
  return total, gradient.reshape(hidden.shape if with_gradient else gradient.shape)


def train_step(graph: Any, tx: Any, state: State, frozen: Any, batch: Batch) -> tuple[State, Any]:
  """One step of the optimizer; the gradients of `batch`'s leading axis are summed."""
  learned = batch.learned.sum()

  def accumulate(carry: Any, part: Batch) -> tuple[Any, jax.Array]:
    total, rngs = carry

    def hidden_of(lora: Any) -> tuple[jax.Array, Any]:
      model = merged(graph, State(lora, None, rngs), frozen)
      return model.hidden(part.inputs), nnx.state(model, nnx.RngState)

    hidden, pull_back, rngs = jax.vjp(hidden_of, state.lora, has_aux=True)
    model = merged(graph, state, frozen)
    loss, gradient = head_loss(model, hidden, part, divisor=learned, with_gradient=True)
    (grads,) = pull_back(gradient)
    return (jax.tree.map(jnp.add, total, grads), rngs), loss

  zeros = jax.tree.map(jnp.zeros_like, state.lora)
  (grads, rngs), losses = jax.lax.scan(accumulate, (zeros, state.rngs), batch)
  updates, opt_state = tx.update(grads, state.opt_state, state.lora)
  lora = optax.apply_updates(state.lora, updates)
  measured = {"loss": losses.sum(), "grad_norm": optax.tree.norm(grads)}
  return State(lora, opt_state, rngs), measured


def eval_step(graph: Any, state: State, frozen: Any, batch: Batch) -> jax.Array:
  """Cross-entropy summed over the learned tokens of a batch."""
  model = merged(graph, state, frozen)
  hidden = model.hidden(batch.inputs)
  return head_loss(model, hidden, batch, divisor=1.0, with_gradient=False)[0]


def compiled(graph: Any, tx: Any, state: State, frozen: Any, batch: Batch) -> Any:
  """`train_step`, compiled; the old state's memory is given to the new one."""
  step = jax.jit(partial(train_step, graph, tx), donate_argnums=0)
  return step.lower(state, frozen, batch).compile()


# ------------------------------------------------------------------------------------ the whole run


def finetune(s: Settings) -> int:
  """Runs one fine-tuning; returns the process's exit status."""
  begun = time.perf_counter()
  with sentences():  # what can be refused is refused here, before anything slow begins
    tx, schedule = optimizer(s)
    out = output_folder(s)
    model_path = Path(s.model) if s.model else default_model(say)
    config = open_checkpoint(model_path).config
    quantize = "nf4" if s.quantize == "nf4" else None
    shapes = abstract_llama(config, quantize, jnp.dtype(s.dtype))
    shapes = nnx.eval_shape(partial(adapted, s=s), shapes)
    if s.dry_run:
      return dry_run(s, tx, *split(shapes, partial(jax.eval_shape, tx.init)))
    tokenizer = ChatTokenizer.from_model(model_path)
    check_fit(s, tokenizer, config)
    data_path = Path(s.data) if s.data else default_data(say)
    data_sha256 = sha256_of(data_path)
    if s.resume:
      check_same_data(Path(s.resume), data_sha256, data_path)
    data = load(data_path, tokenizer, s.seq_len)
    rows, held_rows = data.split()
    held_rows = held_rows[: s.eval_batches * s.batch_size]
    say(f"Model: {model_path.name}, {config.parameter_count():,} parameters.")
    say(f"Data: {data_path.name}, {data.kind}, {tokenizer.template.name} template.")
    say(f"{len(rows):,} rows to learn from, {len(held_rows):,} to measure with.")
    for note in data.notes:
      say(note)
    model = adapted(load_llama(model_path, quantize, dtype=jnp.dtype(s.dtype)), s)
    graph, state, frozen = split(model, tx.init)
    start, records = 0, []
    if s.resume:
      state, start = load_state(Path(s.resume) / "state.safetensors", state)
      records = read_records(Path(s.resume) / "metrics.jsonl", until=start)
      if start >= s.steps:
        raise ValueError(f"--resume {s.resume}: all {start} steps are done already.")
    out.mkdir(parents=True, exist_ok=True)

  shape = {"seq_len": s.seq_len, "pad_id": tokenizer.pad_id}
  batches = Batches(rows, s.batch_size, s.grad_accum, seed=s.seed, **shape)
  held_out = [
    pad(held_rows[i : i + s.batch_size], s.batch_size, **shape)
    for i in range(0, len(held_rows), s.batch_size)
  ]
  model = merged(graph, state, frozen)
  model.eval()  # no dropout
  quiet = nnx.graphdef(model)
  eval_fn = jax.jit(partial(eval_step, quiet))
  samples = Samples(quiet, tokenizer, held_rows)

  def measure() -> dict[str, Any]:
    loss = sum(float(eval_fn(state, frozen, batch)) for batch in held_out)
    return {"held_out_loss": loss / sum(int(batch.learned.sum()) for batch in held_out)}

  def speak() -> dict[str, Any]:
    return {"samples": samples(state.lora, state.rngs, frozen)}

  def save(step: int) -> None:
    save_state(out / "state.safetensors", state, step)
    model = merged(graph, state, frozen)
    lowmem_nn.save_peft(model, out / "adapter", base_model=s.model or MODEL_NAME, overwrite=True)

  step_fn = compiled(graph, tx, state, frozen, batches.at(start))
  if start == 0:
    say("Held-out loss and samples before training ...")
    records = [{"step": 0, **measure(), **speak()}]
  save_settings(s, out, data_sha256)
  metrics = Metrics(out / "metrics.jsonl", records)

  with CtrlC() as ctrl_c, StepBar(start, s.steps) as bar:
    for step in range(start, s.steps):
      batch, clock = batches.at(step), time.perf_counter()
      state, measured = step_fn(state, frozen, batch)
      measured = {name: float(value) for name, value in measured.items()}
      seconds = time.perf_counter() - clock
      done, tokens = step + 1, int(batch.lengths.sum())
      if not math.isfinite(measured["loss"] + measured["grad_norm"]):
        complain(
          f"Step {done} gave a loss of {measured['loss']} and a gradient norm of "
          f"{measured['grad_norm']}; training cannot go on. Try a lower --lr (now "
          f"{s.lr}). What --save-every saved before is in {out}."
        )
        return 1
      metrics.add(step=done, **measured, lr=float(schedule(step)), tokens=tokens, seconds=seconds)
      bar.advance(done, running_mean(metrics.losses())[-1], tokens, seconds, memory_in_use())
      if ctrl_c.asked or done == s.stop_after:
        break
      if s.eval_every and done % s.eval_every == 0 and done < s.steps:
        metrics.add(step=done, **measure())
      if s.save_every and done % s.save_every == 0:
        save(done)
  save(done)
  if done < s.steps:
    say(f"Stopped after step {done}. The adapter so far is in {out / 'adapter'}.")
    say(f"To go on: python {sys.argv[0]} --resume {out}")
    return 130 if ctrl_c.asked else 0

  metrics.add(step=done, **measure(), **speak())
  loss_picture(out / "loss.png", metrics.having("loss"), metrics.having("held_out_loss"))
  parts = byte_parts(frozen, state.lora, state.opt_state, s.optim)
  print_bytes(parts, step_fn.memory_analysis().temp_size_in_bytes)
  conclude(out, metrics, parts, seconds=time.perf_counter() - begun)
  return 0


def dry_run(s: Settings, tx: Any, graph: Any, state: State, frozen: Any) -> int:
  """Prints the shapes of what would be trained and the memory of a step; from shapes alone."""
  shape = (s.grad_accum, s.batch_size, s.seq_len)
  ids, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool)
  batch = Batch(ids, ids, mask, jax.ShapeDtypeStruct(shape[:2], jnp.int32))
  print_shapes(state.lora)
  say(f"Compiling a step of {s.grad_accum} x {s.batch_size} x {s.seq_len} tokens ...")
  temporaries = compiled(graph, tx, state, frozen, batch).memory_analysis().temp_size_in_bytes
  print_bytes(byte_parts(frozen, state.lora, state.opt_state, s.optim), temporaries)
  return 0


def check_fit(s: Settings, tokenizer: ChatTokenizer, config: LlamaConfig) -> None:
  """Raises ValueError where the tokenizer or the rows do not suit the model."""
  if tokenizer.vocab_size > config.vocab_size:
    raise ValueError(
      f"The tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}: "
      "they do not belong together."
    )
  if s.seq_len > config.max_position_embeddings:
    raise ValueError(
      f"--seq-len {s.seq_len} is more than the {config.max_position_embeddings} positions "
      "this model was made for."
    )


def main(argv: list[str] | None = None) -> int:
  try:
    with sentences():
      settings = parse(__doc__ or "", argv)
    return finetune(settings)
  except KeyboardInterrupt:
    complain("Stopped at once; what was not saved yet is lost.")
    return 130


if __name__ == "__main__":
  sys.exit(main())
