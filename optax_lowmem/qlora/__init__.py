"""The program `lowmem`, which fine-tunes language models in 4 bits; `model_shapes`, for plans."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from optax_lowmem.qlora.planning.model_source import model_shapes as model_shapes

__all__ = ["model_shapes"]


def __getattr__(name: str) -> Any:
  # Asked for when it is used: the program says by itself what it needs and is not installed.
  if name != "model_shapes":
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from optax_lowmem.qlora.planning.model_source import model_shapes

  return model_shapes
