"""The examples of docs/lora*.md run, on a small model."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as flax_linen
from flax import nnx

from optax_lowmem import nn
from test_adapter_kinds import LoHa

DOCS = pathlib.Path(__file__).parents[1] / "docs"


class Net(nnx.Module):
  def __init__(self):
    self.embed = nnx.Embed(32, 64, rngs=nnx.Rngs(0))
    self.up = nnx.Linear(64, 64, use_bias=False, rngs=nnx.Rngs(1))
    self.head = nnx.Linear(64, 32, rngs=nnx.Rngs(2))

  def __call__(self, tokens):
    return self.head(jax.nn.gelu(self.up(self.embed(tokens))))


class LinenNet(flax_linen.Module):
  @flax_linen.compact
  def __call__(self, tokens):
    x = flax_linen.Embed(32, 64)(tokens)
    return flax_linen.Dense(32)(flax_linen.MultiHeadDotProductAttention(4, name="attention")(x))


def run(page, example=0, **names):
  """Runs an example of a page; returns the names that it ends with."""
  blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
  exec(compile(blocks[example], page, "exec"), names)
  return names


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


TOKENS = jnp.arange(8).reshape(2, 4)


def test_lora(tmp_path):
  names = run("lora.md", model=Net())
  assert isinstance(names["model"].up.base, nn.NF4Linear)
  assert (tmp_path / "adapter/adapter_model.safetensors").exists()


def test_a_kind_of_your_own(tmp_path):
  (tmp_path / "base").mkdir()
  weight = np.array(Net().up.kernel[...].T)
  safetensors.numpy.save_file({"up.weight": weight}, tmp_path / "base/model.safetensors")
  names = {"model": nnx.Dict(up=Net().up), "other": nnx.Dict(up=Net().up), "LoHa": LoHa}
  names = run("lora.md", 1, lowmem_nn=nn, nnx=nnx, **names)
  assert names["model"].up.variant == LoHa()
  merged = safetensors.numpy.load_file(tmp_path / "merged/model.safetensors")
  np.testing.assert_array_equal(merged["up.weight"], weight)  # it adds nothing at the start


def test_lora_foreign():
  names = run("lora_foreign.md", model=Net(), tokens=TOKENS)
  assert names["layers"].names == ["embed", "up", "head"]
  assert type(names["model"].up) is nn.LoRALinear


def test_lora_linen():
  model = LinenNet()
  params = model.init(jax.random.key(0), TOKENS)["params"]
  given = {"model": model, "params": params, "tokens": TOKENS, "labels": TOKENS}
  names = run("lora_linen.md", key=jax.random.key(1), **given)
  assert set(names["state"].params["attention"]) == {"query", "value"}
