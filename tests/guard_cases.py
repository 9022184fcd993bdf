"""A card that is not there, whose kernel runs interpreted: for the tests of the guard."""

import contextlib

import jax

from optax_lowmem.kernels import _choice, _guard


@contextlib.contextmanager
def card(monkeypatch, backend):
  """A process whose default backend is `backend`, "gpu" (NVIDIA's) or "tpu"."""
  _guard._agrees.cache_clear()
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax, "devices", lambda *_, devices=jax.devices: devices())
  right = _choice.map_blocks
  monkeypatch.setattr(_choice, "map_blocks", lambda *x, **y: right(*x, **y | {"interpret": True}))
  yield
  _guard._agrees.cache_clear()
