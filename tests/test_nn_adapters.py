"""Kinds of adapters and of layers under them: what they compute, start with and train."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_lowmem as lowmem
from optax_lowmem import nn

TRAINED = nnx.DiffState(0, nnx.LoRAParam)


def normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def linear(i, o, seed=0, **kwargs):
  return nnx.Linear(i, o, rngs=nnx.Rngs(seed), **kwargs)


def stack(depth=3, width=16):
  @nnx.split_rngs(splits=depth)
  @nnx.vmap
  def make(rngs):
    return nnx.Linear(width, width, rngs=rngs)

  return make(nnx.Rngs(0))


def scanned(layer, x):
  body = nnx.remat(lambda layer, x: jnp.tanh(layer(x)))
  return nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(layer, x)


def moved(model, seed=3) -> Any:
  """The model with random values in all that is trained; zeros beyond a layer's rank stay."""
  layer: Any
  for i, (_, layer) in enumerate(nnx.iter_modules(model)):
    for name in ("lora_a", "lora_b", "magnitude", "lora_bias"):
      v = getattr(layer, name, None)
      if v is not None and hasattr(layer, "rank"):
        new = v[...] + normal(*v[...].shape, seed=seed + i) / 8
        if layer.ranks and name in ("lora_a", "lora_b"):
          keep = jnp.arange(layer.rank) < jnp.asarray(layer.ranks)[:, None]
          new = jnp.where(keep[:, None] if name == "lora_a" else keep[..., None], new, 0)
        v[...] = new.astype(v[...].dtype)
  return model


# 16 bits.


def half(model, **options) -> Any:
  return nn.add_lora(model, 4, 12, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(1), **options)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_an_adapter_in_16_bits_computes_what_one_in_32_bits_of_its_values_does(options):
  model = moved(half(nnx.Sequential(linear(16, 8)), **options))
  other = nn.add_lora(nnx.Sequential(linear(16, 8)), 4, 12, rngs=nnx.Rngs(2), **options)
  state = nnx.state(model, nnx.LoRAParam)
  assert {x.dtype.name for x in jax.tree.leaves(state)} == {"bfloat16"}
  nnx.update(other, jax.tree.map(lambda v: v.astype(jnp.float32), state))
  x = normal(3, 16)
  np.testing.assert_array_equal(model(x), other(x))  # alpha / rank is 3: no power of 2
  gradients = nnx.grad(lambda m: (m(x) ** 2).sum(), argnums=TRAINED)(model)
  assert {x.dtype.name for x in jax.tree.leaves(gradients)} == {"bfloat16"}
  merged: list[Any] = [nn.merge_lora(m).layers[0] for m in (model, other)]
  np.testing.assert_array_equal(*(layer.kernel[...] for layer in merged))


def test_moments_of_an_adapter_in_16_bits_are_not_in_16_bits():
  params = nnx.state(half(nnx.Sequential(linear(64, 64))), nnx.LoRAParam)
  cases: list[tuple[Literal[8, 32], set[str]]]
  cases = [(32, {"float32"}), (8, {"float32", "uint8"})]
  for bits, kinds in cases:
    state = lowmem.adamw(1e-3, bits=bits, min_size=64).init(params)
    assert {x.dtype.name for x in jax.tree.leaves(state)} - {"int32"} == kinds


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_base_makes_room_for_the_factors_as_they_are_rounded(init):
  base = linear(64, 32)
  layer = half(nnx.Sequential(nnx.clone(base)), targets=r"layers\.0", init=init).layers[0]
  np.testing.assert_array_equal(layer.start_a[...], layer.lora_a[...])
  x = normal(3, 64)
  if init == "pissa":  # a new adapter changes nothing, but for what float32 rounds
    np.testing.assert_allclose(layer(x), base(x), rtol=1e-5, atol=1e-5)


def test_an_adapter_in_16_bits_keeps_them_when_it_is_loaded(tmp_path):
  def model():
    holder: Any = nnx.Module()
    holder.layers = nnx.Dict(up=linear(16, 8))
    return holder

  first = moved(nn.add_lora(model(), 4, 12, rngs=nnx.Rngs(0)))
  nn.save_peft(first, tmp_path / "adapter")
  second = nn.load_peft(half(model()), tmp_path / "adapter")
  got, want = second.layers.up.lora_a[...], first.layers.up.lora_a[...]
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


@pytest.mark.parametrize("param_dtype", [jnp.int8, "float8", jnp.float8_e4m3fn])
def test_a_dtype_that_adapters_are_not_trained_in_is_refused(param_dtype):
  with pytest.raises(ValueError, match="`param_dtype` must be float32, bfloat16 or float16"):
    nn.add_lora(nnx.Sequential(linear(8, 8)), 2, 4, param_dtype=param_dtype, rngs=nnx.Rngs(0))


# DoRA.


def dora_by_hand(w, bias, a, b, m, s, x):
  """The paper's equation, with the norm as a constant."""
  v = w + s * (a @ b).T
  norm = jax.lax.stop_gradient(jnp.linalg.norm(v, axis=1))
  return x @ (m / norm * v.T) + bias


@pytest.mark.parametrize("quantized", [False, True])
def test_dora_is_the_papers_equation_and_its_norm_gets_no_gradient(quantized):
  base: Any = linear(64, 32)
  base.bias[...] = normal(32, seed=9)
  if quantized:
    base = nn.NF4Linear.from_weight(base.kernel[...].T, base.bias)
  layer: Any = nn.LoRALinear(base, 4, 8, use_dora=True, rngs=nnx.Rngs(1))
  x = normal(5, 64, seed=2)
  np.testing.assert_allclose(layer(x), base(x), rtol=1e-5, atol=1e-5)
  moved(layer)
  w = base.dequantize() if quantized else base.kernel[...].T
  values = (layer.lora_a[...], layer.lora_b[...], layer.magnitude[...])
  by_hand = lambda a, b, m: dora_by_hand(w, base.bias[...], a, b, m, 2.0, x)  # noqa: E731
  np.testing.assert_allclose(layer(x), by_hand(*values), rtol=1e-4, atol=1e-4)
  got = nnx.grad(lambda layer: (layer(x) ** 2).sum(), argnums=TRAINED)(layer)
  want = jax.grad(lambda v: (by_hand(*v) ** 2).sum())(values)
  for name, right in zip(("lora_a", "lora_b", "magnitude"), want, strict=True):
    np.testing.assert_allclose(got[name][...], right, rtol=1e-3, atol=1e-3)


def test_dora_with_dropout_drops_what_the_magnitude_adds():
  layer = moved(nn.LoRALinear(linear(64, 32), 4, 8, use_dora=True, dropout=0.5, rngs=nnx.Rngs(1)))
  x = normal(2, 64, seed=2)
  first, second = layer(x), layer(x)
  assert not np.allclose(first, second)
  draws = jnp.stack([layer(x) for _ in range(300)])
  layer.eval()
  spread = draws.std(axis=0) / np.sqrt(300)
  assert (jnp.abs(draws.mean(axis=0) - layer(x)) < 5 * spread + 1e-6).all()


# Stacks whose layers differ.


@pytest.mark.parametrize("use_dora", [False, True])
def test_layers_of_a_stack_differ_in_rank_and_stay_so_in_training(use_dora):
  model: Any = nnx.Dict(layers=nnx.Dict(q_proj=stack()))
  nn.add_lora(
    model, 4, 8, r"layers\.[02]\.q_proj", rank_pattern={r"layers\.2\.q_proj": 2},
    alpha_pattern={r"0\.q_proj": 16}, use_dora=use_dora, rngs=nnx.Rngs(1),
  )  # fmt: skip
  layer = model.layers.q_proj
  assert layer.ranks == (4, 0, 2) and layer.layer_scales(3) == [4.0, 0.0, 4.0]
  x, base = normal(5, 16, seed=1), layer.base
  np.testing.assert_allclose(scanned(layer, x), scanned(base, x), rtol=1e-5, atol=1e-6)
  tx = lowmem.adamw(3e-2, weight_decay=0.1, bits=8, min_size=1)
  optimizer = nnx.Optimizer(layer, tx, wrt=nnx.LoRAParam)

  @nnx.jit
  def step(layer, optimizer):
    loss = lambda layer: ((scanned(layer, x) - 0.3) ** 2).mean()  # noqa: E731
    value, grads = nnx.value_and_grad(loss, argnums=TRAINED)(layer)
    optimizer.update(layer, grads)
    return value

  losses = [step(layer, optimizer) for _ in range(15)]
  assert losses[-1] < 0.8 * losses[0]
  a, b = np.asarray(layer.lora_a[...]), np.asarray(layer.lora_b[...])
  assert a[0].all() and b[0].all() and a[2, :, :2].all() and b[2, :2].all()
  assert not (a[1].any() or b[1].any() or a[2, :, 2:].any() or b[2, 2:].any())
  # The layers one by one, each of its own rank.
  want = x
  for i, rank in enumerate(layer.ranks):
    one: Any = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    one.kernel[...], one.bias[...] = base.kernel[i], base.bias[i]
    if rank:
      one = nn.LoRALinear(one, rank, 16 if i == 0 else 8, use_dora=use_dora, rngs=nnx.Rngs(0))
      one.lora_a[...], one.lora_b[...] = a[i, :, :rank], b[i, :rank]
      if use_dora:
        one.magnitude[...] = layer.magnitude[i]
    want = jnp.tanh(one(want))
  got = scanned(layer, x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  nn.merge_lora(model)
  np.testing.assert_allclose(scanned(model.layers.q_proj, x), got, rtol=1e-4, atol=1e-5)


# Other layers.

GENERAL = {
  "heads": (lambda: nnx.LinearGeneral(24, (3, 8), rngs=nnx.Rngs(0)), (2, 5, 24)),
  "back": (lambda: nnx.LinearGeneral((3, 8), 24, axis=(-2, -1), rngs=nnx.Rngs(0)), (2, 5, 3, 8)),
  "axes": (lambda: nnx.LinearGeneral((4, 6), (5,), axis=(1, -1), rngs=nnx.Rngs(0)), (2, 4, 3, 6)),
  "batch": (
    lambda: nnx.LinearGeneral(6, (5, 2), batch_axis={0: 3}, rngs=nnx.Rngs(0)), (3, 4, 6),
  ),
  "einsum": (lambda: nnx.Einsum("nta,hab->nthb", (4, 6, 8), (4, 8), rngs=nnx.Rngs(0)), (2, 5, 6)),
  "dots": (lambda: nnx.Einsum("...d,df->...f", (6, 8), (8,), rngs=nnx.Rngs(0)), (2, 5, 6)),
  "in": (lambda: nnx.Einsum("BTNH,NHD->BTD", (3, 8, 6), rngs=nnx.Rngs(0)), (2, 5, 3, 8)),
  "experts": (lambda: nnx.Einsum("ebd,edf->bef", (3, 6, 8), (3, 8), rngs=nnx.Rngs(0)), (3, 5, 6)),
}  # fmt: skip


@pytest.mark.parametrize(
  ("kind", "quantized", "use_dora"),
  [*((kind, True, True) for kind in GENERAL), ("heads", False, False), ("einsum", False, False)],
)
def test_general_layers(kind, quantized, use_dora):
  make, shape = GENERAL[kind]
  model = nnx.Dict(layer=make())
  if model.layer.bias is not None:
    model.layer.bias[...] = normal(*model.layer.bias[...].shape, seed=7)
  x = normal(*shape, seed=1)
  want = model.layer(x)
  if quantized:
    nn.quantize_model(model, codebook="int8", block_size=None)
    assert isinstance(model.layer, nn.QuantizedEinsum)
    error = jnp.abs(model.layer(x) - want).max() / jnp.abs(want).max()
    assert 0 < error < 0.02
    want = model.layer(x)
  nn.add_lora(model, 2, 4, "layer", use_dora=use_dora, rngs=nnx.Rngs(1))
  np.testing.assert_allclose(model.layer(x), want, rtol=1e-5, atol=1e-5)
  moved(model)
  got = model.layer(x)
  assert jnp.abs(got - want).max() > 1e-2
  grads = nnx.grad(lambda model: (model.layer(x) ** 2).sum(), argnums=TRAINED)(model)
  assert all(leaf.any() for leaf in jax.tree.leaves(grads))
  nn.merge_lora(model)
  assert type(model.layer) is type(make())
  np.testing.assert_allclose(model.layer(x), got, rtol=1e-4, atol=1e-4)


def test_a_stack_of_general_layers_is_the_layers_one_by_one():
  @nnx.split_rngs(splits=3)
  @nnx.vmap
  def make(rngs):
    return nnx.LinearGeneral(16, (2, 8), rngs=rngs)

  model: Any = nnx.Dict(layers=make(nnx.Rngs(0)))
  x = normal(5, 16)
  every = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
  nn.add_lora(nn.quantize_model(model, codebook="int8"), 2, 4, "layers", rngs=nnx.Rngs(1))
  assert model.layers.lora_a.shape == (3, 16, 2)
  got = every(moved(model).layers, x)
  np.testing.assert_allclose(every(nn.merge_lora(model).layers, x), got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("equation", ["ij,jj->ij", "ijk,jl->il", "ij,jkl->ik"])
def test_products_that_are_no_matrix_product_are_refused(equation):
  shape = (4,) * len(equation.split(",")[1].split("-")[0])
  model = nnx.Dict(a=nnx.Einsum(equation, shape, rngs=nnx.Rngs(0)), b=linear(4, 4))
  for call in (nn.quantize_model, lambda m: nn.add_lora(m, 2, 4, ".*", rngs=nnx.Rngs(0))):
    with pytest.raises(ValueError, match="plain product"):
      call(model)
  assert type(model.b) is nnx.Linear


@pytest.mark.parametrize("use_dora", [False, True])
def test_embeddings(use_dora):
  base = nnx.Embed(32, 8, rngs=nnx.Rngs(0))
  layer: Any = nn.LoRAEmbed(base, 2, 4, use_dora=use_dora, rngs=nnx.Rngs(1))
  ids = jnp.array([[3, 5], [0, 31]])
  assert not layer.lora_a[...].any() and layer.lora_b[...].std() > 0.5
  np.testing.assert_allclose(layer(ids), base(ids), rtol=1e-5)
  moved(layer)
  table = base.embedding[...] + 2.0 * layer.lora_a[...] @ layer.lora_b[...]
  if use_dora:
    table = table * layer.magnitude[...] / jnp.linalg.norm(table, axis=0)
  np.testing.assert_allclose(layer(ids), table[ids], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(layer.merge()(ids), table[ids], rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(layer.attend(normal(3, 8)), base.attend(normal(3, 8)))


# What is trained.


class Model(nnx.Module):
  def __init__(self, rngs):
    self.embed_tokens = nnx.Embed(50, 16, rngs=rngs)
    self.q_proj, self.k_proj = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)
    self.norm = nnx.LayerNorm(16, rngs=rngs)
    self.out = nnx.Linear(16, 50, rngs=rngs)

  def __call__(self, ids):
    x = self.embed_tokens(ids)
    return self.out(self.norm(self.q_proj(x) + self.k_proj(x)))


def trained(model):
  return {
    ".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
  }


def test_all_linear_is_all_but_the_head():
  model = nn.add_lora(Model(nnx.Rngs(0)), 2, 4, "all-linear", rngs=nnx.Rngs(0))
  assert trained(model) == {f"{p}_proj.lora_{f}" for p in "qk" for f in "ab"}


@pytest.mark.parametrize(
  ("options", "more"),
  [
    ({"modules_to_save": ["out", "norm"]}, {"out.kernel", "out.bias", "norm.scale", "norm.bias"}),
    ({"bias": "lora_only"}, {"q_proj.base.bias"}),
    ({"bias": "all"}, {"q_proj.base.bias", "k_proj.bias", "norm.bias", "out.bias"}),
    ({"lora_bias": True}, {"q_proj.lora_bias"}),
    ({"use_dora": True}, {"q_proj.magnitude"}),
  ],
)
def test_what_is_trained_is_named_and_nothing_else_moves(options, more):
  model = nn.add_lora(Model(nnx.Rngs(0)), 2, 4, "q_proj", rngs=nnx.Rngs(0), **options)
  assert trained(model) == {"q_proj.lora_a", "q_proj.lora_b"} | more
  ids = jnp.arange(50)[None]
  optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.LoRAParam)
  rest = nnx.Not(nnx.LoRAParam)
  before = jax.tree.map(np.array, (nnx.state(model, rest), nnx.state(model, nnx.LoRAParam)))
  for _ in range(2):
    loss = lambda m: optax.softmax_cross_entropy_with_integer_labels(m(ids), ids).mean()  # noqa: E731
    optimizer.update(model, nnx.grad(loss, argnums=TRAINED)(model))
  jax.tree.map(np.testing.assert_array_equal, before[0], nnx.state(model, rest))
  same = jax.tree.map(lambda a, b: (a == b).all(), before[1], nnx.state(model, nnx.LoRAParam))
  assert not any(jax.tree.leaves(same))


def test_one_rule_finds_the_head_whatever_its_name():
  """`out` has as many outputs as the embedding has rows: neither packed nor of "all-linear"."""
  model = nn.quantize_model(Model(nnx.Rngs(0)))
  assert isinstance(model.q_proj, nn.NF4Linear) and type(model.out) is nnx.Linear
  model = nn.quantize_model(Model(nnx.Rngs(0)), exclude=["output head", "k_proj"])
  assert [type(m) is nnx.Linear for m in (model.q_proj, model.k_proj, model.out)] == [0, 1, 1]
  model = nn.quantize_model(Model(nnx.Rngs(0)), exclude=None)
  assert isinstance(model.out, nn.NF4Linear)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_what_is_trained_whole_is_held_in_32_bits(dtype):
  """In bfloat16, steps of 1e-5 would be rounded away; what it computes in stays bfloat16."""

  def make(param_dtype):
    model = Model(nnx.Rngs(0))
    module: Any
    for _, module in nnx.iter_modules(model):
      for field, value in list(vars(module).items()):
        if isinstance(value, nnx.Param):
          setattr(module, field, nnx.Param(value[...].astype(jnp.bfloat16)))
      if hasattr(module, "dtype"):
        module.dtype = dtype
    saved = {"modules_to_save": ["embed_tokens", "norm", "out"], "bias": "all"}
    return nn.add_lora(
      model, 2, 4, "q_proj", rngs=nnx.Rngs(0), init="gaussian", param_dtype=param_dtype, **saved
    )

  ids = jnp.arange(50)[None]
  moved = {}
  for param_dtype in (jnp.float32, jnp.bfloat16):
    model = make(param_dtype)
    assert model(ids).dtype == jnp.bfloat16
    state = nnx.state(model, nnx.LoRAParam)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(param_dtype)}
    before = jax.tree.map(jnp.copy, state)
    optimizer = nnx.Optimizer(model, optax.adam(1e-5), wrt=nnx.LoRAParam)
    loss = lambda m: jnp.square(m(ids).astype(jnp.float32)).mean()  # noqa: E731
    optimizer.update(model, nnx.grad(loss, argnums=TRAINED)(model))
    after = nnx.state(model, nnx.LoRAParam)
    moved[param_dtype] = float((before["out"]["kernel"][...] != after["out"]["kernel"][...]).mean())
  assert moved[jnp.float32] > 0.99 and moved[jnp.bfloat16] < 0.1, moved


def test_a_quantized_module_cannot_be_trained_whole():
  model = nn.quantize_model(Model(nnx.Rngs(0)), exclude=None)
  with pytest.raises(ValueError, match=r"`out` of `modules_to_save` is quantized.*exclude"):
    nn.add_lora(model, 2, 4, "q_proj", modules_to_save=["out"], rngs=nnx.Rngs(0))
  assert not trained(model)


def test_lora_plus_scales_the_steps_of_b_alone():
  model = nn.add_lora(Model(nnx.Rngs(0)), 2, 4, "q_proj", use_dora=True, rngs=nnx.Rngs(0))
  params = nnx.state(model, nnx.LoRAParam)
  grads = jax.tree.map(jnp.ones_like, params)
  tx = optax.chain(lowmem.adamw(1e-4), nn.scale_lora_b(16.0))
  updates: Any
  plain: Any
  updates, _ = tx.update(grads, tx.init(params), params)
  plain, _ = lowmem.adamw(1e-4).update(grads, lowmem.adamw(1e-4).init(params), params)
  for name, ratio in (("lora_a", 1), ("lora_b", 16), ("magnitude", 1)):
    got, want = updates["q_proj"][name][...], plain["q_proj"][name][...]
    np.testing.assert_allclose(got, ratio * want, rtol=1e-6)
  with pytest.raises(ValueError, match="lora_b"):
    nn.scale_lora_b().init({"a": jnp.ones(2)})
  with pytest.raises(ValueError, match="`ratio`"):
    nn.scale_lora_b(0.0)


# How adapters start.


def error(layer, w):
  return float(jnp.linalg.norm(layer.merged_matrix() - w))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_leaves_the_function_of_a_float_model_and_takes_the_largest_part(use_rslora):
  model: Any = nnx.Dict(layers=stack(width=32))
  x = normal(5, 32)
  want, w = scanned(model.layers, x), model.layers.kernel[...]
  nn.add_lora(model, 4, 8, "layers", init="pissa", use_rslora=use_rslora, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(scanned(model.layers, x), want, rtol=0, atol=1e-5)
  for i in range(3):
    left = np.linalg.svd(model.layers.base.kernel[i], compute_uv=False)
    np.testing.assert_allclose(left[:-4], np.linalg.svd(w[i], compute_uv=False)[4:], atol=1e-5)


def test_pissa_on_a_quantized_base_quantizes_the_rest_again():
  w = normal(64, 64) + 4 * normal(64, 1, seed=1) @ normal(1, 64, seed=2)
  plain = nn.NF4Linear.from_weight(w)
  model: Any = nnx.Dict(a=linear(64, 64, use_bias=False))
  model.a.kernel[...] = w.T
  nn.add_lora(model, 4, 8, "a", init="pissa", rngs=nnx.Rngs(0))
  nn.quantize_model(model)
  assert isinstance(model.a.base, nn.NF4Linear)
  assert error(model.a, w) < 0.7 * float(jnp.linalg.norm(plain.dequantize() - w))
  late = nn.LoRALinear(plain, 4, 8, init="pissa", rngs=nnx.Rngs(0))
  assert isinstance(late.base, nn.NF4Linear) and error(late, plain.dequantize()) > 0


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int8"])
def test_loftq_lowers_the_error_of_quantization(codebook):
  w = normal(64, 64)
  errors = [
    float(jnp.linalg.norm(nn.QuantizedLinear.from_weight(w, codebook=codebook).dequantize() - w))
  ]
  for iterations in (1, 5):
    base = linear(64, 64)
    base.kernel[...] = w.T
    init = nn.LoftQ(iterations, codebook)
    layer = nn.LoRALinear(base, 16, 16, init=init, rngs=nnx.Rngs(0))
    assert layer.base.codebook == codebook
    errors.append(error(layer, w))
  assert errors[1] < 0.8 * errors[0] and errors[2] < 0.98 * errors[1]
  with pytest.raises(ValueError, match="before they are quantized"):
    nn.LoRALinear(nn.NF4Linear.from_weight(w), 4, 8, init="loftq", rngs=nnx.Rngs(0))


def test_gaussian_is_of_deviation_one_over_the_rank():
  layer = nn.LoRALinear(linear(512, 8), 16, 16, init="gaussian", rngs=nnx.Rngs(0))
  np.testing.assert_allclose(layer.lora_a[...].std(), 1 / 16, rtol=0.03)
  assert not layer.lora_b[...].any()


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_that_changed_its_base_is_saved_as_one_of_the_original(
  use_rslora, use_dora, tmp_path
):
  def make():
    return nnx.Dict(layers=nnx.List([nnx.Dict(q_proj=linear(32, 32, seed=i)) for i in range(2)]))

  def run(model, x):
    for layer in model.layers:
      x = jnp.tanh(layer["q_proj"](x))
    return x

  x = normal(5, 32)
  model = make()
  nn.add_lora(
    model, 4, 8, "q_proj", init="pissa", use_rslora=use_rslora, use_dora=use_dora, rngs=nnx.Rngs(0),
  )  # fmt: skip
  want = run(moved(model), x)
  assert jnp.abs(want - run(make(), x)).max() > 1e-2
  nn.save_peft(model, tmp_path)
  loaded: Any = nn.load_peft(make(), tmp_path)
  assert loaded.layers[0]["q_proj"].rank == 8
  np.testing.assert_allclose(run(loaded, x), want, rtol=0, atol=1e-5)
  with pytest.raises(ValueError, match="has rank 8"):
    nn.load_peft(model, tmp_path)
  # Merged into the original weights, too.
  original = {f"layers.{i}.q_proj.weight": make().layers[i]["q_proj"].kernel[...].T for i in (0, 1)}
  nn.merge_lora(model, original=original)
  np.testing.assert_allclose(run(model, x), want, rtol=0, atol=1e-5)


# Merging.


@pytest.mark.parametrize("packed", [False, True])
def test_merge_keeps_the_dtype_of_the_weight(packed):
  options = {"param_dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
  model: Any = nnx.Dict(a=nnx.Linear(64, 8, **options), e=nnx.Embed(9, 8, **options))
  if packed:
    nn.quantize_model(model)
  moved(nn.add_lora(model, 2, 4, "a|e", rngs=nnx.Rngs(1)))
  want = {name: nnx.clone(model[name]).merge(dtype=jnp.bfloat16) for name in "ae"}
  nn.merge_lora(model)
  assert model.a.kernel.dtype == model.e.embedding.dtype == jnp.bfloat16
  np.testing.assert_array_equal(model.a.kernel[...], want["a"].kernel[...])
  np.testing.assert_array_equal(model.e.embedding[...], want["e"].embedding[...])


def test_merge_of_a_quantized_base_into_the_original_weights():
  model = nnx.Dict(layers=nnx.Dict(q_proj=stack(width=64)))
  w = np.asarray(model.layers.q_proj.kernel[...]).swapaxes(-1, -2)
  nn.add_lora(nn.quantize_model(model), 4, 8, "q_proj", rngs=nnx.Rngs(0))
  delta = moved(model).layers.q_proj.delta()
  original = {f"layers.{i}.q_proj.weight": w[i] for i in range(3)}
  for missing, words in ((w[0, :1], "shape"), (None, "lacks")):
    bad = {k: v for k, v in original.items() if "1" not in k}
    bad |= {} if missing is None else {"layers.1.q_proj.weight": missing}
    with pytest.raises(ValueError, match=words):
      nn.merge_lora(model, original=bad)
  assert isinstance(model.layers.q_proj, nn.LoRALinear)
  nn.merge_lora(model, original=original, dtype=jnp.bfloat16)
  got = model.layers.q_proj.kernel[...]
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, (w + delta).swapaxes(-1, -2).astype(jnp.bfloat16))


def test_an_adapters_own_bias_is_merged_into_the_bases():
  model: Any = nnx.Dict(a=linear(16, 8), b=linear(16, 8, use_bias=False))
  nn.add_lora(model, 2, 4, "a|b", lora_bias=True, rngs=nnx.Rngs(0))
  x = normal(3, 16)
  want = moved(model).a(x)
  with pytest.raises(ValueError, match="`b` has a bias"):
    nn.merge_lora(model)
  np.testing.assert_allclose(model.a.merge()(x), want, rtol=1e-5, atol=1e-5)


def test_a_general_layer_sums_over_axes_in_the_inputs_order():
  # flax sorts the axes in `__call__`, whatever their order when it is made.
  base = nnx.LinearGeneral((4, 4), 3, axis=(-1, -2), rngs=nnx.Rngs(0))
  x = normal(5, 4, 4)
  packed = nn.QuantizedEinsum(base, codebook="int8", block_size=None)
  np.testing.assert_allclose(packed(x), base(x), rtol=0, atol=0.03)
  layer = moved(nn.LoRALinear(base, 2, 4, rngs=nnx.Rngs(1)))
  np.testing.assert_allclose(layer.merge()(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [0, 3])
def test_an_adapters_own_bias_is_merged_where_outputs_are_permuted(depth):
  def make(key):
    options = {"bias_init": nnx.initializers.normal(), "rngs": nnx.Rngs(key)}
    return nnx.Einsum("btd,dnh->bthn", (8, 2, 3), (3, 2), **options)

  keys = jax.random.split(jax.random.key(0), depth or 1)
  base = nnx.vmap(make, in_axes=0)(keys) if depth else make(keys[0])
  layer = moved(nn.LoRALinear(base, 2, 4, lora_bias=True, rngs=nnx.Rngs(1)))
  layer.lora_bias[...] = normal(*layer.lora_bias.shape)
  x = normal(depth or 1, 1, 2, 8)

  def run(layer):
    if not depth:
      return layer(x[0])
    return nnx.vmap(lambda layer, x: layer(x))(layer, x)

  np.testing.assert_allclose(run(layer.merge()), run(layer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [nnx.Linear, nnx.Embed, nnx.LinearGeneral])
def test_a_new_weight_keeps_the_annotations_of_the_old(kind):
  layer = kind(8, 8, rngs=nnx.Rngs(0))
  field = "embedding" if kind is nnx.Embed else "kernel"
  value = np.asarray(getattr(layer, field)[...])
  with nnx.use_eager_sharding(False):  # there is no mesh
    old = nnx.Param(jnp.asarray(value), out_sharding=("x", None))
  setattr(layer, field, old)
  init = "default" if kind is nnx.Embed else "pissa"
  model = nn.add_lora(nnx.Dict(a=layer), 2, 4, "a", init=init, rngs=nnx.Rngs(1))
  if init == "pissa":
    assert getattr(model.a.base, field) is not old
    assert getattr(model.a.base, field).get_metadata() == old.get_metadata()
  model.a.lora_b[...] = model.a.lora_b[...] + 1
  merged = getattr(nn.merge_lora(model).a, field)
  assert merged.get_metadata() == old.get_metadata() and type(merged) is nnx.Param
  np.testing.assert_array_equal(old[...], value)


def test_calls_take_the_arguments_of_flaxs_layers():
  linear, table = nnx.Linear(64, 8, rngs=nnx.Rngs(0)), nnx.Embed(9, 8, rngs=nnx.Rngs(0))
  x, ids = normal(3, 64), jnp.arange(3)
  packed = nn.NF4Linear.from_weight(linear.kernel[...].T, linear.bias)
  for layer, given in (
    (packed, x),
    (nn.QuantizedEinsum(nnx.LinearGeneral(64, 8, rngs=nnx.Rngs(0))), x),
    (nn.LoRALinear(linear, 2, 4, rngs=nnx.Rngs(1)), x),
    (nn.LoRAEmbed(table, 2, 4, rngs=nnx.Rngs(1)), ids),
  ):
    np.testing.assert_array_equal(layer(inputs=given, out_sharding=None), layer(given))
