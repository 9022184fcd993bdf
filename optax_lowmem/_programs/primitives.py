"""What is known of JAX's primitives: which are calls, and which are elementwise."""

from __future__ import annotations

from typing import Any

import jax.extend.core as jec

# Primitives that only wrap a jaxpr, and the parameter that holds it.
_CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
    "remat": "jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
}  # fmt: skip
_CUSTOM = ("custom_jvp_call", "custom_vjp_call")

# Primitives whose every output element depends on just the same element of each operand.
ELEMENTWISE = frozenset(
  """
  abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type
  copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite
  le lgamma log log1p logistic lt max min mul ne neg nextafter not or pow reduce_precision rem round
  rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
  stop_gradient sub tan tanh xor
  """.split()
)


def called(eqn: Any, custom: bool = True) -> jec.ClosedJaxpr | None:
  """The program that an equation does nothing but call; None if it does something else.

  Args:
    eqn: the equation.
    custom: whether it may have a derivative of its own.
  """
  name = eqn.primitive.name
  if not custom and name in _CUSTOM:
    return None
  inner = eqn.params.get(_CALLS.get(name, ""))
  return inner if inner is None or hasattr(inner, "consts") else jec.ClosedJaxpr(inner, ())


def is_var(atom: Any) -> bool:
  """Whether an operand of an equation is a variable, not a number that is written there."""
  return not isinstance(atom, jec.Literal)
