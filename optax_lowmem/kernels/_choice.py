"""Which kernel runs, if one does: what was chosen, and what a platform has."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, Literal

import jax
from jax.extend.backend import backends

# Here, and not when first asked for, within the user's step: an import of Pallas adds to what
# programs are cached by from jax 0.12 on, and the step would be traced and compiled twice.
from optax_lowmem.kernels import _pallas, _tpu

_VARIABLE = "OPTAX_LOWMEM_KERNELS"
_SETTINGS = ("auto", "xla", "pallas", "interpret")
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("kernels", default=None)


def setting() -> str:
  """What `using` says, or else `OPTAX_LOWMEM_KERNELS`, or else ``"auto"``.

  Raises:
    ValueError: if it is none of the known.
  """
  if (chosen := _chosen.get()) is not None:
    return chosen
  return _checked(_VARIABLE, os.environ.get(_VARIABLE, "").lower() or _SETTINGS[0])


@contextlib.contextmanager
def using(mode: Literal["auto", "xla", "pallas", "interpret"]) -> Iterator[None]:
  """Updates that are traced within run by kernels or not, as `mode` says.

  Args:
    mode: ``"auto"``, ``"xla"``, ``"pallas"`` or ``"interpret"``, as described above.

  Raises:
    ValueError: if it is none of these.

  Examples:
    >>> import jax.numpy as jnp, optax_lowmem as lowmem
    >>> params = jnp.zeros((64, 64))
    >>> tx = lowmem.adamw(1e-3)
    >>> with lowmem.kernels.using("xla"):
    ...   updates, state = tx.update(params, tx.init(params), params)
  """
  token = _chosen.set(_checked("mode", mode))
  try:
    yield
  finally:
    _chosen.reset(token)


def _checked(name: str, value: str) -> str:
  if value not in _SETTINGS:
    raise ValueError(f"`{name}` must be one of {', '.join(_SETTINGS)}, got {value!r}.")
  return value


def platforms() -> tuple[str, ...]:
  """The platforms that have a kernel and that a program may be compiled for here.

  Tracing the one for TPUs takes 80 ms for every shape, so it is left out where nothing could
  compile it: without a TPU and without libtpu.
  """
  tpu = jax.default_backend() == "tpu" or importlib.util.find_spec("libtpu") is not None
  return ("cuda", "tpu") if tpu else ("cuda",)


def other_platforms() -> bool:
  """Whether there are devices here for which nothing has a method of its own."""
  return not backends().keys() <= {"cpu", "cuda", "tpu"}


def refusal(fn: Any, reads: Any, writes: Any, fresh: Any, platform: str = "cuda") -> str | None:
  """Why `map_blocks` cannot take these arguments on `platform`, or None if it can."""
  return _kernel(platform).supports(reads, writes, fresh, fn)


def map_blocks(
  fn: Any,
  reads: Any,
  writes: Any,
  fresh: Any,
  platform: str = "cuda",
  *,
  interpret: bool = False,
) -> Any:
  """`fn(reads, writes)` by the kernel for `platform`; see `_pallas.map_blocks`."""
  return _kernel(platform).map_blocks(fn, reads, writes, fresh, interpret=interpret)


def _kernel(platform: str) -> Any:
  return _tpu if platform == "tpu" else _pallas
