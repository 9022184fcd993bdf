"""`create`: the optimizers by the names that trainers give them."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import optax
import optax.contrib

from optax_lowmem._arguments.spelling import nearest
from optax_lowmem._optimizers.adafactor import adafactor
from optax_lowmem._optimizers.adagrad_rmsprop import adagrad, rmsprop
from optax_lowmem._optimizers.adam import adam, adamw
from optax_lowmem._optimizers.ademamix import ademamix
from optax_lowmem._optimizers.came import came
from optax_lowmem._optimizers.lamb_lars import lamb, lars
from optax_lowmem._optimizers.lion_sgd import lion, sgd
from optax_lowmem._paging.offloaded import offloaded

_Make = Callable[..., optax.GradientTransformationExtraArgs]


def _names() -> dict[str, _Make]:
  """What Hugging Face's trainer, bitsandbytes and torchao call them, but for case and spelling."""
  known: dict[str, _Make] = {}
  rules: tuple[_Make, ...] = (adagrad, adam, adamw, ademamix, lamb, lars, lion, rmsprop, sgd)
  for rule in rules:
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


def letters_of(name: str) -> str:
  """A name without what people spell differently: "PagedAdamW8bit" is "paged_adamw_8bit"."""
  return re.sub(r"[^a-z0-9]", "", name.lower())


def _optaxs() -> dict[str, str]:
  """Where optax keeps its own optimizers, by the letters of their names."""
  homes = (("optax", optax), ("optax.contrib", optax.contrib))
  return {
    letters_of(name): f"{home}.{name}"
    for home, module in homes
    for name, f in vars(module).items()
    if inspect.isfunction(f) and "learning_rate" in inspect.signature(f).parameters
  }


_NAMES = _names()
SPELLED = {letters_of(name): name for name in _NAMES}


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
    name: `"adagrad"`, `"adam"`, `"adamw"`, `"ademamix"`, `"lamb"`, `"lars"`, `"lion"`, `"rmsprop"`
      or `"sgd"`, alone or with `"_32bit"`, `"_8bit"` or `"_4bit"` after it; `"adafactor"` or
      `"came"`; or what others call these (`"adamw_torch_fused"`, `"adamw_bnb_8bit"`). Each also
      with `"paged_"` before it, and in any case and spelling: `"PagedAdamW8bit"` is
      `"paged_adamw_8bit"`. A string, since it often comes from a file: tools do not check it.
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
  asked = letters_of(name) if isinstance(name, str) else ""
  if asked not in SPELLED:
    known = ", ".join(sorted(n for n in _NAMES if not n.startswith("paged_")))
    raise ValueError(
      f"optimizer name {name!r} {_reason(asked)} Known: {known}; each also as 'paged_…'."
    )
  return _NAMES[SPELLED[asked]](learning_rate, **kwargs)


def _reason(asked: str) -> str:
  """Why a name is refused, and what to ask for instead."""
  match = re.fullmatch(r"(paged)?(.*?)(?:(32|8|4)bit)?", asked)
  assert match is not None  # all of it is optional
  paged, rule, bits = match.groups()
  if rule in (optaxs := _optaxs()):
    call = f"{optaxs[rule]}(learning_rate)"
    call = f"quantized({call}, {bits or 8})"
    return f"is optax's own: pass `{f'offloaded({call})' if paged else call}`."
  near = nearest(asked, SPELLED, cutoff=0.5)
  return "is unknown." + (f" Did you mean {SPELLED[near[0]]!r}?" if near else "")
