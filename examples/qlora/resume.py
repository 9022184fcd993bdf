"""The state of a run on disk, so that it continues bit for bit where it stopped."""

import os
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

T = TypeVar("T")


def _is_key(x: jax.Array) -> bool:
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _named(tree: object) -> list[tuple[str, jax.Array]]:
  return [(jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]]


def save_state(path: Path, tree: object, step: int) -> None:
  """Writes every array of a tree, and the number of steps done, to one safetensors file.

  The file is replaced in one step: it is the old one or the new one, never half of it.
  """
  arrays = {n: np.asarray(jax.random.key_data(x) if _is_key(x) else x) for n, x in _named(tree)}
  partial = path.with_name(path.name + ".partial")
  with open(partial, "wb") as file:
    file.write(save(arrays, metadata={"step": str(step)}))
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def load_state(path: Path, like: T) -> tuple[T, int]:
  """Reads what :func:`save_state` wrote into a tree of the same structure, shapes and dtypes.

  Returns:
    ``(tree, steps done)``.

  Raises:
    FileNotFoundError: where there is no such file.
    ValueError: where it is damaged, or belongs to another model, adapter or optimizer.
  """
  if not path.is_file():
    raise FileNotFoundError(
      f"There is no {path.name} in {path.parent}, so that run cannot be continued. It is "
      "written by --save-every, by Ctrl-C and at the end of a run."
    )
  leaves = []
  try:
    with safe_open(path, framework="np") as file:
      step, names = int((file.metadata() or {})["step"]), set(file.keys())
      for name, wanted in _named(like):
        data = jax.random.key_data(wanted) if _is_key(wanted) else wanted
        found = file.get_tensor(name) if name in names else None
        if found is None or found.shape != data.shape or found.dtype != data.dtype:
          has = "is missing" if found is None else f"is {found.dtype}{list(found.shape)}"
          raise ValueError(
            f"{path} does not fit this run: {name} {has}, expected {data.dtype}{list(data.shape)}."
          )
        if _is_key(wanted):
          found = jax.random.wrap_key_data(found, impl=jax.random.key_impl(wanted))
        leaves.append(jax.device_put(found, wanted.sharding))
  except (SafetensorError, KeyError) as error:
    raise ValueError(f"{path} is not a complete training state: {error}") from error
  return jax.tree.unflatten(jax.tree.structure(like), leaves), step
