"""`memory_report`: what is held in memory at run time, by what it is."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax

from optax_lowmem._arguments.nnx_boxes import unbox
from optax_lowmem._plan.memory_plan import Part, human, table
from optax_lowmem._plan.parts import count, of_state, of_weights
from optax_lowmem._plan.target import trees_of
from optax_lowmem._state.nnx_variables import is_model


@dataclasses.dataclass(frozen=True)
class MemoryReport:
  """What is held now, beside what the allocator says.

  Attributes:
    parts: parameters and state, by kind, on the first device that holds them.
    in_use: bytes that the allocator of that device has given out; None where it does not say, as on
      a CPU.
    peak: the most that it ever had.
    limit: the most that it may give out.
  """

  parts: tuple[Part, ...]
  in_use: int | None = None
  peak: int | None = None
  limit: int | None = None

  @property
  def device_bytes(self) -> int:
    """Device memory that parameters and state hold, on one device."""
    return sum(part.device for part in self.parts)

  @property
  def host_bytes(self) -> int:
    """Pinned host memory that they hold, of one device."""
    return sum(part.host for part in self.parts)

  def line(self) -> str:
    """The report in a line, for a log."""
    said = f"{human(self.device_bytes)} of parameters and state"
    if self.host_bytes:
      said += f", {human(self.host_bytes)} on the host"
    if self.in_use is not None:
      said += f"; {human(self.in_use)} in use"
    if self.peak is not None:
      said += f", {human(self.peak)} at the peak"
    return said

  def __str__(self) -> str:
    lines = [table(self.parts)]
    said = {"in use": self.in_use, "at the peak": self.peak, "limit": self.limit}
    known = [f"{human(size)} {name}" for name, size in said.items() if size is not None]
    if known:
      lines.append(f"The device's allocator: {', '.join(known)}.")
    return "\n".join(lines)


def memory_report(params: Any, state: Any = ()) -> MemoryReport:
  """Counts what parameters and optimizer state hold, beside what the device's allocator says.

  It reads shapes and shardings alone: no array is touched, nothing is waited for. In a loop, call
  it every so many steps: ``print(memory_report(params, state).line())``.

  Args:
    params: parameters, any tree of arrays, or an NNX model; quantized ones count as they are
      stored.
    state: the optimizer's state; pages of `offloaded` count as host memory.

  Returns:
    A `MemoryReport`: numbers as data, of one device; `print` shows a table.

  Examples:
    >>> import jax.numpy as jnp, optax_lowmem as lowmem
    >>> params = jnp.zeros((256, 256))
    >>> state = lowmem.offloaded(lowmem.adamw(3e-4)).init(params)
    >>> print(lowmem.memory_report(params, state))
                                          parameters     device       host
    parameters, float32                       65,536  256.0 KiB        0 B
    optimizer state, count                                  4 B        0 B
    optimizer state, mu, power8                             0 B   68.0 KiB
    optimizer state, nu, power8_unsigned                    0 B   68.0 KiB
    in all                                            256.0 KiB  136.0 KiB
  """
  params = unbox(sys.modules["flax.nnx"].state(params)) if is_model(params) else unbox(params)
  params, state = jax.tree.map(_shape, (params, unbox(state)))
  parts = (*of_weights(params, "parameters"), *of_state(state, params))
  return MemoryReport(parts, **_allocator(params))


def print_memory_usage(params: Any, state: Any = ()) -> None:
  """Prints `memory_report`.

  Args:
    params: as there.
    state: as there.
  """
  print(memory_report(params, state))


def print_trainable_parameters(model: Any, wrt: Any = None) -> None:
  """Prints how many of a model's parameters are trained, in PEFT's words.

  Args:
    model: a Flax NNX model, or a tuple of two trees: what is trained, and what is not.
    wrt: of an NNX model, what is trained, as in `flax.nnx.Optimizer`; by default its LoRA adapters,
      or all parameters if it has none.

  Examples:
    >>> import jax.numpy as jnp, optax_lowmem as lowmem
    >>> lowmem.print_trainable_parameters(({"a": jnp.zeros(8)}, {"w": jnp.zeros((8, 24))}))
    trainable params: 8 || all params: 200 || trainable%: 4.0000
  """
  trained, frozen = model if isinstance(model, tuple) else trees_of("model", model, wrt)[:2]
  few, rest = count(trained), count(frozen)
  share = 100 * few / max(1, few + rest)
  print(f"trainable params: {few:,} || all params: {few + rest:,} || trainable%: {share:.4f}")


def memory_callback(every: int, say: Callable[[str], None] = print) -> Callable[..., None]:
  """A callback for a loop, ``callback(step, params, state)``, which says `MemoryReport.line`.

  Args:
    every: how many steps lie between two lines.
    say: what is given the line.

  Raises:
    ValueError: if `every` is no positive integer.

  Examples:
    >>> import jax.numpy as jnp, optax_lowmem as lowmem
    >>> callback, params = lowmem.memory_callback(every=100), jnp.zeros((256, 256))
    >>> for step in range(101):
    ...   callback(step, params)
    step 0: 256.0 KiB of parameters and state
    step 100: 256.0 KiB of parameters and state
  """
  if not isinstance(every, int) or every < 1:
    raise ValueError(f"`every` must be a positive number of steps, got {every!r}.")

  def callback(step: int, params: Any, state: Any = ()) -> None:
    if step % every == 0:
      say(f"step {step}: {memory_report(params, state).line()}")

  return callback


def _shape(x: Any) -> Any:
  """The shape of an array, and where it is."""
  if not hasattr(x, "dtype") or isinstance(x, jax.ShapeDtypeStruct):
    return x
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _allocator(params: Any) -> dict[str, int | None]:
  """What the allocator of the first device says that holds something of `params`."""
  known = (getattr(x, "sharding", None) for x in jax.tree.leaves(params))
  devices = [d for sharding in known if sharding is not None for d in sharding.addressable_devices]
  stats = min(devices, key=lambda d: d.id).memory_stats() if devices else None
  names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
  return {ours: (stats or {}).get(theirs) for ours, theirs in names.items()}
