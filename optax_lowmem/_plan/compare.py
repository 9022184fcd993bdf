"""`compare_optimizer_memory`: the state of several optimizers for the same parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from optax_lowmem._host_memory.state_bytes import state_bytes
from optax_lowmem._optimizers.by_name import create
from optax_lowmem._plan.memory_plan import aligned
from optax_lowmem._plan.parts import count
from optax_lowmem._plan.target import trees_of

# By the names of `create`, in the order of the table: the usual one, then less and less.
NAMES = (
  "adamw", "ademamix", "ademamix_8bit", "ademamix_4bit", "lamb", "lamb_8bit", "adamw_8bit",
  "adamw_4bit", "paged_adamw", "paged_adamw_8bit", "lion", "lion_8bit", "lion_4bit", "sgd_8bit",
  "rmsprop_8bit", "adagrad_8bit", "came", "paged_came", "adafactor", "sgd",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OptimizerMemory:
  """The state of one optimizer.

  Attributes:
    name: its name.
    device, host: its bytes in device memory and in pinned host memory.
    per_parameter: its bytes, both together, for each parameter.
  """

  name: str
  device: int
  host: int
  per_parameter: float


class OptimizerComparison(tuple[OptimizerMemory, ...]):
  """One `OptimizerMemory` an optimizer; `print` shows a table."""

  def __str__(self) -> str:
    rows = [["optimizer", "device", "host", "B/param"]]
    for each in self:
      sizes = [f"{size / 1e9:,.2f} GB" for size in (each.device, each.host)]
      rows.append([each.name, *sizes, f"{each.per_parameter:.3f}"])
    return aligned(rows)


def compare_optimizer_memory(
  params: Any,
  optimizers: Mapping[str, optax.GradientTransformation] | Sequence[str] = NAMES,
) -> OptimizerComparison:
  """Compares what optimizers hold for the same parameters, exactly: nothing is made or run.

  Args:
    params: parameters, their shapes, or an NNX model, as in `plan`.
    optimizers: transformations by any names, or names of `create`. By default those of most use.

  Returns:
    An `OptimizerComparison`: a tuple with an `OptimizerMemory` each, which prints as a table, in
    units of 10^9 bytes.

  Raises:
    ValueError: for a name that `create` does not know.
    TypeError: for parameters that are none.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_lowmem as lowmem
    >>> params = {"w": jax.ShapeDtypeStruct((25_000, 40_000), jnp.float32)}
    >>> print(lowmem.compare_optimizer_memory(params, ["adamw", "adamw_8bit", "came"]))
    optimizer    device     host  B/param
    adamw       8.00 GB  0.00 GB    8.000
    adamw_8bit  2.13 GB  0.00 GB    2.125
    came        1.06 GB  0.00 GB    1.063
  """
  trained, _, _ = trees_of("params", params)
  trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trained)
  if not isinstance(optimizers, Mapping):
    optimizers = {name: create(name, 1e-3) for name in optimizers}
  numbers = max(1, count(trained))
  found = []
  for name, tx in optimizers.items():
    held = state_bytes(jax.eval_shape(tx.init, trained))
    each = sum(held.values()) / numbers
    found.append(OptimizerMemory(name, held["device"], held["pinned_host"], each))
  return OptimizerComparison(found)
