"""README and docs are true: their Python runs, and what they name is there.

A page is run from top to bottom in one namespace. `GIVEN` says what a page may take as given, where
its text says so too. A block that cannot run here begins with a line
``# Not run in the tests: why``.
"""

from __future__ import annotations

import contextlib
import io
import re
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import linen as flax_linen
from flax import nnx

import optax_lowmem as lowmem
from doc_pages import NOT_RUN, PAGES, ROOT, blocks, commands, read, run
from optax_lowmem import nn
from test_adapter_kinds import LoHa
from test_mixed_precision_docs import given as for_mixed_precision

TOKENS = jnp.arange(8).reshape(2, 4)


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


def arrays(dtype=jnp.float32):
  params = {"w": jnp.ones((64, 64), dtype)}
  given = {"params": params, "grads": jax.tree.map(jnp.cos, params)}
  return given | {"lowmem": lowmem, "optax": optax}


def for_lora(tmp_path):
  (tmp_path / "base").mkdir()
  weight = np.array(Net().up.kernel[...].T)
  safetensors.numpy.save_file({"up.weight": weight}, tmp_path / "base/model.safetensors")
  second, third = (nnx.Dict(up=Net().up) for _ in range(2))
  return {"model": Net(), "second": second, "third": third, "LoHa": LoHa}


def for_linen(tmp_path):
  model = LinenNet()
  params = model.init(jax.random.key(0), TOKENS)["params"]
  given = {"model": model, "params": params, "tokens": TOKENS, "labels": TOKENS}
  return given | {"key": jax.random.key(1)}


# What pages take as given.
GIVEN = {
  "docs/bf16.md": lambda _: arrays(jnp.bfloat16),
  "docs/lora.md": for_lora,
  "docs/lora_foreign.md": lambda _: {"model": Net(), "tokens": TOKENS},
  "docs/lora_linen.md": for_linen,
  "docs/mixed_precision.md": lambda _: for_mixed_precision(),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p, "python", "pycon"))])
def test_a_page_runs_from_top_to_bottom(page, tmp_path):
  if "import equinox" in read(page):
    pytest.importorskip("equinox")
  names = run(page, GIVEN.get(page, lambda _: {})(tmp_path))
  RESULTS.get(page, lambda names, folder: None)(names, tmp_path)


def of_lora(names, folder):
  assert isinstance(names["model"].up.base, nn.NF4Linear)
  assert (folder / "adapter/adapter_model.safetensors").exists()
  assert names["second"].up.variant == names["third"].up.variant == LoHa()
  weight = safetensors.numpy.load_file(folder / "base/model.safetensors")["up.weight"]
  merged = safetensors.numpy.load_file(folder / "merged/model.safetensors")
  np.testing.assert_array_equal(merged["up.weight"], weight)  # it adds nothing at the start


def of_lora_foreign(names, folder):
  assert names["layers"].names == ["embed", "up", "head"]
  assert type(names["model"].up) is nn.LoRALinear


def of_lora_linen(names, folder):
  assert set(names["state"].params["attention"]) == {"query", "value"}


# What pages must end with, beside running.
RESULTS = {
  "docs/lora.md": of_lora,
  "docs/lora_foreign.md": of_lora_foreign,
  "docs/lora_linen.md": of_lora_linen,
}


def test_few_blocks_are_not_run():
  skipped = [
    (page, block.line)
    for page in PAGES
    for block in blocks(page, "python", "pycon")
    if NOT_RUN.match(block.text)
  ]
  assert len(skipped) <= 4, skipped


def options_of(words):
  """What a command understands, as text."""
  from optax_lowmem.qlora import cli

  said = io.StringIO()
  with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
    assert cli.main([*words[1:2], "--help"]) == 0
  return said.getvalue()


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p, "sh"))])
def test_commands_are_there(page):
  extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
  for words in commands(page):
    text, given = " ".join(words), [w.split("=")[0] for w in words if w.startswith("--")]
    if "pip" in words:
      for names in re.findall(r"(?:optax_lowmem|\.)\[([\w,]+)\]", text):
        assert set(names.split(",")) <= set(extras), text
    elif words[0] == "lowmem":
      help_text = options_of(words)
      for option in given:
        assert re.search(rf"{option}\b", help_text), text
    elif words[:3] == ["python", "-m", "pytest"]:
      for path in (w for w in words[3:] if w.startswith("tests")):
        assert list(ROOT.glob(path.split("::")[0])), text
    elif words[0] == "python" and words[1] != "-m":
      assert (ROOT / words[1]).is_file(), text
      if words[1] != "examples/qlora/finetune.py":
        for option in given:
          assert f'"{option}"' in read(words[1]), text


def test_the_command_says_what_the_page_says(capsys):
  """Errors of `lowmem`, which a page shows as one does at a terminal."""
  from optax_lowmem.qlora import cli

  shown = [
    example
    for page in PAGES
    for block in blocks(page, "console")
    for example in re.findall(r"^\$ lowmem (.*)\n((?:(?!\$).+\n)+)", block.text, re.M)
  ]
  assert len(shown) >= 4
  for command, said in shown:
    with contextlib.suppress(SystemExit):
      assert cli.main(command.split()) != 0
    assert said.strip() in capsys.readouterr().err, command
