"""`explain`: how parameters are held and updated, and why."""

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import optax_lowmem as lowmem

PARAMS = {
  "w": jnp.zeros((256, 256)),
  "lora": jnp.zeros((4096, 16)),
  "r": jnp.zeros((100, 100)),
  "b": jnp.zeros(256),
}


def methods(tx, **kwargs):
  return {e.parameter[2:-2]: e.method for e in lowmem.explain(tx, PARAMS, **kwargs)}


def test_elementwise_rules():
  found = {e.parameter: e for e in lowmem.explain(lowmem.adamw(1e-3), PARAMS)}
  assert found["['w']"].method == found["['lora']"].method == "kernel"
  assert found["['lora']"].held == {
    "mu": "power8 in blocks of 4 x 16",
    "nu": "power8_unsigned in blocks of 4 x 16",
  }
  assert found["['w']"].bytes == 2 * (256 * 256 + 4 * 1024)
  assert found["['r']"].method == "phases"
  assert "blocks have 100 elements" in found["['r']"].reason
  assert found["['b']"].method == "optax" and found["['b']"].held["nu"] == "float32"


@pytest.mark.parametrize(
  ("platform", "method"),
  [("cuda", "kernel"), ("tpu", "kernel"), ("cpu", "tiles"), ("rocm", "phases")],
)
def test_platforms(platform, method):
  assert methods(lowmem.lion(1e-3), platform=platform)["w"] == method


def test_unknown_platforms_are_refused():
  with pytest.raises(ValueError, match=r"`platform` must be one of cuda, .*, got 'gpu'\. JAX's"):
    lowmem.explain(lowmem.lion(1e-3), PARAMS, platform="gpu")  # pyright: ignore[reportArgumentType]


def test_kernels_switched_off():
  with lowmem.kernels.using("xla"):
    (*_, found) = lowmem.explain(lowmem.adamw(1e-3), {"w": PARAMS["w"]})
  assert (found.method, found.reason) == ("phases", "kernels are switched off")


@pytest.mark.parametrize("make", [lowmem.came, lowmem.lamb, lowmem.lars])
def test_rules_that_take_norms(make):
  for e in lowmem.explain(make(1e-3), PARAMS):
    assert e.method == ("optax" if e.parameter == "['b']" else "phases")
    assert e.method == "optax" or "norms" in e.reason


def test_rules_that_are_not_elementwise():
  tx = lowmem.quantized(optax.lamb(1e-3))
  (*_, found) = lowmem.explain(tx, PARAMS)
  assert found.method == "phases" and "'reduce_sum' is not elementwise" in found.reason
  assert methods(tx, platform="cpu")["w"] == "whole"


def test_wrappers():
  labels = {"w": "few", "lora": "few", "r": "all", "b": "all"}
  tx = optax.partition({"few": lowmem.adamw(1e-3), "all": optax.adamw(1e-3)}, labels)
  assert methods(optax.chain(optax.clip(1.0), tx)) == {
    "w": "kernel",
    "lora": "kernel",
    "r": "optax",
    "b": "optax",
  }
  assert methods(lowmem.offloaded(lowmem.adamw(1e-3)))["w"] == "kernel"
  assert set(methods(lowmem.adamw(1e-3, bits=32)).values()) == {"optax"}


def test_nothing_is_computed_and_it_prints():
  shapes = jax.eval_shape(lambda: {"w": jnp.zeros((1 << 20, 1 << 12))})
  text = str(lowmem.explain(lowmem.adamw(1e-3), shapes))
  head = "parameter shape state bytes updated by, on cuda because"
  assert text.splitlines()[0].split() == head.split()
  assert "nothing" not in text and "phases" in text  # more elements than a kernel's offsets count


def test_nnx_parameters_are_those_within_their_boxes():
  model = nnx.Linear(256, 64, rngs=nnx.Rngs(0))
  state: Any = nnx.state(model, nnx.Param)
  assert lowmem.explain(lowmem.adamw(1e-3), state) == lowmem.explain(
    lowmem.adamw(1e-3), nnx.as_pure(state)
  )
  with pytest.raises(TypeError, match=r"got an NNX model\. Pass `nnx.state\(model, nnx.Param\)`"):
    lowmem.explain(lowmem.adamw(1e-3), model)


@pytest.mark.parametrize("inner", [lowmem.adamw(1e-3), optax.adamw(1e-3)])
def test_state_in_host_memory_is_said_to_be_there(inner):
  (without,) = lowmem.explain(inner, {"w": PARAMS["w"]})
  (found,) = lowmem.explain(lowmem.offloaded(inner), {"w": PARAMS["w"]})
  assert found.held == {name: f"{form} in host memory" for name, form in without.held.items()}
  assert found.bytes == without.bytes > 0


def test_copies_are_alike():
  found = lowmem.explain(lowmem.lion(1e-3), PARAMS, platform="cpu")
  for again in (copy.copy(found), pickle.loads(pickle.dumps(found))):
    assert again == found and str(again) == str(found)


def test_state_that_belongs_to_no_parameter_has_a_row():
  """`optax.flatten` has one array for all; no bytes were said to be held, and nothing quantized."""
  tx = lowmem.adamw(1e-3)
  (own,) = lowmem.explain(tx, {"w": PARAMS["w"]})
  assert lowmem.explain(tx, PARAMS).other is None
  found = lowmem.explain(optax.flatten(tx), {"w": PARAMS["w"]})
  assert found[0].bytes == 0 and found[0].reason == "no array of the state has its shape"
  assert found.other is not None
  assert (found.other.held, found.other.bytes) == (own.held, own.bytes)
  assert f"bytes={own.bytes}" in repr(found)
  assert str(found).splitlines()[-1].split()[:3] == ["other", "state", "mu:"]
  assert pickle.loads(pickle.dumps(found)).other == found.other
  rows = lowmem.explain(lowmem.came(1e-3), {"w": PARAMS["w"]}).other
  assert rows is not None and set(rows.held) >= {"v_row", "v_col", "res_row", "res_col"}
  assert (rows.bytes, rows.method) == (4 * 4 * 256, "")
