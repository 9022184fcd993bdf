"""Adapters of PEFT on whole models: read here, written here, merged here, with PEFT's logits.

With the packages peft, transformers and torch installed, what is written here is read by PEFT, and
adapters that PEFT makes on the spot are read here.
"""

import json
import pathlib
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import nn_llama
from llama import load_llama
from optax_lowmem import nn

GOLDEN = pathlib.Path(__file__).parent / "golden" / "peft"
BASE = GOLDEN / "base"
IDS = np.load(GOLDEN / "input_ids.npy")
ADAPTERS = (
    "lora", "rslora", "dora", "lora_pattern", "lora_embed_head", "lora_modules_to_save", "minimal",
)  # fmt: skip
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


@pytest.fixture(scope="module")
def peft():
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return pytest.importorskip("peft")


def torch_base(**changes):
  import torch
  import transformers

  torch.set_num_threads(1)
  torch.manual_seed(0)
  if not changes:
    return transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
  config = transformers.AutoConfig.from_pretrained(BASE)
  config.update(changes)
  model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
  for name, p in model.named_parameters():
    if name.endswith("bias"):
      torch.nn.init.normal_(p, std=0.1)
  return model


def logits(model, ids=IDS):
  import torch

  with torch.no_grad(), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return model(input_ids=torch.tensor(ids).long()).logits.numpy()


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


BIASED, TIED = {"attention_bias": True}, {"tie_word_embeddings": True}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
  "rank 16, alpha 8": {"r": 16, "lora_alpha": 8, "target_modules": ALL},
  "all-linear": {"target_modules": "all-linear"},
  "DoRA, rsLoRA": {"use_dora": True, "use_rslora": True, "target_modules": ALL},
  "DoRA, patterns": {
    "use_dora": True,
    "target_modules": ["q_proj", "up_proj"],
    "rank_pattern": {"layers.1.mlp.up_proj": 3},
    "alpha_pattern": {"q_proj": 5},
  },
  "DoRA on the embedding": {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
  "patterns, rsLoRA": {
    "use_rslora": True,
    "target_modules": ALL,
    "rank_pattern": {"^model.layers.0.*proj": 2, "down_proj": 6},
    "alpha_pattern": {r"layers\.1\.self_attn\.(q|k)_proj": 3},
  },
  "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
  "some layers, DoRA": {"use_dora": True, "target_modules": ALL, "layers_to_transform": 0},
  "excluded": {"target_modules": ALL, "exclude_modules": r".*layers\.0\.mlp.*"},
  "biases": {"target_modules": ["q_proj"], "bias": "lora_only", "_base": BIASED},
  "all biases": {"target_modules": ["q_proj", "o_proj"], "bias": "all", "_base": BIASED},
  "all biases, a module whole": {
    "target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["o_proj"], "_base": BIASED,
  },
  "bias, nothing to train": {"target_modules": ALL, "bias": "all"},
  "a bias of its own": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "_base": BIASED},
  "norms": {"target_modules": ["v_proj"], "modules_to_save": ["norm", "input_layernorm"]},
  "embedding, head": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
  "head": {"target_modules": [*ALL, "lm_head"]},
  "embedding, tied": {
    "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    "_base": TIED,
  },
}  # fmt: skip


def randomized(peft, base, kind):
  """An adapter of PEFT in which everything that is trained is random."""
  import torch

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    config = {"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM"} | kind
    model = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
  torch.manual_seed(1)
  with torch.no_grad():
    for p in model.parameters():
      if p.requires_grad:
        p.add_(torch.randn(p.shape) * 0.1)
  return model


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
  model = nn.add_lora(load_llama(BASE), 4, 8, "all-linear", use_dora=True, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(run(model), np.load(GOLDEN / "logits_base.npy"), rtol=0, atol=1e-5)
  w = safetensors.numpy.load_file(BASE / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
  magnitude = model.model.layers.mlp.up_proj.magnitude[...]
  np.testing.assert_allclose(magnitude[1], np.linalg.norm(w, axis=1), rtol=1e-6)
  assert not isinstance(model.lm_head, nn.LoRALinear) and magnitude.dtype == jnp.float32
