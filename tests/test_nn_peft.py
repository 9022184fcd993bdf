"""Adapters in PEFT's files: read as PEFT means them, written as PEFT reads them."""

import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from optax_lowmem import nn

GOLDEN = pathlib.Path(__file__).parent / "golden" / "peft"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LINEARS = {
  "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
  "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def read(path):
  return safetensors.numpy.load_file(path)


BASE = read(GOLDEN / "base" / "model.safetensors")


def linear(weight):
  """An nnx.Linear with a PyTorch weight (..., out, in)."""
  *_, o, i = weight.shape
  kernel = jnp.asarray(weight.swapaxes(-1, -2))
  return nnx.Linear(i, o, use_bias=False, kernel_init=lambda *_: kernel, rngs=nnx.Rngs(0))


def tiny_llama(stacked) -> Any:
  """The linear layers of `base`, under the names they have in PyTorch."""

  def layer(get):
    return nnx.Dict(
      {
        part: nnx.Dict({name: linear(get(f"{part}.{name}.weight")) for name in names})
        for part, names in LINEARS.items()
      }
    )

  weights = [lambda name, i=i: BASE[f"model.layers.{i}.{name}"] for i in range(2)]
  if stacked:
    layers = layer(lambda name: np.stack([get(name) for get in weights]))
  else:
    layers = nnx.List([layer(get) for get in weights])
  embed = nnx.Embed(128, 64, rngs=nnx.Rngs(0))
  return nnx.Dict(
    model=nnx.Dict(layers=layers, embed_tokens=embed), lm_head=linear(BASE["lm_head.weight"])
  )


def weights_of(model, stacked):
  """{PyTorch name: (out, in)} of the linear layers in `model.layers`."""
  out = {}
  for i in range(2):
    for part, names in LINEARS.items():
      for name in names:
        layers = model["model"].layers
        module = layers[part][name] if stacked else layers[i][part][name]
        kernel = np.asarray(module.kernel[...])
        out[f"model.layers.{i}.{part}.{name}.weight"] = (kernel[i] if stacked else kernel).T
  return out


def snapshot(model):
  _, state = nnx.split(model)
  flat = nnx.to_flat_state(state)
  return {path: np.asarray(value.get_value()).tobytes() for path, value in flat}


stacked_or_not = pytest.mark.parametrize("stacked", [False, True])


@stacked_or_not
@pytest.mark.parametrize("name", ["lora", "rslora"])
def test_loaded_and_merged_is_what_peft_merges(name, stacked):
  model = tiny_llama(stacked)
  assert nn.load_peft(model, GOLDEN / name) is model
  q = (
    model["model"].layers.self_attn.q_proj if stacked else model["model"].layers[0].self_attn.q_proj
  )
  assert q.scale == (8.0 if name == "rslora" else 4.0) and q.dropout is None
  merged = weights_of(nn.merge_lora(model), stacked)
  want = read(GOLDEN / name / "merged.safetensors")
  for key, value in merged.items():
    assert np.abs(value - BASE[key]).max() > 1e-3  # the adapter does something
    np.testing.assert_allclose(value, want[key], rtol=0, atol=1e-6)


@stacked_or_not
def test_what_peft_leaves_in_a_configuration_changes_nothing(stacked, tmp_path):
  """Both names for the head of a classifier, and the settings of a start that was converted."""
  more = {"modules_to_save": ["classifier", "score"], "corda_config": {"cov": 1}}
  got, want = tiny_llama(stacked), nn.load_peft(tiny_llama(stacked), GOLDEN / "lora")
  assert snapshot(nn.load_peft(got, edit(tmp_path, **more))) == snapshot(want)
  tensors = read(tmp_path / WEIGHTS) | {f"{PREFIX}score.weight": np.ones((3, 64), "f4")}
  safetensors.numpy.save_file(tensors, tmp_path / WEIGHTS)
  with pytest.raises(ValueError, match="'score' is no module"):
    nn.load_peft(tiny_llama(stacked), tmp_path)


@stacked_or_not
@pytest.mark.parametrize("name", ["lora", "rslora"])
def test_saved_again_is_the_same_file(name, stacked, tmp_path):
  model = nn.load_peft(tiny_llama(stacked), GOLDEN / name, rngs=nnx.Rngs(0))
  assert (
    nn.save_peft(model, tmp_path / "new" / "dir", base_model="base") == tmp_path / "new" / "dir"
  )
  written = tmp_path / "new" / "dir"
  assert sorted(path.name for path in written.iterdir()) == [CONFIG, WEIGHTS]
  got, want = read(written / WEIGHTS), read(GOLDEN / name / WEIGHTS)
  assert got.keys() == want.keys()
  for key in want:
    assert got[key].dtype == np.float32
    np.testing.assert_array_equal(got[key], want[key])
  with safetensors.safe_open(written / WEIGHTS, framework="np") as file:
    assert file.metadata() == {"format": "pt"}
  got, want = (json.loads((d / CONFIG).read_text()) for d in (written, GOLDEN / name))
  assert sorted(got.pop("target_modules")) == sorted(want["target_modules"])
  assert got == {key: want[key] for key in got}
  minimal = {
        "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout",
        "bias", "fan_in_fan_out", "inference_mode", "use_rslora",
    }  # fmt: skip
  assert minimal <= got.keys()


def test_loads_onto_a_4_bit_base():
  model = nn.load_peft(nn.quantize_model(tiny_llama(True)), GOLDEN / "lora")
  q = model["model"].layers.self_attn.q_proj
  assert isinstance(q.base, nn.NF4Linear)
  tensors = read(GOLDEN / "lora" / WEIGHTS)
  name = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
  np.testing.assert_array_equal(q.lora_a[...][1], tensors[name + "A.weight"].T)
  np.testing.assert_array_equal(q.lora_b[...][1], tensors[name + "B.weight"].T)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_adapters_are_read(tmp_path, dtype):
  shutil.copy(GOLDEN / "lora" / CONFIG, tmp_path)
  tensors = {k: v.astype(dtype) for k, v in read(GOLDEN / "lora" / WEIGHTS).items()}
  safetensors.numpy.save_file(tensors, tmp_path / WEIGHTS)
  model = nn.load_peft(tiny_llama(False), tmp_path)
  name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
  a = model["model"].layers[1].self_attn.q_proj.lora_a[...]
  assert a.dtype == jnp.float32
  np.testing.assert_array_equal(a, tensors[name].astype(np.float32).T)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_half_precision_adapters_are_written_and_read_again(tmp_path, options, dtype):
  model = nn.add_lora(
    tiny_llama(True), 4, 8, ".*_proj", param_dtype=dtype, rngs=nnx.Rngs(0), **options
  )
  lora = nnx.state(model, nnx.LoRAParam)
  keys = iter(jax.random.split(jax.random.key(1), 99))
  moved = jax.tree.map(lambda w: jax.random.normal(next(keys), w.shape, w.dtype), lora)
  nnx.update(model, moved)
  nn.save_peft(model, tmp_path)
  assert {v.dtype for v in read(tmp_path / WEIGHTS).values()} == {np.dtype(dtype)}
  again = nnx.state(nn.load_peft(tiny_llama(True), tmp_path), nnx.LoRAParam)
  for wide, narrow in zip(jax.tree.leaves(again), jax.tree.leaves(moved), strict=True):
    np.testing.assert_array_equal(wide, narrow.astype(jnp.float32))
  held = nnx.state(nn.load_peft(model, tmp_path), nnx.LoRAParam)
  jax.tree.map(np.testing.assert_array_equal, held, moved)
  assert {leaf.dtype for leaf in jax.tree.leaves(held)} == {np.dtype(dtype)}


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_loads_within_jit(name):
  """A fresh adapter has no values there, and none of them is asked for."""

  def weights(model):
    return nnx.state(nn.load_peft(model, GOLDEN / name), nnx.LoRAParam)

  traced = jax.jit(lambda: weights(tiny_llama(True)))()
  jax.tree.map(np.testing.assert_array_equal, traced, weights(tiny_llama(True)))


@stacked_or_not
def test_values_go_into_adapters_that_are_there(stacked):
  model = nn.add_lora(tiny_llama(stacked), 4, 16, ".*_proj", dropout=0.1, rngs=nnx.Rngs(0))
  layers = model["model"].layers
  lora = layers.self_attn.q_proj if stacked else layers[0].self_attn.q_proj
  nn.load_peft(model, GOLDEN / "lora")
  assert (layers.self_attn.q_proj if stacked else layers[0].self_attn.q_proj) is lora
  assert lora.dropout.rate == 0.1
  merged = weights_of(nn.merge_lora(model), stacked)
  want = read(GOLDEN / "lora" / "merged.safetensors")
  for key, value in merged.items():
    np.testing.assert_allclose(value, want[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  ("rank", "alpha", "targets", "words"),
  [
    (8, 32, ".*_proj", "shape"),
    (4, 8, ".*_proj", "scale 4.*2"),
    (4, 16, ".*_proj|lm_head", "lacks `lm_head`"),
  ],
)
def test_adapters_that_do_not_agree_are_refused(rank, alpha, targets, words):
  model = nn.add_lora(tiny_llama(True), rank, alpha, targets, rngs=nnx.Rngs(0))
  before = snapshot(model)
  with pytest.raises(ValueError, match=words):
    nn.load_peft(model, GOLDEN / "lora")
  assert snapshot(model) == before


def edit(tmp_path, tensors=None, **config):
  """A copy of the golden adapter, changed."""
  old = json.loads((GOLDEN / "lora" / CONFIG).read_text())
  (tmp_path / CONFIG).write_text(json.dumps(old | config))
  values = read(GOLDEN / "lora" / WEIGHTS)
  safetensors.numpy.save_file(values if tensors is None else tensors(values), tmp_path / WEIGHTS)
  return tmp_path


def without(part):
  return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


def renamed(old, new):
  return lambda tensors: {k.replace(old, new): v for k, v in tensors.items()}


def wider(tensors):
  key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
  return tensors | {key: np.ones((4, 65), np.float32)}


def copied_bias(change):
  name = PREFIX + "x"
  one = {f"{name}.bias": np.ones(4, "f4"), f"{name}.original_module.bias": np.zeros(4, "f4")}
  return lambda t: t | one | {f"{name}.modules_to_save.bias": np.full(4, 1 + change, "f4")}


def saved_whole(tensors):
  saved = {PREFIX + k: v for k, v in BASE.items() if "up_proj" in k}
  return without("up_proj")(tensors) | saved


@stacked_or_not
@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda tmp: edit(tmp, bias="some"), "bias"),
    (lambda tmp: edit(tmp, use_dora=True), "lacks the magnitude"),
    (lambda tmp: edit(tmp, lora_bias=True), "lacks the bias"),
    (lambda tmp: edit(tmp, modules_to_save=["lm_head"]), r"lacks `lm_head\.weight`"),
    (lambda tmp: edit(tmp, rank_pattern={"up_proj": 2}), "rank 2"),
    (lambda tmp: edit(tmp, target_parameters=["a.weight"]), "target_parameters"),
    (lambda tmp: edit(tmp, trainable_token_indices=[1]), "trainable_token_indices"),
    (lambda tmp: edit(tmp, init_lora_weights="pissa"), "init_lora_weights"),
    (lambda tmp: edit(tmp, some_new_feature=True), "some_new_feature.*merge_and_unload"),
    (lambda tmp: edit(tmp, init_lora_weights="olora"), "olora.*path_initial_model"),
    (lambda tmp: edit(tmp, copied_bias(1.0), bias="all", modules_to_save=["x"]), "two values"),
    (
      lambda tmp: edit(tmp, saved_whole, fan_in_fan_out=True, modules_to_save=["up_proj"]),
      "which of its axes",
    ),
    (lambda tmp: edit(tmp, peft_type="IA3"), "LoRA"),
    (lambda tmp: edit(tmp, r=0), "sets r to 0"),
    (lambda tmp: edit(tmp, r=8), "shape"),
    (lambda tmp: edit(tmp, lora_alpha=None), "lora_alpha"),
    (lambda tmp: edit(tmp, wider), r"\(4, 65\).*layers.1.mlp.up_proj"),
    (lambda tmp: edit(tmp, without("1.mlp.up_proj.lora_B")), r"lacks .*up_proj\.lora_B"),
    (lambda tmp: edit(tmp, without("1.mlp.up_proj")), "lacks `model.layers.1.mlp.up_proj`"),
    (lambda tmp: edit(tmp, renamed("up_proj", "upp")), "does not have.*Nearest: .*up_proj"),
    (lambda tmp: edit(tmp, renamed("layers.1", "layers.7")), r"layers\.7"),
    (lambda tmp: edit(tmp, renamed("base_model.model.", "")), "Names of LoRA"),
    (lambda tmp: edit(tmp, lambda t: t | {"x.lora_embedding_A": np.ones(2)}), "x.lora_embedding_A"),
  ],
)
def test_what_cannot_be_loaded_is_refused_and_nothing_is_changed(make, words, stacked, tmp_path):
  model = tiny_llama(stacked)
  before = snapshot(model)
  with pytest.raises(ValueError, match=words):
    nn.load_peft(model, make(tmp_path))
  assert snapshot(model) == before


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_an_adapter_of_gpt_2_is_read_and_merged_into_turned_weights(name, tmp_path):
  """Its `Conv1D` holds weights (in, out), and PEFT says so in `fan_in_fan_out`."""
  config = json.loads((GOLDEN / name / CONFIG).read_text()) | {"fan_in_fan_out": True}
  (tmp_path / CONFIG).write_text(json.dumps(config))
  shutil.copy(GOLDEN / name / WEIGHTS, tmp_path)
  got, want = (nn.load_peft(tiny_llama(False), at) for at in (tmp_path, GOLDEN / name))
  assert snapshot(got) == snapshot(want)

  def turned(weights):
    return {k: v.T if k.endswith("_proj.weight") else v for k, v in weights.items()}

  nn.merge_peft(turned(BASE), tmp_path, tmp_path / "out")
  nn.merge_peft(BASE, GOLDEN / name, tmp_path / "plain")
  got, want = (read(tmp_path / at / "model.safetensors") for at in ("out", "plain"))
  assert got.keys() == want.keys()
  for key, value in turned(got).items():
    np.testing.assert_array_equal(value, want[key])
  with pytest.raises(ValueError, match="has shape"):
    nn.merge_peft(BASE, tmp_path, tmp_path / "no")


def test_broken_or_missing_files(tmp_path):
  model = tiny_llama(False)
  with pytest.raises(FileNotFoundError, match=CONFIG):
    nn.load_peft(model, tmp_path)
  (tmp_path / CONFIG).write_text("{")
  with pytest.raises(ValueError, match="JSON"):
    nn.load_peft(model, tmp_path)
  shutil.copy(GOLDEN / "lora" / CONFIG, tmp_path)
  with pytest.raises(FileNotFoundError, match=WEIGHTS):
    nn.load_peft(model, tmp_path)
  (tmp_path / WEIGHTS).write_bytes((GOLDEN / "lora" / WEIGHTS).read_bytes()[:-100])
  with pytest.raises(ValueError, match="not a whole safetensors file"):
    nn.load_peft(model, tmp_path)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_loading_again_leaves_nothing_beyond_the_ranks(tmp_path, options):
  pattern = {r"layers\.1\.self_attn\.q_proj": 2}
  targets = [r".*layers\.1\..*q_proj", "up_proj"]
  model = tiny_llama(True)
  nn.add_lora(model, 4, 8, targets, rank_pattern=pattern, rngs=nnx.Rngs(0), **options)
  nn.save_peft(model, tmp_path)
  q = model["model"].layers.self_attn.q_proj
  want = {name: np.array(value) for name, value in q.values().items()}
  q.lora_a[...], q.lora_b[...] = q.lora_a[...] + 1, q.lora_b[...] + 1
  nn.load_peft(model, tmp_path)
  jax.tree.map(np.testing.assert_array_equal, dict(q.values()), want)


def test_an_adapter_is_never_overwritten_unasked(tmp_path):
  model = nn.load_peft(tiny_llama(True), GOLDEN / "lora")
  nn.save_peft(model, tmp_path)
  (tmp_path / "notes.txt").write_text("mine")
  before = (tmp_path / WEIGHTS).read_bytes()
  q = model["model"].layers.self_attn.q_proj
  q.lora_b[...] = q.lora_b[...] + 1
  with pytest.raises(FileExistsError, match="overwrite=True"):
    nn.save_peft(model, tmp_path)
  assert (tmp_path / WEIGHTS).read_bytes() == before
  nn.save_peft(model, tmp_path, overwrite=True)
  assert (tmp_path / WEIGHTS).read_bytes() != before
  assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS, "notes.txt"]


def test_target_modules_name_no_layer_too_many(tmp_path):
  model = nn.add_lora(tiny_llama(False), 4, 8, r".*layers\.1\..*q_proj", rngs=nnx.Rngs(0))
  nn.save_peft(model, tmp_path)
  config = json.loads((tmp_path / CONFIG).read_text())
  assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def test_what_cannot_be_saved_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no LoRALinear"):
    nn.save_peft(tiny_llama(False), tmp_path)
  model = nn.add_lora(tiny_llama(False), 4, 8, "q_proj", rngs=nnx.Rngs(0))
  nn.add_lora(model, 4, 8, "v_proj", use_rslora=True, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="different"):
    nn.save_peft(model, tmp_path)
  model = nn.add_lora(tiny_llama(True), 4, 8, "q_proj", rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="`stack`"):
    nn.save_peft(model, tmp_path, stack="blocks")
  assert not list(tmp_path.iterdir())


# Heads and embeddings, whose base weights are in the file too.

BASE_WEIGHT = "base_model.model.lm_head.base_layer.weight"


def head(kind, o) -> Any:
  """An output layer of 8 inputs, each time the same."""
  rngs, bias = nnx.Rngs(0), nnx.initializers.normal()
  if kind == "linear":
    return nnx.Linear(8, o, use_bias=False, rngs=rngs)
  if kind == "einsum":
    return nnx.Einsum("btd,vd->btv", (o, 8), rngs=rngs)
  if kind == "general":
    return nnx.LinearGeneral(8, (o // 4, 4), bias_init=bias, rngs=rngs)
  if kind == "foreign":
    return Head(o)
  return nnx.Einsum("btd,dnh->bthn", (8, o // 4, 4), (4, o // 4), bias_init=bias, rngs=rngs)


class Head(nnx.Module):
  def __init__(self, o):
    self.w = nnx.Param(jax.random.normal(jax.random.key(0), (o, 8)))
    self.offset = nnx.Param(jnp.arange(float(o)))

  def __call__(self, x):
    return x @ self.w.T + self.offset


@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("kind", ["linear", "einsum", "general", "permuted", "foreign"])
def test_a_head_is_written_as_pytorch_holds_it_and_comes_back(kind, init, tmp_path):
  o = 8  # square, so that no shape tells a transposed weight
  x = jax.random.normal(jax.random.key(1), (2, 3, 8))
  model = nn.add_lora(nnx.Dict(lm_head=head(kind, o)), 2, 4, "lm_head", init=init, rngs=nnx.Rngs(1))
  layer = model["lm_head"]
  layer.lora_b[...] = layer.lora_b[...] + 0.1
  want = layer(x)
  tensors = read(nn.save_peft(model, tmp_path) / WEIGHTS)
  # With PiSSA the base holds the rest of W, and the adapter of the file is of W.
  assert (BASE_WEIGHT in tensors) == (init == "default")
  if init == "default":
    rows = tensors[BASE_WEIGHT]
    bias = getattr(layer.base, "bias" if kind != "foreign" else "offset", None)
    plain = layer.base(x) if bias is None else layer.base(x) - bias[...]
    plain = plain.swapaxes(-1, -2) if kind == "permuted" else plain
    np.testing.assert_allclose(x @ rows.T, plain.reshape(2, 3, o), rtol=1e-5, atol=1e-5)
  loaded = nn.load_peft(nnx.Dict(lm_head=head(kind, o)), tmp_path)
  np.testing.assert_allclose(loaded["lm_head"](x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"bias": "all"}, {"modules_to_save": ["beside"]}])
@pytest.mark.parametrize("kind", ["general", "permuted", "foreign"])
def test_general_layers_trained_beside_adapters_are_written_and_come_back(kind, options, tmp_path):
  def make():
    return nnx.Dict(q=nnx.Linear(8, 8, rngs=nnx.Rngs(2)), beside=head(kind, 8))

  model = nn.add_lora(make(), 2, 4, "q", rngs=nnx.Rngs(1), **options)
  state = nnx.state(model, nnx.LoRAParam)
  state = jax.tree.map(lambda v: v + jax.random.normal(jax.random.key(3), v.shape), state)
  nnx.update(model, state)
  tensors = read(nn.save_peft(model, tmp_path) / WEIGHTS)
  beside = {k.split(".")[-1]: v.shape for k, v in tensors.items() if ".beside." in k}
  assert beside == {"bias": (8,)} | ({} if "bias" in options else {"weight": (8, 8)})
  loaded = nn.load_peft(make(), tmp_path)
  x = jax.random.normal(jax.random.key(1), (2, 3, 8))
  np.testing.assert_array_equal(loaded["beside"](x), model["beside"](x))
  np.testing.assert_array_equal(loaded["q"](x), model["q"](x))


@pytest.mark.parametrize("options", [{"bias": "all"}, {"modules_to_save": ["conv"]}])
def test_what_a_file_has_no_name_for_is_refused_before_it_is_trained(options):
  model = nnx.Dict(
    q=nnx.Linear(8, 8, rngs=nnx.Rngs(2)), conv=nnx.Conv(8, 8, (3,), rngs=nnx.Rngs(0))
  )
  with pytest.raises(ValueError, match=r"`conv\.(bias|kernel)`.*Conv"):
    nn.add_lora(model, 2, 4, "q", rngs=nnx.Rngs(1), **options)
  assert not nnx.state(model, nnx.LoRAParam)
