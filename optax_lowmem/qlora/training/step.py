"""One step of training: the loss in pieces, its gradient, the optimizer."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optax_lowmem as lowmem
from optax_lowmem._steps.sums import plus
from optax_lowmem.qlora.data.batches import Batch
from optax_lowmem.qlora.training.devices import ALONE, Spread


class State(NamedTuple):
  """All that training changes, and all that a resumed run needs."""

  trained: Any  # adapters, and whole layers where asked for; or all parameters
  opt_state: Any
  rngs: Any  # of dropout and noise; empty without


class HeadLoss(NamedTuple):
  """What `head_loss` gives; the gradients are None where they were not asked for."""

  loss: jax.Array
  hidden: Any  # the gradient in the hidden states
  head: Any  # the gradients in the head's own trained leaves, a list
  rngs: Any


class Method(NamedTuple):
  """How a model is trained.

  Attributes:
    init: makes the optimizer's state for what is trained.
    step: ``step(state, frozen, batch) -> state, measured``.
    at_a_time: of shapes of what is trained, those of what has gradients at a time.
  """

  init: Callable[[Any], Any]
  step: Callable[[State, Any, Batch], tuple[State, dict[str, jax.Array]]]
  at_a_time: Callable[[Any], Any]


def ordinary(graph: Any, tx: optax.GradientTransformation, spread: Spread = ALONE) -> Method:
  """All gradients, and then the update.

  Args:
    graph: the model's, as `split` gives it.
    tx: the optimizer.
    spread: over which devices.
  """
  return Method(tx.init, partial(train_step, graph, tx, spread=spread), lambda trained: trained)


def split(model: nnx.Module, init: Any, wrt: Any = nnx.LoRAParam) -> tuple[Any, State, Any]:
  """``(graph, what is trained, what is frozen)``; `merged` puts them together again.

  Args:
    model: the model.
    init: makes the optimizer's state.
    wrt: what is trained, as a filter of NNX.
  """
  graph, trained, rngs, frozen = nnx.split(model, wrt, nnx.RngState, ...)
  return graph, State(trained, init(trained), rngs), frozen


def in_its_memory(state: Any) -> Any:
  """The shapes of an optimizer's state; those of pages say that they are in host memory."""

  def is_paged(x):
    return isinstance(x, lowmem.Paged)

  pages = any(map(is_paged, jax.tree.leaves(state, is_leaf=is_paged)))
  return lowmem.paged(state) if pages else state


def merged(graph: Any, state: State, frozen: Any) -> Any:
  return nnx.merge(graph, state.trained, state.rngs, frozen, copy=True)


def of_head(trained: Any, tied: bool) -> list[int]:
  """Which leaves of what is trained belong to the output layer, by number.

  With tied embeddings the output layer is the table of the input.
  """
  name = "['model']['embed_tokens']" if tied else "['lm_head']"
  leaves = jax.tree_util.tree_leaves_with_path(trained)
  paths = [jax.tree_util.keystr(path) for path, _ in leaves]
  return [i for i, path in enumerate(paths) if path.startswith(name)]


def head_loss(
  graph: Any,
  state: State,
  frozen: Any,
  hidden: jax.Array,
  batch: Batch,
  *,
  divisor: jax.Array | float,
  with_gradient: bool,
  shards: int = 1,
  chunk: int = 128,
) -> HeadLoss:
  """Cross-entropy summed over the learned tokens, by `divisor`; its gradients.

  The logits of all positions would be the largest array of the run: 49,152 numbers a token for
  SmolLM2. So the head is applied to `chunk` positions at a time, and only to learned ones. A
  chunk's gradient is taken at once, in the hidden states and in what of the head is trained, and
  its logits are never needed again.

  Args:
    graph, state, frozen: the model, as `split` gives it.
    hidden: (rows, length, hidden_size).
    batch: of the same rows.
    divisor: of the sum.
    with_gradient: whether gradients are wanted.
    shards: the devices over which rows are spread. Each takes its own chunks, so that no hidden
      state travels.
    chunk: positions at a time, on each device.
  """
  flat = hidden.reshape(shards, -1, hidden.shape[-1])
  targets, learned = (x.reshape(shards, -1) for x in (batch.targets, batch.learned))
  first = jnp.argsort(~learned, axis=1, stable=True)  # learned positions first
  first = jnp.pad(first, ((0, 0), (0, -first.shape[1] % chunk))).reshape(shards, -1, chunk)
  counted = jnp.arange(first[0].size).reshape(1, -1, chunk) < learned.sum(1)[:, None, None]
  leaves, structure = jax.tree.flatten(state.trained)
  tied = merged(graph, state, frozen).config.tie_word_embeddings
  numbers = of_head(state.trained, tied) if with_gradient else []

  def losses(
    head: list[jax.Array], rows: jax.Array, rngs: Any, targets: jax.Array, counted: jax.Array
  ) -> tuple[jax.Array, Any]:
    replaced = dict(zip(numbers, head, strict=True))
    trained = structure.unflatten([replaced.get(i, leaf) for i, leaf in enumerate(leaves)])
    model = merged(graph, State(trained, None, rngs), frozen)
    logits = model.head(rows).astype(jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(counted, each, 0.0).sum() / divisor, nnx.state(model, nnx.RngState)

  def one_chunk(i: jax.Array, carry: HeadLoss) -> HeadLoss:
    at = first[:, i]
    rows = jnp.take_along_axis(flat, at[..., None], axis=1)
    rest = (carry.rngs, jnp.take_along_axis(targets, at, axis=1), counted[:, i])
    head = [leaves[n] for n in numbers]
    if not with_gradient:
      loss, rngs = losses(head, rows, *rest)
      return carry._replace(loss=carry.loss + loss, rngs=rngs)
    slopes = jax.value_and_grad(losses, argnums=(0, 1), has_aux=True)
    (loss, rngs), (of_leaves, slope) = slopes(head, rows, *rest)
    return HeadLoss(
      carry.loss + loss,
      carry.hidden.at[jnp.arange(shards)[:, None], at].add(slope),
      jax.tree.map(jnp.add, carry.head, of_leaves),
      rngs,
    )

  start = HeadLoss(
    jnp.zeros((), jnp.float32),  # with jax_enable_x64 too: `train_step` takes its 32 bits
    jnp.zeros_like(flat) if with_gradient else None,
    # In bfloat16 a sum of more than 256 chunks would stand still.
    [jnp.zeros_like(leaves[n], jnp.float32) for n in numbers],
    state.rngs,
  )
  chunks = counted.any(axis=(0, 2)).sum()
  done = jax.lax.fori_loop(0, chunks, one_chunk, start)
  if not with_gradient:
    return done
  slopes = [sum_.astype(leaves[n].dtype) for sum_, n in zip(done.head, numbers, strict=True)]
  return done._replace(hidden=done.hidden.reshape(hidden.shape), head=slopes)


def hidden_states(model: Any, batch: Batch) -> jax.Array:
  """The model's last hidden states, of rows that stand alone or are packed."""
  if batch.segments is None:  # padding is on the right, where causal attention does not look
    return model.hidden(batch.inputs)
  return model.hidden(batch.inputs, positions=batch.positions, segments=batch.segments)


def train_step(
  graph: Any,
  tx: Any,
  state: State,
  frozen: Any,
  batch: Batch,
  *,
  spread: Spread = ALONE,
) -> tuple[State, Any]:
  """One step of the optimizer; the gradients of `batch`'s leading axis are summed.

  In their dtype: sums in bfloat16 are rounded at random, so that their mean is right.
  """
  passes = batch.inputs.shape[0]
  learned = batch.learned.sum()
  tied = merged(graph, state, frozen).config.tie_word_embeddings
  numbers = of_head(state.trained, tied)

  def accumulate(carry: Any, given: tuple[jax.Array, Batch]) -> tuple[Any, jax.Array]:
    (total, rngs), (number, part) = carry, given

    def hidden_of(trained: Any) -> tuple[jax.Array, Any]:
      model = merged(graph, State(trained, None, rngs), frozen)
      return hidden_states(model, part), nnx.state(model, nnx.RngState)

    hidden, pull_back, rngs = jax.vjp(hidden_of, state.trained, has_aux=True)
    head = head_loss(
      graph, state._replace(rngs=rngs), frozen, hidden, part,
      divisor=learned, with_gradient=True, shards=spread.shards,
    )  # fmt: skip
    if passes == 1:
      (grads,) = pull_back(head.hidden)
      grads = _plus_some(grads, numbers, head.head)
      return (jax.tree.map(jnp.add, total, grads), head.rngs), head.loss
    # Noise has no key; the loss is another one in each step. The head's come first, and before the
    # backward pass: XLA would hold them in float32 until its end.
    words = jax.lax.bitcast_convert_type(head.loss, jnp.uint32), number
    total = _plus_some(total, numbers, head.head, (*words, 0))
    total, hidden = jax.lax.optimization_barrier((total, head.hidden))
    (grads,) = pull_back(hidden)
    return (plus(total, grads, (*words, 1)), head.rngs), head.loss

  zeros, numbered = jax.tree.map(jnp.zeros_like, state.trained), (jnp.arange(passes), batch)
  (grads, rngs), losses = jax.lax.scan(accumulate, (zeros, state.rngs), numbered)
  grads = spread.laid(grads)
  updates, opt_state = tx.update(grads, state.opt_state, state.trained)
  trained = optax.apply_updates(state.trained, updates)
  # Of bfloat16 parameters the gradients are bfloat16, and three digits are too few for a norm.
  norm = optax.tree.norm(optax.tree.cast(grads, jnp.float32))
  measured = {"loss": losses.sum(), "grad_norm": norm}
  return State(trained, opt_state, rngs), measured


def _plus_some(tree: Any, numbers: list[int], more: list[Any], words: Any = None) -> Any:
  """A tree, and to the leaves of these numbers more is added; by `plus` if there are words."""
  leaves, structure = jax.tree.flatten(tree)
  some = [leaves[n] for n in numbers]
  new = jax.tree.map(jnp.add, some, more) if words is None else plus(some, more, words)
  for n, leaf in zip(numbers, new, strict=True):
    leaves[n] = leaf
  return structure.unflatten(leaves)


def eval_step(graph: Any, state: State, frozen: Any, batch: Batch, *, shards: int = 1) -> jax.Array:
  """Cross-entropy summed over the learned tokens of a batch."""
  hidden = hidden_states(merged(graph, state, frozen), batch)
  return head_loss(
    graph, state, frozen, hidden, batch, divisor=1.0, with_gradient=False, shards=shards
  ).loss


def compiled(step: Callable[..., Any], state: State, frozen: Any, batch: Batch) -> Any:
  """A step, compiled; the old state's memory is given to the new one.

  The new state lies where the old one did, on the same devices and in the same kind of memory.
  """
  places: Any = [getattr(x, "sharding", None) for x in jax.tree.leaves(state)]
  known = all(place is not None for place in places)  # in a dry run there are shapes only
  out = (jax.tree.unflatten(jax.tree.structure(state), places), None) if known else None
  jitted = jax.jit(step, donate_argnums=0, out_shardings=out)
  return jitted.lower(state, frozen, batch).compile()


class Steps:
  """A step, compiled when a batch of a new length comes, and never again.

  Attributes:
    programs: the compiled step for each shape of batch.
  """

  def __init__(self, step: Callable[..., Any]):
    self.step = step
    self.programs: dict[tuple[int, ...], Any] = {}

  def ready(self, state: State, frozen: Any, batch: Batch) -> Any:
    """The program for batches like this one."""
    shape = batch.inputs.shape
    if shape not in self.programs:
      self.programs[shape] = compiled(self.step, state, frozen, batch)
    return self.programs[shape]

  def __call__(self, state: State, frozen: Any, batch: Batch) -> tuple[State, Any]:
    return self.ready(state, frozen, batch)(state, frozen, batch)

  def temporaries(self) -> int:
    """Bytes that the largest of the programs needs beside its arguments and results."""
    return max((p.memory_analysis().temp_size_in_bytes for p in self.programs.values()), default=0)
