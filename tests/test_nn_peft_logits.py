"""Adapters of PEFT on whole models: read here, written here, merged here, with PEFT's logits.

With the packages peft, transformers and torch installed, what is written here is read by PEFT, and
adapters that PEFT makes on the spot are read here.
"""

import json
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import nn_llama
from optax_lowmem import nn
from optax_lowmem.qlora.loading.llama import load_llama
from peft_cases import (
  ADAPTERS,
  BASE,
  BIASED,
  GOLDEN,
  IDS,
  KINDS,
  TIED,
  logits,
  randomized,
  torch_base,
)

MODELS = {"scanned": load_llama, "one module a layer": nn_llama.load}

every_adapter = pytest.mark.parametrize("name", ADAPTERS)
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def run(model, ids=IDS):
  return np.asarray(nnx.jit(lambda model, ids: model(ids))(model, ids))


def weights_of(model):
  """{PyTorch name: weight} of the matrices of a model."""
  found = {}
  for path, module in nnx.iter_modules(model):
    name = ".".join(map(str, path))
    if isinstance(module, nnx.Linear):
      kernel = np.asarray(module.kernel[...]).swapaxes(-1, -2)
      if kernel.ndim == 2:
        found[name] = kernel
      else:
        rest = name.removeprefix("model.layers.")
        found |= {f"model.layers.{i}.{rest}": one for i, one in enumerate(kernel)}
    elif isinstance(module, nnx.Embed):
      found[name] = np.asarray(module.embedding[...])
  return {f"{name}.weight": value for name, value in found.items()}


@every_model
@every_adapter
def test_loaded_adapter_gives_the_logits_of_peft(name, make):
  model = nn.load_peft(make(BASE), GOLDEN / name)
  # `minimal` is `lora` as other programs write it, with the same weights.
  stored = GOLDEN / ("lora" if name == "minimal" else name)
  want = np.load(stored / "logits.npy")
  assert np.abs(want - np.load(GOLDEN / "logits_base.npy")).max() > 1e-2
  np.testing.assert_allclose(run(model), want, rtol=0, atol=1e-4)


@every_model
@every_adapter
def test_merged_weights_are_those_of_peft(name, make):
  model = nn.load_peft(make(BASE), GOLDEN / name)
  before = run(model)
  nn.merge_lora(model)
  np.testing.assert_allclose(run(model), before, rtol=0, atol=1e-4)
  if (GOLDEN / name / "merged.safetensors").exists():
    want = safetensors.numpy.load_file(GOLDEN / name / "merged.safetensors")
    got = weights_of(model)
    assert len(got) == 16
    for key, value in got.items():
      np.testing.assert_allclose(value, want[key], rtol=0, atol=1e-5)


@every_adapter
def test_saved_again_is_the_same_file(name, tmp_path):
  for i, make in enumerate(MODELS.values()):
    model = nn.load_peft(make(BASE), GOLDEN / name)
    nn.save_peft(model, tmp_path / str(i))
    got = safetensors.numpy.load_file(tmp_path / str(i) / "adapter_model.safetensors")
    want = safetensors.numpy.load_file(GOLDEN / name / "adapter_model.safetensors")
    assert got.keys() == want.keys()
    for key in want:
      np.testing.assert_array_equal(got[key], want[key])


@every_adapter
def test_only_what_peft_trains_is_trained(name):
  model = nn.load_peft(load_llama(BASE), GOLDEN / name)
  state = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
  fields = {path[-1] for path in state.paths}
  extra = {"dora": {"magnitude"}, "lora_modules_to_save": {"kernel"}}.get(name, set())
  assert fields == {"lora_a", "lora_b"} | extra


# With PEFT itself.


def read_by_peft(peft, base, path):
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = peft.PeftModel.from_pretrained(base, path).eval()
  assert not any("missing" in str(w.message).lower() for w in caught)
  return model


@every_model
@every_adapter
def test_peft_reads_what_is_saved_here(name, make, tmp_path, peft):
  model = nn.load_peft(make(BASE), GOLDEN / name)
  for layer in (
    m for _, m in nnx.iter_modules(model) if isinstance(m, (nn.LoRALinear, nn.LoRAEmbed))
  ):
    grown = layer.lora_b[...] * 1.25  # not the values of the golden file; zeros stay zeros
    layer.lora_b[...] = grown
    if layer.magnitude is not None:
      layer.magnitude[...] = layer.magnitude[...] * 1.25
  nn.save_peft(model, tmp_path, base_model="base")
  got = logits(read_by_peft(peft, torch_base(), tmp_path))
  assert np.abs(got - np.load(GOLDEN / "logits_base.npy")).max() > 1e-2
  np.testing.assert_allclose(run(model), got, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_makes_is_read_merged_and_written(kind, tmp_path, peft):
  settings = dict(KINDS[kind])
  changes = settings.pop("_base", {})
  base = torch_base(**changes)
  base.save_pretrained(tmp_path / "base")
  plain = logits(base)
  made = randomized(peft, base, settings)
  want = logits(made)
  made.save_pretrained(tmp_path / "peft")
  assert np.abs(want - plain).max() > 1e-2

  path = tmp_path / "base"
  model = nn_llama.load(path, bias=True) if changes == BIASED else load_llama(path)
  nn.load_peft(model, tmp_path / "peft")
  np.testing.assert_allclose(run(model), want, rtol=0, atol=1e-4)
  nn.save_peft(model, tmp_path / "here")
  clean = torch_base(**changes)
  np.testing.assert_allclose(
    logits(read_by_peft(peft, clean, tmp_path / "here")), want, rtol=0, atol=1e-4
  )
  np.testing.assert_allclose(run(nn.merge_lora(model)), want, rtol=0, atol=1e-4)
  if changes == TIED:
    nn.merge_peft(path, tmp_path / "here", tmp_path / "merged")
    np.testing.assert_allclose(run(load_llama(tmp_path / "merged")), want, rtol=0, atol=1e-4)


def test_a_tied_table_of_two_values_is_refused(tmp_path):
  """PEFT writes it twice where the output layer is to follow it."""
  weights = safetensors.numpy.load_file(BASE / "model.safetensors")
  table = weights["model.embed_tokens.weight"]
  config = json.loads((BASE / "config.json").read_text()) | {"tie_word_embeddings": True}
  (tmp_path / "base").mkdir()
  (tmp_path / "base/config.json").write_text(json.dumps(config))
  del weights["lm_head.weight"]
  safetensors.numpy.save_file(weights, tmp_path / "base/model.safetensors")
  model = load_llama(tmp_path / "base")
  nn.add_lora(model, 2, 4, "v_proj", modules_to_save=["embed_tokens"], rngs=nnx.Rngs(0))
  nn.save_peft(model, tmp_path / "adapter")
  file = tmp_path / "adapter/adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  for name in ("model.embed_tokens", "lm_head"):
    np.testing.assert_array_equal(tensors[f"base_model.model.{name}.weight"], table)
  nn.load_peft(load_llama(tmp_path / "base"), tmp_path / "adapter")
  tensors["base_model.model.lm_head.weight"] = table + 1
  safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
  with pytest.raises(ValueError, match="two values"):
    nn.load_peft(load_llama(tmp_path / "base"), tmp_path / "adapter")


def test_dora_starts_with_the_norms_of_the_weights():
  model: Any = nn.add_lora(load_llama(BASE), 4, 8, "all-linear", use_dora=True, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(run(model), np.load(GOLDEN / "logits_base.npy"), rtol=0, atol=1e-5)
  w = safetensors.numpy.load_file(BASE / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
  magnitude = model.model.layers.mlp.up_proj.magnitude[...]
  np.testing.assert_allclose(magnitude[1], np.linalg.norm(w, axis=1), rtol=1e-6)
  assert not isinstance(model.lm_head, nn.LoRALinear) and magnitude.dtype == jnp.float32
