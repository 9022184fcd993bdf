"""The optimizers by name: optax's own, their moments held in few bits."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import optax

from optax_lowmem._quantized import quantized

_DOC = """{summary}

  `optax.{name}` with its moments held in `bits` bits: the same arguments, the same rule, the same
  structure of state. {state}

  Args:
    *args, **kwargs: those of `optax.{name}`.
    bits: 8, or 32 for float32 moments, which gives optax's results bit for bit.
    block_size: elements that share a scale, 64 by default.
    min_size: the moments of smaller arrays stay in float32.
    quantize_mask: a tree of bools with the structure of the parameters or a prefix of it, or a
      function of the parameters that returns one. False keeps a parameter's moments in float32,
      for embeddings, say.

  Returns:
    The transformation.

  Raises:
    ValueError: for bad `bits`, `block_size` or `min_size`.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_lowmem as lowmem
    >>> params = {{"w": jnp.ones((64, 64))}}
    >>> tx = lowmem.{name}({example})
    >>> state = tx.init(params)
    >>> updates, state = tx.update({{"w": params["w"]}}, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> bool((params["w"] < 1).all())
    True

  References:
    Dettmers et al, `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021
  """


def _in_few_bits(
  rule: Callable[..., optax.GradientTransformation], summary: str, state: str, example: str
) -> Callable[..., optax.GradientTransformationExtraArgs]:
  """`rule` with keyword arguments that say how its moments are held."""

  def optimizer(
    *args: Any,
    bits: int = 8,
    block_size: int | None = None,
    min_size: int = 4096,
    quantize_mask: Any | Callable[[Any], Any] | None = None,
    **kwargs: Any,
  ) -> optax.GradientTransformationExtraArgs:
    return quantized(
      rule(*args, **kwargs),
      bits,
      block_size=block_size,
      min_size=min_size,
      quantize_mask=quantize_mask,
    )

  own = inspect.signature(optimizer).parameters.values()
  signature = inspect.signature(rule)
  storage = [p for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY]
  signature = signature.replace(parameters=[*signature.parameters.values(), *storage])
  name = rule.__name__
  optimizer.__name__ = optimizer.__qualname__ = name
  optimizer.__module__ = __name__
  optimizer.__signature__ = signature  # type: ignore[attr-defined]
  optimizer.__doc__ = _DOC.format(name=name, summary=summary, state=state, example=example)
  return optimizer


_TWO = "At 8 bits state takes 2.125 bytes a parameter, against 8 in float32."
_ONE = "At 8 bits state takes 1.0625 bytes a parameter, against 4 in float32."

adam = _in_few_bits(optax.adam, "Adam (Kingma and Ba, 2014).", _TWO, "1e-3")
adamw = _in_few_bits(
  optax.adamw, "Adam with decoupled weight decay (Loshchilov and Hutter, 2019).", _TWO, "1e-3"
)
lion = _in_few_bits(optax.lion, "Lion, sign of a moment (Chen et al, 2023).", _ONE, "1e-4")
sgd = _in_few_bits(
  optax.sgd,
  "Gradient descent, with momentum if asked for (Sutskever et al, 2013).",
  _ONE + " Without momentum there is no state, and `bits` changes nothing.",
  "1e-2, momentum=0.9",
)

# What Hugging Face's trainer and bitsandbytes call them.
_NAMES: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
  "adam": functools.partial(adam, bits=32),
  "adam_8bit": adam,
  "adam8bit": adam,
  "adamw": functools.partial(adamw, bits=32),
  "adamw_torch": functools.partial(adamw, bits=32),
  "adamw_8bit": adamw,
  "adamw8bit": adamw,
  "adamw_bnb_8bit": adamw,
  "lion": functools.partial(lion, bits=32),
  "lion_32bit": functools.partial(lion, bits=32),
  "lion_8bit": lion,
  "lion8bit": lion,
  "sgd": functools.partial(sgd, bits=32),
  "sgd_8bit": functools.partial(sgd, momentum=0.9),
  "sgd8bit": functools.partial(sgd, momentum=0.9),
}


def create(
  name: str, learning_rate: optax.ScalarOrSchedule, **kwargs: Any
) -> optax.GradientTransformationExtraArgs:
  """Makes an optimizer from the name that Hugging Face's trainer or bitsandbytes gives it.

  The names say how many bits: `"adamw_8bit"` is ``adamw(learning_rate, bits=8)``, `"adamw_torch"`
  is ``adamw(learning_rate, bits=32)``. The defaults of all other arguments are optax's
  (`"sgd_8bit"` has a momentum of 0.9, without which it would have no state).

  Args:
    name: the name; upper or lower case.
    learning_rate: a number or an optax schedule.
    **kwargs: further arguments of the optimizer of that name.

  Returns:
    The transformation.

  Raises:
    ValueError: if the name is not known; lists those that are.

  Examples:
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.create("adamw_8bit", 3e-4, weight_decay=0.01)
    >>> lowmem.create("adamw_8bits", 3e-4)
    Traceback (most recent call last):
      ...
    ValueError: optimizer name 'adamw_8bits' is unknown. Did you mean 'adamw_8bit'? Known: ...
  """
  make = _NAMES.get(str(name).lower())
  if make is None:
    near = difflib.get_close_matches(str(name).lower(), _NAMES, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ValueError(
      f"optimizer name {name!r} is unknown. {hint}Known: {', '.join(sorted(_NAMES))}."
    )
  return make(learning_rate, **kwargs)
