"""`update_in_backward`: a training step in which one layer's gradients exist at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowmem._arguments.checks import check, check_transformation
from optax_lowmem._backward.layer_loops import backward, forward, squares, squares_of_all
from optax_lowmem._backward.refused import (
  check_loss,
  check_params,
  check_stacked_state,
  check_state,
  check_transformation_now,
)
from optax_lowmem._backward.stacked_state import over_pages, stacked_state
from optax_lowmem._backward.stacks import count_of
from optax_lowmem._host_memory.capacity import devices_of
from optax_lowmem._host_memory.pages import is_paged
from optax_lowmem._masters.position_noise import numbered_from
from optax_lowmem._paging.lazy_state import committed


class BackwardTraining(NamedTuple):
  """What `update_in_backward` makes: two functions, as an optax transformation is.

  Attributes:
    init: ``init(params) -> state``.
    step: ``step(params, state, batch, inputs=None, **extra_args) -> loss, params, state``; with
      `has_aux`, ``(loss, aux), params, state``.
  """

  init: Callable[[Any], Any]
  step: Callable[..., tuple[Any, Any, Any]]


def update_in_backward(
  embed: Callable[..., Any],
  layer: Callable[..., Any],
  head: Callable[..., Any],
  tx: optax.GradientTransformation,
  *,
  outer_tx: optax.GradientTransformation | None = None,
  clip_norm: float | None = None,
  has_aux: bool = False,
) -> BackwardTraining:
  r"""Trains stacked layers with each layer's update within the backward pass.

  An ordinary step makes all gradients and then updates all parameters. Here a loop goes through the
  layers from the last to the first, and updates each as soon as its gradient is there, in the place
  of the old. With :math:`x_{l+1} = f(\theta_l, x_l)` and :math:`\bar{x}_n` the gradient of the loss
  by what the head was given,

  .. math::
    (g_l, \bar{x}_l) &= \mathrm{vjp}_f(\theta_l, x_l)(\bar{x}_{l+1}), \\
    (u_l, s_l) &\leftarrow \mathrm{tx}(g_l, s_l, \theta_l), \qquad
    \theta_l \leftarrow \theta_l + u_l, \qquad l = n - 1, \dots, 0.

  So the gradients of one layer exist at a time, not those of all. Of the forward pass the inputs
  :math:`x_l` are kept, and what lies within a layer is computed again, as by activation
  checkpointing of every layer. Results are those of the ordinary step over a list of layers, each
  a parameter tree of its own, to rounding.

  Parameters are ``{"outer": tree, "layers": tree}``. All arrays of `layers` have a leading axis,
  over the layers, as `nnx.vmap`, Linen's `nn.scan` and `jax.lax.scan` have them. `outer` is what is
  not a layer: embeddings, norms, the head. It gets one gradient from both ends, tied embeddings
  that of their two uses, and an ordinary update after the loop.

  The state is ``{"outer": tx.init(outer), "layers": jax.vmap(tx.init)(layers)}``: a transformation
  sees one layer at a time. Each counts its own steps, norms are those of a layer
  (``optax.chain(optax.clip_by_global_norm(1.0), tx)`` clips each layer by itself), and masks by
  path see the tree of a layer, without its axis. The global norm is `clip_norm`: it is not known
  before the last gradient, so there is a first backward pass for the norm alone, which costs the
  time of one.

  Of a `tx` that is `offloaded`, or has that within, the state of layers rests in host memory, the
  last layer first. What a parameter has in one layer is fetched while gradients are computed, and
  stored while the next parameter is updated. `unpaged` and `paged` convert the state.

  Call `step` under `jax.jit` and donate parameters and state; else there are two of each::

    step = jax.jit(training.step, donate_argnums=(0, 1))

  On a mesh, the state lies as the parameters do, and keeps to it on explicit axes; on automatic
  ones name `out_shardings`, as for any step.

  Args:
    embed: ``embed(outer, batch) -> x``, what precedes the layers. `x` is an array or a tree of
      arrays of floats.
    layer: ``layer(params, x, batch) -> x`` with the parameters of one layer, without the leading
      axis; ``layer(params, x, batch, inputs)`` if `step` is given `inputs`. The new `x` has the
      shapes and dtypes of the old. Gradients do not go through `batch` and `inputs`.
    head: ``head(outer, x, batch) -> loss``, a scalar; ``(loss, aux)`` with `has_aux`.
    tx: the transformation, for each layer and, without `outer_tx`, for `outer`: quantized or not,
      `offloaded` or not, within `master_weights` or `stochastic_rounding`, whose random bits differ
      between layers.
    outer_tx: the transformation for `outer`, which may be `offloaded`, too.
    clip_norm: the largest global norm of all gradients, those of `outer` too; larger ones are
      scaled as by `optax.clip_by_global_norm`.
    has_aux: whether `head` returns a pair.

  Returns:
    A `BackwardTraining`. Its `init(params)` makes the state. Its
    `step(params, state, batch, inputs=None, **extra_args)` returns the loss (or ``(loss, aux)``),
    the new parameters and the new state. `batch` is any tree, given to all three functions;
    `inputs` a tree of arrays with a leading axis over layers, which are not trained: windows, keys
    of random numbers, frozen weights. `extra_args` and the loss, as ``value``, are given to
    updates, as `optax.contrib.reduce_on_plateau` wants it; with `clip_norm` also the norm of all
    gradients, as ``grad_norm``.

  Raises:
    TypeError: if `embed`, `layer` or `head` is no function, or `tx` or `outer_tx` no
      transformation; from `step`, for a layer that returns another structure, shape or dtype than
      it is given, an `x` that has no gradient, or a loss that is no scalar of floats.
    ValueError: if `clip_norm` is not positive; for a transformation that accumulates gradients over
      steps (`optax.MultiSteps`): to hold them is what this does without; for line searches, which
      want the loss at other parameters. From `init` and `step`, for parameters or `inputs` that are
      not as above, and for layers that are not floats; from `init`, as `offloaded` raises; from
      `step`, for a state of other layers, and for pages that are not in host memory, or not those
      of stacked layers.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_lowmem as lowmem
    >>> training = lowmem.update_in_backward(
    ...   embed=lambda outer, batch: outer["embedding"][batch["tokens"]],
    ...   layer=lambda p, x, batch: x + jnp.tanh(x @ p["w"]),
    ...   head=lambda outer, x, batch: ((x @ outer["out"] - batch["y"]) ** 2).mean(),
    ...   tx=lowmem.adamw(1e-2),
    ... )
    >>> params = {
    ...   "outer": {"embedding": jnp.ones((32, 64)), "out": jnp.ones((64, 1))},
    ...   "layers": {"w": jnp.zeros((12, 64, 64))},
    ... }
    >>> state = training.init(params)
    >>> step = jax.jit(training.step, donate_argnums=(0, 1))
    >>> batch = {"tokens": jnp.arange(8), "y": jnp.zeros((8, 1))}
    >>> for _ in range(3):
    ...   loss, params, state = step(params, state, batch)
    >>> bool(loss < 4096)
    True

  References:
    Lv et al, `Full Parameter Fine-tuning for Large Language Models with Limited Resources
    <https://arxiv.org/abs/2306.09782>`_, 2023 (LOMO); Lv et al, `AdaLomo
    <https://arxiv.org/abs/2310.10195>`_, 2023; Chen et al, `Training Deep Nets with Sublinear
    Memory Cost <https://arxiv.org/abs/1604.06174>`_, 2016
  """
  for name, fn in (("embed", embed), ("layer", layer), ("head", head)):
    if not callable(fn):
      raise TypeError(f"`{name}` must be a function, got {type(fn).__name__}.")
  check_transformation("tx", tx)
  if outer_tx is not None:
    check_transformation("outer_tx", outer_tx)
  check("clip_norm", clip_norm, lambda x: x > 0, "positive")
  check_transformation_now("tx", tx)
  if outer_tx is not None:
    check_transformation_now("outer_tx", outer_tx)
  each = optax.with_extra_args_support(tx)
  outer = optax.with_extra_args_support(tx if outer_tx is None else outer_tx)

  def outer_state(params):
    try:
      return outer.init(params)
    except (TypeError, ValueError) as error:
      if outer_tx is None:
        error.add_note("It is about `outer`: `outer_tx` is for a transformation of its own.")
      raise

  def init(params):
    check_params(params)
    state = {"outer": outer_state(params["outer"]), "layers": stacked_state(tx, params["layers"])}
    check_state("tx", state["layers"])
    check_state("tx" if outer_tx is None else "outer_tx", state["outer"])
    paged = any(map(is_paged, jax.tree.leaves(state, is_leaf=is_paged)))
    return committed(state, devices_of(params)) if paged else state

  def step(params, state, batch, inputs=None, **extra_args):
    check_params(params, inputs)
    layers = params["layers"]
    check_stacked_state(state, count_of(layers))

    def body(p, x, own):
      return layer(p, x, batch) if inputs is None else layer(p, x, batch, own)

    x, pull_embed = jax.vjp(lambda p: embed(p, batch), params["outer"])
    x, given = forward(body, layers, x, inputs)
    given = given, inputs
    loss, pull_head, *aux = jax.vjp(
      lambda p, x: head(p, x, batch), params["outer"], x, has_aux=has_aux
    )
    check_loss(loss)
    from_head, dx = pull_head(jnp.ones_like(loss))

    def of_outer(dx):
      return jax.tree.map(jnp.add, from_head, *pull_embed(dx))

    clipped, extra = _identity, {"value": loss, **extra_args}
    if clip_norm is not None:
      total, first = squares_of_all(body, layers, given, dx)
      norm = jnp.sqrt(total + squares(of_outer(first)))
      clipped, extra = _clip(norm, clip_norm), {"grad_norm": norm, **extra}

    arrays = len(jax.tree.leaves(layers))

    def update(k, grads, state, p):
      with numbered_from(k * arrays):
        updates, state = each.update(clipped(grads), state, p, **extra)
      return optax.apply_updates(p, updates), state

    def loop(state):
      return backward(body, update, layers, state, given, dx)

    new, (layers, dx) = over_pages(loop, state["layers"], layers)
    grads = clipped(of_outer(dx))
    with numbered_from(count_of(layers) * arrays):
      updates, outer_state = outer.update(grads, state["outer"], params["outer"], **extra)
    params = {"outer": optax.apply_updates(params["outer"], updates), "layers": layers}
    return (loss, *aux) if has_aux else loss, params, {"outer": outer_state, "layers": new}

  return BackwardTraining(init, step)


def _identity(grads: Any) -> Any:
  return grads


def _clip(norm: jax.Array, most: float) -> Callable[[Any], Any]:
  """`optax.clip_by_global_norm` of gradients of which the norm is known."""

  def clipped(grads):
    return jax.tree.map(
      lambda g: jnp.where(norm < most, g, (g / norm.astype(g.dtype)) * most).astype(g.dtype), grads
    )

  return clipped
