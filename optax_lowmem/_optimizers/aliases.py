"""The optimizers by name: optax's own, their moments held in few bits."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import optax
import optax.contrib

from optax_lowmem._arguments.hyperparameters import checked
from optax_lowmem._optimizers.adafactor import adafactor
from optax_lowmem._optimizers.came import came
from optax_lowmem._optimizers.lamb_lars import lamb, lars
from optax_lowmem._optimizers.quantized import quantized
from optax_lowmem._paging.offloaded import offloaded

_DOC = """{summary}

{what}

  Args:
    *args, **kwargs: those of `{home}.{name}`.
    bits: 8 or 4; or 32 for float32 moments, which gives optax's results bit for bit where
      parameters and gradients are float32. Of other dtypes, moments and arithmetic are float32
      all the same.
    block_size: elements that share a scale, 64 by default.
    min_size: the moments of smaller arrays stay in float32.
    quantize_mask: a tree of bools with the structure of the parameters or a prefix of it, or a
      function of the parameters that returns one. False keeps a parameter's moments in float32,
      for embeddings, say.

  Returns:
    The transformation.

  Raises:
    ValueError: for bad `bits`, `block_size` or `min_size`; for a dtype of moments, unless `bits` is
      32; for a decay in 16 bits, which `optax.inject_hyperparams` makes for 16-bit parameters.
    TypeError: for an argument that is not known, for text, and for an array where the program
      depends on the value (`bits`, a mask).

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
  home = "optax.contrib" if rule.__module__.startswith("optax.contrib") else "optax"
  what = (
    f"`{home}.{name}` with its moments held in `bits` bits: the same arguments, the same rule, the "
    f"same structure of state. {state}"
  )
  what = textwrap.indent(textwrap.fill(what, 98), "  ")
  optimizer.__doc__ = _DOC.format(home=home, name=name, summary=summary, what=what, example=example)
  return checked(optimizer)


def _state(moments: int) -> str:
  """What `moments` moments cost with one float32 scale for 64 elements."""
  eight, four = moments * (1 + 4 / 64), moments * (1 / 2 + 4 / 64)
  return (
    f"At 8 bits state takes {eight:g} bytes a parameter, at 4 bits {four:g}, against {4 * moments} "
    "in float32."
  )


adagrad = _in_few_bits(optax.adagrad, "Adagrad (Duchi et al, 2011).", _state(1), "1e-2")
adam = _in_few_bits(optax.adam, "Adam (Kingma and Ba, 2014).", _state(2), "1e-3")
adamw = _in_few_bits(
  optax.adamw, "Adam with decoupled weight decay (Loshchilov and Hutter, 2019).", _state(2), "1e-3"
)
ademamix = _in_few_bits(
  optax.contrib.ademamix,
  "AdEMAMix, Adam with a fast and a slow first moment (Pagliardini et al, 2024).",
  _state(3),
  "1e-3",
)
lion = _in_few_bits(optax.lion, "Lion, sign of a moment (Chen et al, 2023).", _state(1), "1e-4")
rmsprop = _in_few_bits(
  optax.rmsprop,
  "RMSProp, with momentum if asked for (Tieleman and Hinton, 2012).",
  _state(1) + " With momentum it takes twice that. With ``centered=True`` both averages stay in "
  "float32, 8 bytes a parameter: rounded, a variance that is their difference could turn negative.",
  "1e-3",
)
sgd = _in_few_bits(
  optax.sgd,
  "Gradient descent, with momentum if asked for (Sutskever et al, 2013).",
  _state(1) + " Without momentum there is no state, and `bits` changes nothing.",
  "1e-2, momentum=0.9",
)

_Make = Callable[..., optax.GradientTransformationExtraArgs]


def _names() -> dict[str, _Make]:
  """What Hugging Face's trainer, bitsandbytes and torchao call them, but for case and spelling."""
  known: dict[str, _Make] = {}
  for rule in (adagrad, adam, adamw, ademamix, lamb, lars, lion, rmsprop, sgd):
    known[rule.__name__] = functools.partial(rule, bits=32)
    for bits in (32, 8, 4):
      # Who asks gradient descent for a number of bits means the bits of a momentum.
      given = {"bits": bits, "momentum": 0.9} if rule is sgd else {"bits": bits}
      known[f"{rule.__name__}_{bits}bit"] = functools.partial(rule, **given)
  # These say nothing of bits: Hugging Face's Adafactor holds float32, and CAME is used in 8 bits.
  known["adafactor"] = functools.partial(adafactor, bits=32)
  known["came"] = came
  also = {
    "adamw_apex_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_torch_npu_fused": "adamw",
    "adamw_torch_xla": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "adamw_torch_4bit": "adamw_4bit",
    "rmsprop_bnb": "rmsprop",
    "rmsprop_bnb_32bit": "rmsprop",
    "rmsprop_bnb_8bit": "rmsprop_8bit",
  }
  known |= {name: known[same] for name, same in also.items()}
  for name, make in list(known.items()):
    known[f"paged_{name}"] = functools.partial(_paged, make)
  return known


def _paged(make: _Make, *args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
  return offloaded(make(*args, **kwargs))


def _letters(name: str) -> str:
  """A name without what people spell differently: "PagedAdamW8bit" is "paged_adamw_8bit"."""
  return re.sub(r"[^a-z0-9]", "", name.lower())


def _optaxs() -> dict[str, str]:
  """Where optax keeps its own optimizers, by the letters of their names."""
  homes = (("optax", optax), ("optax.contrib", optax.contrib))
  return {
    _letters(name): f"{home}.{name}"
    for home, module in homes
    for name, f in vars(module).items()
    if inspect.isfunction(f) and "learning_rate" in inspect.signature(f).parameters
  }


_NAMES = _names()
_SPELLED = {_letters(name): name for name in _NAMES}


def create(
  name: str, learning_rate: optax.ScalarOrSchedule, **kwargs: Any
) -> optax.GradientTransformationExtraArgs:
  """Makes an optimizer from the name that Hugging Face's trainer or bitsandbytes gives it.

  The names say how many bits: `"adamw_8bit"` is ``adamw(learning_rate, bits=8)``, `"adamw"` and
  `"adamw_torch"` are ``adamw(learning_rate, bits=32)``; only `"came"` has 8 without saying so. With
  `"paged_"` before it, as in `"paged_adamw_8bit"`, the state is `offloaded`. The
  defaults of all other arguments are optax's, which are not always PyTorch's (`"sgd_8bit"` has a
  momentum of 0.9, without which it would have no state) or Hugging Face's (whose trainer gives
  `"adafactor"` what here is ``multiply_by_parameter_scale=False``).

  Args:
    name: the name, in any case and spelling: `"PagedAdamW8bit"` is `"paged_adamw_8bit"`.
    learning_rate: a number or an optax schedule.
    **kwargs: further arguments of the optimizer of that name.

  Returns:
    The transformation.

  Raises:
    ValueError: if the name is not known; lists those that are, and says how to make optax's.
    TypeError: for arguments that the optimizer does not have.

  Examples:
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.create("adamw_8bit", 3e-4, weight_decay=0.01)
    >>> lowmem.create("adamw_8bits", 3e-4)
    Traceback (most recent call last):
      ...
    ValueError: optimizer name 'adamw_8bits' is unknown. Did you mean 'adamw_8bit'? Known: ...
  """
  asked = _letters(name) if isinstance(name, str) else ""
  if asked not in _SPELLED:
    known = ", ".join(sorted(n for n in _NAMES if not n.startswith("paged_")))
    raise ValueError(
      f"optimizer name {name!r} {_reason(asked)} Known: {known}; each also as 'paged_…'."
    )
  return _NAMES[_SPELLED[asked]](learning_rate, **kwargs)


def _reason(asked: str) -> str:
  """Why a name is refused, and what to ask for instead."""
  match = re.fullmatch(r"(paged)?(.*?)(?:(32|8|4)bit)?", asked)
  assert match is not None  # all of it is optional
  paged, rule, bits = match.groups()
  if rule in (optaxs := _optaxs()):
    call = f"{optaxs[rule]}(learning_rate)"
    call = f"quantized({call}, {bits or 8})"
    return f"is optax's own: pass `{f'offloaded({call})' if paged else call}`."
  near = difflib.get_close_matches(asked, _SPELLED, n=1, cutoff=0.5)
  return "is unknown." + (f" Did you mean {_SPELLED[near[0]]!r}?" if near else "")
