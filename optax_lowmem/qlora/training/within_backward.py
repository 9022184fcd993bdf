"""One step of training all parameters, each layer updated within the backward pass.

The model is cut in three for `lowmem.update_in_backward`: what precedes the layers, one layer, and
what follows them. With tied embeddings the table is in the first and in the last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import optax_lowmem as lowmem
from optax_lowmem.qlora.data.batches import Batch
from optax_lowmem.qlora.training.devices import ALONE, Spread
from optax_lowmem.qlora.training.step import Method, State, head_loss, merged, of_head


class SquaredNorms(NamedTuple):
  """State of `_measured`: of each parameter the sum of squares of its last gradient, unclipped."""

  squared_norms: Any


def within_backward(
  graph: Any,
  tx: optax.GradientTransformation,
  *,
  clip_norm: float | None = None,
  spread: Spread = ALONE,
) -> Method:
  """How a model is trained where one layer's gradients exist at a time.

  To rounding, a step is `train_step` of a batch of one part if the optimizer is elementwise, as
  AdamW is. One that takes norms or means of an array (CAME, LAMB) is given the arrays of one layer
  at a time; `train_step` gives it those of all layers as one. As there, `measured` has the norm of
  the gradients before they are clipped.

  Args:
    graph: the model's, as `split` gives it.
    tx: the optimizer, of a layer and of what is no layer.
    clip_norm: the largest norm of all gradients, larger ones are scaled to it; it costs a second
      backward pass.
    spread: over which devices.
  """
  tx = optax.chain(_measured(clip_norm), tx)

  def training(state: State, frozen: Any) -> Any:
    return lowmem.update_in_backward(
      *_pieces(graph, state, frozen, spread), tx, clip_norm=clip_norm
    )

  def init(trained: Any) -> Any:
    return training(State(trained, None, None), None).init(_pure(parted(trained)))

  def step(state: State, frozen: Any, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    part = jax.tree.map(lambda x: x[0], batch)
    model = merged(graph, state, frozen)
    positions = jnp.arange(part.inputs.shape[-1], dtype=jnp.int32)[None]
    if part.segments is not None:
      positions = part.positions
    given = part, state.rngs, model.model.around(part.inputs, positions, part.segments)
    parts = parted(state.trained)
    args = _pure(parts), state.opt_state, given, model.model.of_layers()
    loss, new, opt_state = training(state, frozen).step(*args)
    model.model.embedded(part.inputs)  # for the noise's counter alone, which moves on
    squares = jax.tree.leaves([opt_state[name][0] for name in new])
    norm = jnp.sqrt(sum(each.sum() for each in squares))
    rngs = nnx.state(model, nnx.RngState)
    return State(_whole(_boxed(new, parts)), opt_state, rngs), {"loss": loss, "grad_norm": norm}

  return Method(init, step, _at_a_time)


def parted(trained: Any) -> dict[str, Any]:
  """What is trained, as `lowmem.update_in_backward` takes it: the layers, and what is none."""
  layers, outer = nnx.split_state(trained, lambda path, _: "layers" in path, ...)
  return {"outer": outer, "layers": layers}


def _at_a_time(trained: Any) -> dict[str, Any]:
  """What is no layer, and one layer."""

  def one(x: Any) -> Any:
    where = getattr(x, "sharding", None)
    if isinstance(where, NamedSharding):
      where = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=where)

  parts = parted(trained)
  return parts | {"layers": jax.tree.map(one, parts["layers"])}


def _pure(parts: dict[str, Any]) -> dict[str, Any]:
  """The same without the boxes of Flax, as an optimizer has its state.

  By its key path, `lowmem.update_in_backward` knows which parameter an array of the state is of.
  """
  return {name: nnx.to_pure_dict(part) for name, part in parts.items()}


def _boxed(tree: Any, like: Any) -> Any:
  """In the boxes of `like`."""
  return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))


def _whole(parts: dict[str, Any]) -> Any:
  return nnx.merge_state(parts["outer"], parts["layers"])


def _pieces(graph: Any, state: State, frozen: Any, spread: Spread) -> tuple[Any, Any, Any]:
  """What precedes the layers, a layer, and what follows them with the loss, as functions."""
  parts = parted(state.trained)
  stacks = parts["layers"]  # which the first and the last do not read

  def model_of(outer: Any, rngs: Any) -> Any:
    trained = _whole({"outer": outer, "layers": stacks})
    return merged(graph, State(trained, None, rngs), frozen)

  def embed(outer: Any, given: Any) -> jax.Array:
    part, rngs, _ = given
    return model_of(_boxed(spread.laid(outer), parts["outer"]), rngs).model.embedded(part.inputs)

  def layer(params: Any, x: jax.Array, given: Any, own: Any) -> jax.Array:
    _, rngs, around = given
    model = merged(graph, state._replace(rngs=rngs), frozen).model
    params = spread.laid(params, of_one_layer=True)
    block = nnx.merge(nnx.graphdef(model.layers), _boxed(params, stacks)["model"]["layers"])
    return model.layer(block, x, around, own)

  def head(outer: Any, x: jax.Array, given: Any) -> jax.Array:
    part, rngs, _ = given
    outer = _boxed(spread.laid(outer), parts["outer"])
    hidden = model_of(outer, rngs).model.norm(x)
    return _loss(graph, frozen, spread.shards, outer, stacks, hidden, part, rngs)

  return embed, layer, head


def _loss(
  graph: Any, frozen: Any, shards: int, outer: Any, stacks: Any, hidden: Any, part: Any, rngs: Any
) -> jax.Array:
  """The mean loss of a part; its gradients are made with it, of some positions at a time."""
  divisor = part.learned.sum()

  def found(outer: Any, hidden: Any, part: Any, rngs: Any, with_gradient: bool) -> Any:
    state = State(_whole({"outer": outer, "layers": stacks}), None, rngs)
    return head_loss(
      graph, state, frozen, hidden, part,
      divisor=divisor, with_gradient=with_gradient, shards=shards,
    )  # fmt: skip

  @jax.custom_vjp
  def loss(outer: Any, hidden: Any, part: Any, rngs: Any) -> jax.Array:
    return found(outer, hidden, part, rngs, False).loss

  def forward(outer: Any, hidden: Any, part: Any, rngs: Any) -> tuple[jax.Array, Any]:
    done = found(outer, hidden, part, rngs, True)
    state = _whole({"outer": outer, "layers": stacks})
    tied = merged(graph, State(state, None, rngs), frozen).config.tie_word_embeddings
    grads = jax.tree.map(jnp.zeros_like, state)
    leaves, structure = jax.tree.flatten(grads)
    for n, slope in zip(of_head(state, tied), done.head, strict=True):
      leaves[n] = slope
    return done.loss, (parted(structure.unflatten(leaves))["outer"], done.hidden)

  def backward(slopes: Any, of_loss: jax.Array) -> tuple[Any, ...]:
    of_outer, of_hidden = jax.tree.map(lambda x: x * of_loss.astype(x.dtype), slopes)
    return of_outer, of_hidden, None, None

  loss.defvjp(forward, backward)
  return loss(outer, hidden, part, rngs)


def _measured(clip_norm: float | None) -> optax.GradientTransformationExtraArgs:
  """Notes how large each gradient was before it was clipped, and leaves it as it is."""

  def init(params: Any) -> SquaredNorms:
    return SquaredNorms(jax.tree.map(lambda _: jnp.zeros(()), params))

  def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
    del state, params
    scale = 1.0 if clip_norm is None else jnp.maximum(1.0, extra_args["grad_norm"] / clip_norm)
    norms = jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32) * scale).sum(), updates)
    return updates, SquaredNorms(norms)

  return optax.GradientTransformationExtraArgs(init, update)
