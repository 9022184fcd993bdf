"""What a plan is made for: trees, functions that make them, models."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import jax

from optax_lowmem._state.nnx_variables import is_model


def trees_of(name: str, target: Any, wrt: Any = None) -> tuple[Any, Any, bool]:
  """What is trained, what is not, and whether the first are adapters.

  Args:
    name: the argument's name, for errors.
    target: a tree of arrays or shapes; a function of no arguments that makes one; an NNX model; or
      a model's name, its ``config.json`` as a path or a dictionary.
    wrt: of an NNX model, what is trained.

  Raises:
    TypeError: for anything else.
    ValueError: where `wrt` is given and there is no NNX model; for a model that is not known.
    ImportError: for a model by name, where what reads configurations is not installed.
  """
  if is_model(target):
    flax = sys.modules["flax.nnx"]
    lora = wrt is None and bool(jax.tree.leaves(flax.state(target, flax.LoRAParam)))
    kind = (flax.LoRAParam if lora else flax.Param) if wrt is None else wrt
    _, trained, frozen = flax.split(target, kind, ...)
    if not jax.tree.leaves(trained):
      raise ValueError(f"`wrt` {kind} names nothing of this {type(target).__name__}.")
    return trained, frozen, lora or kind is flax.LoRAParam
  if wrt is not None:
    raise ValueError(f"`wrt` is for NNX models, got a {type(target).__name__} with wrt={wrt!r}.")
  if isinstance(target, str | PurePath) or (isinstance(target, Mapping) and "model_type" in target):
    target = _model_shapes(target)
  tree = jax.eval_shape(target) if callable(target) else target
  leaves = jax.tree.leaves(tree)
  strange = [x for x in leaves if not (hasattr(x, "dtype") and hasattr(x, "shape"))]
  if strange or not leaves:
    what = type(strange[0]).__name__ if strange else "nothing"
    raise TypeError(
      f"`{name}` must hold arrays or shapes, got {what} in a {type(target).__name__}. Pass "
      "parameters, their shapes, or an NNX model."
    )
  return tree, (), False


def _model_shapes(source: Any) -> dict[str, Any]:
  """The shapes of a model that is known by its name or configuration.

  The readers of configurations belong to the program, which nothing of the library imports: they
  are asked for by name, when somebody has named a model.
  """
  try:
    return importlib.import_module("optax_lowmem.qlora").model_shapes(source)
  except ModuleNotFoundError as error:
    raise ImportError(
      f"A plan for the model {str(source)!r:.80} needs {error.name}: "
      "pip install 'optax_lowmem[qlora]', or pass its parameters' shapes."
    ) from error
