"""Imported first by what needs flax, to say how to get it."""

try:
  import flax as flax
except ModuleNotFoundError as error:
  if error.name != "flax":  # it is there, and something that it needs is not
    raise
  raise ImportError(
    "`optax_lowmem.nn` and `optax_lowmem.linen` need flax, which is not installed. Run "
    "`pip install 'optax_lowmem[flax]'`."
  ) from error
