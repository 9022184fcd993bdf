"""An adapter kind is one class: LoHa, of PEFT, is defined here and needs no edit of the package."""

import dataclasses
import json
import pathlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as safetensors
from flax import linen as flax_linen
from flax import nnx

from optax_lowmem import linen, nn
from optax_lowmem.nn._adapters.dora import DoRA
from optax_lowmem.nn._adapters.lora import LoRA
from optax_lowmem.nn._peft import load

PACKAGE = pathlib.Path(nn.__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class LoHa(nn.Variant):
  """The elementwise product of two products of factors (Hyeon-Woo et al., 2022, FedPara)."""

  peft_type = "LOHA"
  peft_keys: ClassVar = {
    "lora_alpha": "alpha",
    "init_lora_weights": "init_weights",
    **dict.fromkeys(("lora_dropout", "bias", "fan_in_fan_out", "use_rslora")),
  }
  use_effective_conv2d: bool = False

  def parts(self, embedding) -> tuple[nn.Part, ...]:
    # In PEFT w1_a is (out, r) and w1_b (r, in).
    return (
      nn.Part("hada_w1_a", ("rank", "out"), "hada_w1_a", scaled=True),
      nn.Part("hada_w1_b", ("in", "rank"), "hada_w1_b"),
      nn.Part("hada_w2_a", ("rank", "out"), "hada_w2_a"),
      nn.Part("hada_w2_b", ("in", "rank"), "hada_w2_b"),
    )

  def initial(self, key, shapes, embedding):
    keys = jax.random.split(key, len(shapes))
    found = {name: jax.random.normal(k, shapes[name]) for name, k in zip(shapes, keys, strict=True)}
    return found | {"hada_w2_b": jnp.zeros(shapes["hada_w2_b"])}

  def delta(self, parts, dot):
    one, other = (dot(parts[f"hada_w{i}_b"], parts[f"hada_w{i}_a"]) for i in (1, 2))
    return one * other

  def config(self):
    return {"use_effective_conv2d": True} if self.use_effective_conv2d else {}


LOHA = LoHa()
IDS = jnp.arange(6).reshape(2, 3)


class Model(nnx.Module):
  """An embedding, two layers in a list or a stack, and a general one."""

  def __init__(self, stacked: bool = False, packed: bool = False):
    def layer(key):
      return nnx.Dict(q_proj=nnx.Linear(64, 64, rngs=nnx.Rngs(key)))

    keys, rngs = jax.random.split(jax.random.key(0), 2), nnx.Rngs(0)
    self.embed_tokens = nnx.Embed(7, 64, rngs=rngs)
    self.layers: Any = nnx.vmap(layer)(keys) if stacked else nnx.List([layer(k) for k in keys])
    self.g_proj = nnx.LinearGeneral(64, (2, 3), rngs=rngs)
    if packed:
      nn.quantize_model(self)

  def __call__(self, ids):
    x = self.embed_tokens(ids)
    if isinstance(self.layers, nnx.List):
      for layer in self.layers:
        x = jnp.tanh(layer.q_proj(x))
    else:
      x = nnx.scan(
        lambda x, layer: jnp.tanh(layer.q_proj(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
      )(x, self.layers)
    return self.g_proj(x)


@nnx.jit
def run(model, ids=IDS):
  return model(ids)


@nnx.jit
def gradient(model):
  only = nnx.DiffState(0, nnx.LoRAParam)
  return nnx.grad(lambda model: jnp.square(model(IDS)).sum(), argnums=only)(model)


def adapted(targets=".*_proj|embed_tokens", variant: nn.Variant = LOHA, alpha=8, **options):
  model = Model(**options)
  return nn.add_lora(model, 4, alpha, targets, variant=variant, rngs=nnx.Rngs(1))


def moved(model):
  """The same with random parts, none of which is zero."""
  state = nnx.state(model, nnx.LoRAParam)
  keys = iter(jax.random.split(jax.random.key(2), 99))
  new = jax.tree.map(lambda value: 0.3 * jax.random.normal(next(keys), value.shape), state)
  nnx.update(model, new)
  return model


forms = pytest.mark.parametrize(
  ("stacked", "packed"), [(False, False), (False, True), (True, False), (True, True)]
)


@forms
def test_a_new_adapter_changes_nothing_and_learns(stacked, packed):
  model = adapted(stacked=stacked, packed=packed)
  np.testing.assert_array_equal(run(model), run(Model(stacked, packed)))
  grads = dict(nnx.to_flat_state(gradient(model)))
  assert {path[-1] for path in grads} == {part.name for part in LOHA.parts(False)}
  for path, grad in grads.items():  # all but one factor of the zero part wait for its first step
    assert bool(jnp.any(grad[...] != 0)) == (path[-1] == "hada_w2_b"), path


@forms
def test_it_computes_what_its_formula_says(stacked, packed):
  model = moved(adapted("q_proj", stacked=stacked, packed=packed))
  layer = model.layers.q_proj if stacked else model.layers[0].q_proj
  one = layer.hada_w1_b[...] @ layer.hada_w1_a[...]
  other = layer.hada_w2_b[...] @ layer.hada_w2_a[...]
  want = (8 / 4) * one * other
  np.testing.assert_allclose(layer.delta().swapaxes(-1, -2), want, rtol=1e-5, atol=1e-5)


@forms
def test_merged_it_computes_the_same(stacked, packed):
  model = moved(adapted(stacked=stacked, packed=packed))
  want = run(model)
  assert jnp.abs(want - run(Model(stacked, packed))).max() > 0.1
  np.testing.assert_allclose(run(nn.merge_lora(model)), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stacked", [False, True])
def test_its_files_are_those_of_peft_and_come_back(stacked, tmp_path):
  model = moved(adapted(".*_proj", stacked=stacked))
  nn.save_peft(model, tmp_path)
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert config == {
    "peft_type": "LOHA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": None,
    "r": 4,
    "alpha": 8,
    "target_modules": ["g_proj", "q_proj"],
    "inference_mode": True,
    "init_weights": True,
  }
  tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
  shapes = {}
  for name, out in (("layers.0.q_proj", 64), ("layers.1.q_proj", 64), ("g_proj", 6)):
    for i in (1, 2):
      shapes[f"base_model.model.{name}.hada_w{i}_a"] = (out, 4)
      shapes[f"base_model.model.{name}.hada_w{i}_b"] = (4, 64)
  assert {name: value.shape for name, value in tensors.items()} == shapes
  for other in (Model(not stacked), adapted(".*_proj", stacked=stacked)):
    loaded = nn.load_peft(other, tmp_path, variant=LOHA)
    np.testing.assert_allclose(run(loaded), run(model), rtol=1e-5, atol=1e-5)


def test_layers_of_a_stack_may_differ_in_rank(tmp_path):
  model = Model(stacked=True)
  nn.add_lora(
    model, 4, 8, r"layers\.1\.q_proj|g_proj", rank_pattern={"1.q_proj": 2}, variant=LOHA,
    rngs=nnx.Rngs(1),
  )  # fmt: skip
  assert model.layers.q_proj.ranks == (0, 2)
  assert not jnp.any(model.layers.q_proj.hada_w1_a[...][1, 2:])
  model.layers.q_proj.hada_w2_b[...] = model.layers.q_proj.hada_w2_b[...].at[1, :, :2].set(0.3)
  nn.save_peft(model, tmp_path)
  loaded: Any = nn.load_peft(Model(), tmp_path, variant=LOHA)
  assert isinstance(loaded.layers[0].q_proj, nnx.Linear) and loaded.layers[1].q_proj.rank == 2
  assert jnp.abs(run(loaded) - run(Model())).max() > 1e-3
  np.testing.assert_allclose(run(loaded), run(model), rtol=1e-5, atol=1e-5)


def test_files_are_merged_without_a_model(tmp_path):
  model = moved(adapted("q_proj"))
  nn.save_peft(model, tmp_path / "adapter")
  base: Any = Model()
  weights = {
    f"layers.{i}.q_proj.weight": np.asarray(base.layers[i].q_proj.kernel[...].T) for i in (0, 1)
  }
  nn.merge_peft(weights, tmp_path / "adapter", tmp_path / "merged", variant=LOHA)
  got = safetensors.load_file(tmp_path / "merged" / "model.safetensors")
  nn.save_merged(model, tmp_path / "other", weights)
  other = safetensors.load_file(tmp_path / "other" / "model.safetensors")
  for i in (0, 1):
    name, layer = f"layers.{i}.q_proj.weight", model.layers[i].q_proj
    np.testing.assert_allclose(got[name], layer.merged_matrix(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[name], other[name])


def test_linen_has_it_too(tmp_path):
  model, x = flax_linen.Sequential([flax_linen.Embed(7, 8), flax_linen.Dense(4)]), IDS
  params: Any = model.init(jax.random.key(0), x)["params"]
  layers = linen.find_layers(model, {"params": params}, x)
  lora = linen.LoRA(model, layers, 2, 4, ".*", variant=LOHA)
  new = lora.init(jax.random.key(1))
  want = model.apply({"params": params}, x)
  np.testing.assert_array_equal(lora.apply({"params": params, "lora": new}, x), want)
  adapters = jax.tree.map(lambda value: value + 0.5, new)
  got = jax.jit(lora.apply)({"params": params, "lora": adapters}, x)
  assert jnp.abs(got - want).max() > 0.1
  merged: Any = model.apply({"params": lora.merge(params, adapters)}, x)
  np.testing.assert_allclose(got, merged, rtol=1e-4, atol=1e-4)
  linen.save_peft(lora, adapters, tmp_path)
  jax.tree.map(np.testing.assert_array_equal, linen.load_peft(lora, tmp_path), adapters)


@dataclasses.dataclass(frozen=True)
class Other(LoHa):
  peft_type = "OTHER"


REFUSED: list[tuple[dict[str, Any], str]] = [
  ({"use_rslora": True}, "`use_rslora` is True, and LoHa has none in PEFT"),
  ({"dropout": 0.1}, "`dropout` is 0.1, and LoHa has none in PEFT"),
  ({"init": "pissa"}, "`init` 'pissa' is a way in which LoRA starts"),
  ({"use_dora": True}, "`use_dora` and `lora_bias` choose a variant"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_settings_of_another_kind_are_refused(options, words):
  model = Model()
  with pytest.raises(ValueError, match=words):
    nn.add_lora(model, 4, 8, "q_proj", variant=LOHA, rngs=nnx.Rngs(0), **options)
  assert isinstance(model.layers[0].q_proj, nnx.Linear)


def test_what_is_no_kind_and_files_of_another_are_refused(tmp_path):
  wrong: Any = LoHa
  with pytest.raises(TypeError, match=r"`variant` must be an nn\.Variant"):
    nn.add_lora(Model(), 4, 8, "q_proj", variant=wrong, rngs=nnx.Rngs(0))
  nn.save_peft(adapted("q_proj"), tmp_path)
  for variant, words in (
    (None, "does not describe a LoRA adapter"),
    (Other(), "does not describe a Other adapter"),
    (LoHa(use_effective_conv2d=True), "sets use_effective_conv2d to None"),
  ):
    with pytest.raises(ValueError, match=words):
      nn.load_peft(Model(), tmp_path, variant=variant)
  plain = nn.add_lora(Model(), 4, 8, "q_proj", rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"is LoHa.*, the one at `layers.0.q_proj` LoRA"):
    nn.load_peft(plain, tmp_path, variant=LOHA)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_pickles_of_before_kinds_were_classes_are_read(options):
  layer: Any = nn.add_lora(Model(), 4, 8, "q_proj", rngs=nnx.Rngs(0), **options).layers[0].q_proj
  state = layer.__getstate__()
  del state["variant"]
  old = object.__new__(nn.LoRALinear)
  old.__setstate__(state)
  assert old.variant == layer.variant and "variant" not in state
  x = jnp.ones((2, layer.in_features))
  np.testing.assert_array_equal(old(x), layer(x))


@dataclasses.dataclass(frozen=True)
class Unscaled(LoHa):
  def parts(self, embedding):
    return tuple(part._replace(scaled=False) for part in super().parts(embedding))


def test_a_kind_that_would_be_merged_with_another_scale_is_refused():
  with pytest.raises(ValueError, match="no part that is `scaled`"):
    nn.add_lora(Model(), 4, 8, "q_proj", variant=Unscaled(), rngs=nnx.Rngs(0))


def test_a_kind_that_is_listed_is_known_by_its_configuration(monkeypatch, tmp_path):
  nn.save_peft(adapted("q_proj"), tmp_path)
  monkeypatch.setattr(load, "VARIANTS", (*load.VARIANTS, LoHa))
  loaded: Any = nn.load_peft(Model(), tmp_path)
  assert loaded.layers[0].q_proj.variant == LOHA


def test_linen_refuses_what_does_more_than_to_add():
  model = flax_linen.Dense(4)
  layers = linen.find_layers(
    model, model.init(jax.random.key(0), jnp.ones((1, 8))), jnp.ones((1, 8))
  )
  for variant in (DoRA(), LoRA(lora_bias=True)):
    with pytest.raises(ValueError, match="there is no place in Linen"):
      linen.LoRA(model, layers, 2, 4, ".*", variant=variant)


def test_the_kinds_of_this_package_are_one_file_each():
  """What only DoRA has is spelled where DoRA is; argument and alias apart."""
  apart = {"adapter.py", "dora.py"}
  folders = ("_variants", "_peft", "nn", "linen")
  for path in (path for folder in folders for path in PACKAGE.glob(f"{folder}/**/*.py")):
    text = path.read_text()
    for word in ("magnitude_vector", "lora_A.weight", "hada_"):
      home = {"magnitude_vector": "dora.py", "lora_A.weight": "low_rank.py"}.get(word)
      assert word not in text or path.name in (home, "variant.py"), f"{path} spells {word}"
    assert ".magnitude" not in text or path.name in apart, path
