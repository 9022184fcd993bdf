"""What the tests ask of compiled programs."""

from typing import Any


def statistics_of(compiled: Any) -> Any:
  """Bytes that a compiled program takes, by `Compiled.memory_analysis`."""
  found = compiled.memory_analysis()
  assert found is not None, "this backend does not count bytes"
  return found


def temporaries_of(compiled: Any) -> int:
  """Bytes that a compiled program needs beside its arguments and its results."""
  return statistics_of(compiled).temp_size_in_bytes


def times_compiled(jitted: Any) -> int:
  """How many programs a function of `jax.jit` has; jax has no public name for it."""
  return jitted._cache_size()
