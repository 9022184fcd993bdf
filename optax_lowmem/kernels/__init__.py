"""Optional kernels, and the one setting that says whether they run.

XLA runs every rule on every platform. A kernel does the same in one launch for each parameter, of
arrays whose blocks form one run. The environment variable `OPTAX_LOWMEM_KERNELS` chooses; it is
read when an update is traced, so set it before the first step:

- `xla`, the default until the kernel has been timed on a GPU: no kernels;
- `auto`: the kernel on CUDA for every parameter that it supports, XLA for all else;
- `pallas`: the kernel, or an error that says why not (on another platform, when it is compiled);
- `interpret`: the kernel's body as plain XLA operations on any platform, slowly, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

_VARIABLE = "OPTAX_LOWMEM_KERNELS"
_SETTINGS = ("xla", "auto", "pallas", "interpret")

Tile = Any  # a jax.Array, or a QuantizedArray with a single level of scales
_Update = Callable[[dict[int, Tile]], dict[int, Tile]]


def setting() -> str:
  """The value of `OPTAX_LOWMEM_KERNELS`.

  Raises:
    ValueError: if it is none of the known.
  """
  value = os.environ.get(_VARIABLE, "").lower() or _SETTINGS[0]
  if value not in _SETTINGS:
    raise ValueError(f"`{_VARIABLE}` must be one of {', '.join(_SETTINGS)}, got {value!r}.")
  return value


def update(
  on_blocks: _Update, values: Mapping[int, Tile], results: Mapping[int, Tile], otherwise: _Update
) -> dict[int, Tile]:
  """Returns the new arrays of one parameter, made by the kernel or by `otherwise(values)`.

  Args:
    on_blocks: takes tiles of `values`, each a run of whole blocks, and returns those of `results`.
      Every element of a result may depend on the elements of its block only.
    values: arrays of one logical shape, by key: all that `on_blocks` reads.
    results: the form of every result: an array, or a `jax.ShapeDtypeStruct`. A result takes the
      place of the value of its key, if that has its form.
    otherwise: makes the same of whole arrays, by XLA.

  Raises:
    ValueError: if `OPTAX_LOWMEM_KERNELS` insists on the kernel, and it cannot update these arrays.
  """
  mode, values = setting(), dict(values)
  if mode == "xla":
    return otherwise(values)
  from optax_lowmem.kernels import _pallas  # only when asked for: Pallas takes a while to import

  writes = [k for k, form in results.items() if k in values and _alike(values[k], form)]
  reads = [k for k in values if k not in writes]
  fresh = [k for k in results if k not in writes]

  def fn(read, write):
    new = on_blocks(dict(zip(reads, read, strict=True)) | dict(zip(writes, write, strict=True)))
    return [new[k] for k in (*writes, *fresh)]

  def arguments(values):
    return [values[k] for k in reads], [values[k] for k in writes], [results[k] for k in fresh]

  def kernel(values, interpret=False):
    new = _pallas.map_blocks(fn, *arguments(values), interpret=interpret)
    return dict(zip((*writes, *fresh), new, strict=True))

  reason = _pallas.supports(*arguments(values), fn)
  if reason and mode == "auto":
    return otherwise(values)
  if reason:
    shape = next(iter(values.values())).shape
    raise ValueError(
      f"`{_VARIABLE}={mode}` asks for the kernel, which cannot update a parameter of shape "
      f"{shape}: {reason}. Set it to 'auto' to leave such parameters to XLA."
    )
  if mode == "interpret":
    return kernel(values, interpret=True)
  if mode == "pallas":
    return kernel(values)
  return jax.lax.platform_dependent(values, cuda=kernel, default=otherwise)


def _alike(value: Tile, form: Any) -> bool:
  return jax.tree.structure(value) == jax.tree.structure(form) and all(
    (x.shape, x.dtype) == (y.shape, y.dtype)
    for x, y in zip(jax.tree.leaves(value), jax.tree.leaves(form), strict=True)
  )
