"""A function of pages, on a GPU a few rows at a time, on a CPU at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.extend.core as jec
import jax.numpy as jnp

from optax_lowmem._host_memory.pages import fetch, is_paged, known_on_host, store_as
from optax_lowmem._paging.device_parts import lies_unknown
from optax_lowmem._paging.evaluate import Evaluation
from optax_lowmem._quantization.tangents import PAGES, without_tangent
from optax_lowmem._update.announced import listening


def stream(
  fn: Callable[..., Any],
  args: Any,
  paged_results: Callable[[Any], Iterable[int]],
  replaced: int,
  max_bytes: int,
) -> tuple[list[Any], Any]:
  """Evaluates `fn(*args)` with some of its flat arguments and results in host memory.

  On a CPU, where host and device are one memory, it is evaluated at once; and so it is where only
  the compiler knows how the pages are cut (`lies_unknown`).

  Args:
    fn: a traceable function.
    args: its arguments; in the flattened tuple there may be `Paged`.
    paged_results: given the shapes of the result, the flat positions that are to be `Paged`; at
      these positions there are pages among the arguments.
    replaced: this many flat arguments are not needed after, and results may take their place.
    max_bytes: most bytes of pages, old and new, on the device at a time.

  Returns:
    The flat results and the structure of the result.

  Raises:
    ValueError: if `fn` has callbacks that are to be called in order.
  """
  flat, treedef = jax.tree.flatten(args, is_leaf=is_paged)
  flat: list[Any] = [jax.tree.map(known_on_host, x) if is_paged(x) else _constant(x) for x in flat]
  shapes = [jax.eval_shape(fetch, x) if is_paged(x) else x for x in flat]

  def on_flat(*flat):
    return fn(*treedef.unflatten(flat))

  with listening() as heard:
    closed, out_shape = jax.make_jaxpr(on_flat, return_shape=True)(*shapes)
  if any(str(effect).startswith("Ordered") for effect in closed.effects):
    # jax 0.10 to 0.12 forget the token among the memories of a program's results.
    raise ValueError(
      "`offloaded` was given a transformation with an ordered callback, and JAX compiles no "
      "program that has one beside arrays in host memory. Pass `ordered=False` to `io_callback` "
      "or `jax.debug.print`, or call it outside of the compiled step."
    )
  # A CPU takes sums as it does without pages.
  whole = jax.make_jaxpr(lambda *flat: on_flat(*flat))(*shapes) if heard.phases else closed
  closed, whole = (jec.ClosedJaxpr(x.jaxpr, [*map(_constant, x.consts)]) for x in (closed, whole))
  wanted = list(paged_results(out_shape))

  def at_once(*flat):
    new = jec.jaxpr_as_fun(whole)(*(fetch(x) if is_paged(x) else x for x in flat))
    for k in wanted:
      new[k] = store_as(new[k], flat[k])
    return new

  @jax.custom_batching.custom_vmap
  def by_rows(*flat):
    return Evaluation(closed, heard.updates, flat, wanted, replaced, max_bytes).results()

  @by_rows.def_vmap
  def all_at_once(_, batched, *flat):
    # Rows of many runs would be gathered, from host memory, which JAX refuses.
    axes = jax.tree.map(lambda b: 0 if b else None, tuple(batched))
    results = jax.vmap(at_once, in_axes=axes)(*flat)
    return results, jax.tree.map(lambda _: True, results)

  if lies_unknown([x for x in flat if is_paged(x)]):
    results = at_once(*flat)
  else:
    results = jax.lax.platform_dependent(*flat, cpu=at_once, default=by_rows)
  return list(results), jax.tree.structure(out_shape)


def _constant(x: Any) -> jax.Array:
  """An array that is not differentiated: JAX has no derivative of loops over host memory."""
  return without_tangent(jnp.asarray(x), PAGES)
