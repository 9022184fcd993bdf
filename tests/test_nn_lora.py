"""LoRA: what it computes, what it trains, and how it is put into a model and taken out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optax_lowmem import nn


def normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def linear(i, o, seed=0, **kwargs):
  return nnx.Linear(i, o, rngs=nnx.Rngs(seed), **kwargs)


def adapted(base, rank=4, alpha=8, seed=5, **kwargs):
  """A LoRALinear whose B is not zero."""
  layer = nn.LoRALinear(base, rank, alpha, rngs=nnx.Rngs(seed), **kwargs)
  layer.lora_b[...] = normal(*layer.lora_b[...].shape, seed=seed) / 8
  return layer


def stack(depth=3, width=16, seed=0):
  @nnx.split_rngs(splits=depth)
  @nnx.vmap
  def make(rngs):
    return nnx.Linear(width, width, rngs=rngs)

  return make(nnx.Rngs(seed))


def scanned(layer, x):
  body = nnx.remat(lambda layer, x: jnp.tanh(layer(x)))
  return nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(layer, x)


# What a LoRALinear computes.


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_is_base_plus_scaled_low_rank_product(quantized, use_rslora):
  base = linear(64, 32)
  if quantized:
    base = nn.NF4Linear.from_weight(base.kernel[...].T, base.bias)
  layer = adapted(base, rank=4, alpha=8, use_rslora=use_rslora)
  x = normal(5, 64, seed=1)
  a, b = layer.lora_a[...], layer.lora_b[...]
  assert layer.scale == (4.0 if use_rslora else 2.0)
  assert (layer.in_features, layer.out_features) == (64, 32)
  np.testing.assert_allclose(layer(x), base(x) + layer.scale * (x @ a @ b), rtol=1e-5, atol=1e-5)


def test_starts_as_peft_does():
  base = linear(256, 16)
  layer = nn.LoRALinear(base, rank=32, alpha=8, rngs=nnx.Rngs(1))
  a = layer.lora_a[...]
  assert a.dtype == layer.lora_b[...].dtype == jnp.float32
  assert a.shape == (256, 32) and layer.lora_b[...].shape == (32, 16)
  assert not layer.lora_b[...].any()
  # Uniform in +-1/16: 8192 draws come within 0.1 % of both ends, with standard deviation 1/(16 √3).
  np.testing.assert_allclose([a.min(), a.max()], [-1 / 16, 1 / 16], rtol=1e-2)
  np.testing.assert_allclose(a.std(), 1 / (16 * np.sqrt(3)), rtol=0.02)
  x = normal(3, 256)
  np.testing.assert_array_equal(layer(x), base(x))


def test_runs_in_the_dtype_of_the_base():
  base = nn.NF4Linear.from_weight(normal(32, 64).astype(jnp.bfloat16))
  layer = adapted(base)
  x = normal(3, 64).astype(jnp.bfloat16)
  y, grads = nnx.value_and_grad(
    lambda layer: layer(x).astype("f4").sum(), argnums=nnx.DiffState(0, nnx.LoRAParam)
  )(layer)
  assert layer(x).dtype == jnp.bfloat16
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))
  want = adapted(base)(x.astype("f4")).sum()
  np.testing.assert_allclose(y, want, rtol=0.05, atol=2.0)


def test_dropout_follows_train_and_eval():
  layer = adapted(linear(64, 32), dropout=0.5)
  plain = adapted(linear(64, 32))
  x = normal(5, 64, seed=1)
  first, second = layer(x), layer(x)
  assert not np.allclose(first, second)
  layer.eval()
  np.testing.assert_array_equal(layer(x), plain(x))
  np.testing.assert_array_equal(layer(x), layer(x))
  layer.train()
  assert not np.allclose(layer(x), plain(x))
  # Inverted dropout: the mean over many draws is the output without it.
  draws = jnp.stack([layer(x) for _ in range(400)])
  spread = draws.std(axis=0) / np.sqrt(400)
  assert (jnp.abs(draws.mean(axis=0) - plain(x)) < 5 * spread).all()


def test_no_dropout_means_no_random_state():
  layer = adapted(linear(8, 8))
  assert not jax.tree.leaves(nnx.state(layer, nnx.RngState))
  assert jax.tree.leaves(nnx.state(adapted(linear(8, 8), dropout=0.1), nnx.RngState))


# Stacks of layers.


@pytest.mark.parametrize("quantized", [False, True])
def test_stack_is_the_layers_one_by_one(quantized):
  model = nnx.Dict(layers=stack())
  if quantized:
    nn.quantize_model(model)
  layer = adapted(model.layers)
  assert layer.lora_a[...].shape == (3, 16, 4) and layer.lora_b[...].shape == (3, 4, 16)
  x = normal(5, 16, seed=1)
  graph, state = nnx.split(layer)
  want = x
  for i in range(3):
    want = jnp.tanh(nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))(want))
  np.testing.assert_allclose(nnx.jit(scanned)(layer, x), want, rtol=1e-5, atol=1e-6)


def test_stack_drops_differently_in_each_layer_and_each_call():
  layer = adapted(nn.quantize_model(nnx.Dict(layers=stack())).layers, dropout=0.5)
  # The same weights in every layer: what differs between layers is the dropout.
  graph, state = nnx.split(layer)
  params, rest = nnx.split_state(state, nnx.RngState, ...)
  rest = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 3), rest)
  layer = nnx.merge(graph, params, rest)
  x = normal(5, 16, seed=1)
  every = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
  first, second = every(layer, x), every(layer, x)
  assert not np.allclose(first[0], first[1]) and not np.allclose(first[1], first[2])
  assert not np.allclose(first, second)
  wrt = nnx.DiffState(0, nnx.LoRAParam)
  step = nnx.jit(
    lambda layer, x: nnx.value_and_grad(lambda layer: scanned(layer, x).sum(), argnums=wrt)(layer)
  )
  (one, _), (two, _) = step(layer, x), step(layer, x)
  assert one != two
  layer.eval()
  np.testing.assert_array_equal(scanned(layer, x), scanned(layer, x))


# Training.


def test_optimizer_trains_the_adapters_and_nothing_else():
  model = nnx.Dict(
    first=linear(64, 32), second=linear(32, 32), layers=stack(width=32), last=linear(32, 1)
  )
  nn.quantize_model(model, exclude="last")
  nn.add_lora(model, 4, 8, "first|layers", dropout=0.1, rngs=nnx.Rngs(1))
  assert {path[-1] for path in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)).paths} == {
    "lora_a",
    "lora_b",
  }
  assert len(jax.tree.leaves(nnx.state(model, nnx.LoRAParam))) == 4
  optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.LoRAParam)
  x = normal(32, 64, seed=1)
  target = jnp.sin(x[:, :1])

  def loss(model):
    y = scanned(model.layers, jnp.tanh(model.second(model.first(x))))
    return ((model.last(y) - target) ** 2).mean()

  @nnx.jit
  def step(model, optimizer):
    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    return value

  frozen = nnx.Not(nnx.Any(nnx.LoRAParam, nnx.RngState))
  before = jax.tree.map(np.array, nnx.state(model, frozen))
  lora_before = jax.tree.map(np.array, nnx.state(model, nnx.LoRAParam))
  losses = [float(step(model, optimizer)) for _ in range(30)]
  jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model, frozen))
  changed = jax.tree.map(
    lambda a, b: bool((a != b).any()), lora_before, nnx.state(model, nnx.LoRAParam)
  )
  assert all(jax.tree.leaves(changed))
  assert losses[-1] < 0.8 * losses[0]


# Putting adapters and 4-bit weights into a model.


class Attention(nnx.Module):
  def __init__(self, rngs):
    self.q_proj = nnx.Linear(64, 64, rngs=rngs)
    self.v_proj = nnx.Linear(64, 64, use_bias=False, rngs=rngs)


class Model(nnx.Module):
  """Modules in every kind of container."""

  def __init__(self, rngs):
    self.embed_tokens = nnx.Embed(8, 64, rngs=rngs)
    self.layers = nnx.List([nnx.Dict(self_attn=Attention(rngs)) for _ in range(2)])
    self.plain = nnx.data(
      {"a": nnx.Linear(64, 64, rngs=rngs), "b": [nnx.Linear(64, 64, rngs=rngs)]}
    )
    self.tail = nnx.Sequential(nnx.Linear(64, 64, rngs=rngs), jax.nn.relu)
    self.stacked = stack(width=64)
    self.lm_head = nnx.Linear(64, 8, rngs=rngs)


PATHS = {
    "layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.1.self_attn.q_proj",
    "layers.1.self_attn.v_proj", "plain.a", "plain.b.0", "tail.layers.0", "stacked",
}  # fmt: skip


def of_type(model, kind):
  return {".".join(map(str, path)) for path, m in nnx.iter_modules(model) if type(m) is kind}


def test_quantize_model_reaches_every_linear_but_the_head():
  model: Any = Model(nnx.Rngs(0))
  kernel, bias = model.plain["a"].kernel[...], model.plain["a"].bias
  assert nn.quantize_model(model) is model
  assert of_type(model, nn.NF4Linear) == PATHS
  assert of_type(model, nnx.Linear) == {"lm_head"}
  alone = nn.NF4Linear.from_weight(kernel.T)
  np.testing.assert_array_equal(model.plain["a"].dequantize(), alone.dequantize())
  assert model.plain["a"].bias is bias
  assert model.layers[0].self_attn.v_proj.bias is None
  assert model.stacked.dequantize().shape == (3, 64, 64)


@pytest.mark.parametrize(
  ("targets", "want"),
  [
    ("q_proj", {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"}),
    (r"layers\.1\..*", {"layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"}),
    (["stacked", r"plain\.a"], {"stacked", "plain.a"}),
    (".*", PATHS | {"lm_head"}),
  ],
)
def test_add_lora_reaches_what_the_targets_name(targets, want):
  model = nn.quantize_model(Model(nnx.Rngs(0)))
  assert nn.add_lora(model, 4, 8, targets, rngs=nnx.Rngs(1)) is model
  assert of_type(model, nn.LoRALinear) == want


def test_quantize_model_finds_the_base_under_an_adapter():
  model: Any = nn.add_lora(Model(nnx.Rngs(0)), 4, 8, "q_proj", rngs=nnx.Rngs(1))
  nn.quantize_model(model, targets="q_proj")
  assert isinstance(model.layers[0].self_attn.q_proj.base, nn.NF4Linear)
  assert isinstance(model.layers[0].self_attn.v_proj, nnx.Linear)


def test_a_shared_layer_stays_shared():
  model: Any = nnx.Dict(a=linear(64, 64), b=nnx.Dict(c=linear(64, 64)))
  model.b.c = model.a
  nn.add_lora(nn.quantize_model(model), 4, 8, "a", rngs=nnx.Rngs(1))
  assert model.a is model.b.c and isinstance(model.a, nn.LoRALinear)


def test_a_subclass_that_computes_something_else_is_left_alone():
  class Scaled(nnx.Linear):
    def __call__(self, x):  # pyright: ignore[reportIncompatibleMethodOverride]
      return 2 * super().__call__(x)

  model = nnx.Dict(a=linear(64, 64), b=Scaled(64, 64, rngs=nnx.Rngs(0)))
  nn.quantize_model(model)
  assert isinstance(model.a, nn.NF4Linear) and isinstance(model.b, Scaled)
  with pytest.raises(ValueError, match="`b` is a Scaled"):
    nn.add_lora(model, 4, 8, "b", rngs=nnx.Rngs(0))


def test_surgery_works_on_shapes_alone():
  def make():
    model = nn.quantize_model(Model(nnx.Rngs(0)))
    return nn.add_lora(model, 4, 8, "q_proj|stacked", dropout=0.1, rngs=nnx.Rngs(1))

  abstract, real = nnx.eval_shape(make), make()
  leaves = jax.tree.leaves(nnx.state(abstract))
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
  assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [
    (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(nnx.state(real))
  ]


def add(targets: Any = "q_proj", rank: Any = 4, alpha: Any = 8, **kwargs):
  return lambda model: nn.add_lora(model, rank, alpha, targets, rngs=nnx.Rngs(1), **kwargs)


def spoil(path, value):
  def call(model):
    layer = model.layers[1].self_attn.q_proj
    layer.kernel = nnx.Param(value(layer.kernel[...]))
    return {"add": add(), "quantize": nn.quantize_model}[path](model)

  return call


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (add("q_prj"), r"'q_prj' matches no .* Nearest: q_proj.*layers\.\*\.self_attn\.q_proj, "),
    (add(["q_proj", "k_proj"]), "'k_proj' matches no"),
    (add("layers"), "`layers` is a List"),
    (add("q_proj", init="svd"), "`init`.*svd"),
    (add("q_proj", bias="some"), "`bias`.*some"),
    (add("q_proj", lora_bias=True, use_dora=True), "`lora_bias`"),
    (add("q_proj", rank_pattern={"k_proj": 2}), "`rank_pattern` 'k_proj' matches no"),
    (add("q_proj", modules_to_save=["head"]), "`modules_to_save` 'head'.*lm_head"),
    (add("q_proj("), "regular expression"),
    (add([]), "empty"),
    (add(rank=0), "`rank`.*got 0"),
    (add(rank=2.0), "`rank`"),
    (add(alpha=-1), "`alpha`.*-1"),
    (add(alpha=float("nan")), "`alpha`"),
    (add(dropout=1.0), r"`dropout`.*1\.0"),
    (add(dropout=-0.1), "`dropout`"),
    (add(dropout="0.1"), "`dropout`.*'0.1'"),
    (add(alpha="8"), "`alpha`.*'8'"),
    (add(alpha=True), "`alpha`.*True"),
    (add(None), "`targets`.*None"),
    (add(rank_pattern={"(": 2}), r"`rank_pattern` must be a regular.*'\('"),
    (add(alpha_pattern=["q_proj"]), "`alpha_pattern` must map"),
    (add(modules_to_save=[1]), "`modules_to_save`"),
    (add(modules_to_save="head"), "`modules_to_save` 'head'.*lm_head"),
    (
      lambda model: nn.add_lora(model, 2, 4, dropout=0.1, rngs=nnx.Rngs(params=0)),
      "`rngs` has no stream 'dropout'",
    ),
    (
      lambda model: nn.add_lora(nnx.eval_shape(lambda: model), 2, 4, rngs=nnx.Rngs(0)),
      "shapes and no arrays.*eval_shape",
    ),
    (lambda model: nn.quantize_model(model.lm_head), "itself a Linear.*nnx.Dict"),
    (spoil("add", lambda w: w.astype(jnp.int8)), r"layers\.1\.self_attn\.q_proj.*int8"),
    (spoil("add", lambda w: w.at[0, 0].set(jnp.inf)), r"layers\.1\.self_attn\.q_proj.*NaN or Inf"),
    (spoil("quantize", lambda w: w.astype(jnp.int8)), r"layers\.1\.self_attn\.q_proj.*int8"),
    (spoil("quantize", lambda w: w.at[0, 0].set(jnp.nan)), r"layers\.1.*NaN or Inf"),
    (lambda model: nn.quantize_model(model, targets="x_proj"), "'x_proj' matches no"),
    (lambda model: nn.quantize_model(model, block_size=3), "block_size"),
    (
      lambda model: nn.quantize_model(model, exclude="lm_haed"),
      r"no module\. Nearest: lm_head\. A",
    ),
    (lambda model: nn.quantize_model(model, exclude=["lm_head", "x"]), "`exclude` 'x' matches no"),
    (nn.merge_lora, "no LoRALinear"),
  ],
)
def test_bad_input_is_refused_and_nothing_is_changed(call, words):
  model = Model(nnx.Rngs(0))
  with pytest.raises(ValueError, match=words):
    call(model)
  assert of_type(model, nnx.Linear) == PATHS | {"lm_head"}


class Odd(nnx.Module):
  """A proved layer whose bias is called something else."""

  def __init__(self):
    self.w, self.offset = nnx.Param(jnp.ones((64, 32))), nnx.Param(jnp.ones(32))

  def __call__(self, x):
    return x @ self.w + self.offset


def twice(args, dtype=None):
  return tuple(None if a is None else 2 * a for a in args)


@pytest.mark.parametrize(
  ("second", "options", "words"),
  [
    (lambda: linear(64, 4), {"init": "pissa"}, r"`rank` 8 is larger .*\(4, 64\) of `b`"),
    (lambda: linear(64, 4), {"init": "loftq"}, r"`rank` 8 is larger .*\(4, 64\) of `b`"),
    (lambda: nn.QuantizedEinsum(nnx.LinearGeneral(64, 64, rngs=nnx.Rngs(0))), {"init": "loftq"},
     "`b` is quantized"),
    (lambda: linear(64, 64, promote_dtype=twice), {"init": nn.LoftQ()}, "`b` sets .*promote_dtype"),
    (Odd, {"lora_bias": True}, "`lora_bias` needs a `bias`.*`b`"),
  ],
)  # fmt: skip
def test_every_layer_is_checked_before_the_first_is_changed(second, options, words):
  model = nnx.Dict(a=linear(64, 64), b=second(), head=linear(64, 64))
  kind, saved = type(model.b), ["head"]
  with pytest.raises(ValueError, match=words):
    nn.add_lora(model, 8, 16, "a|b", modules_to_save=saved, rngs=nnx.Rngs(1), **options)
  assert type(model.a) is nnx.Linear and type(model.b) is kind
  assert not nnx.state(model, nnx.LoRAParam)


@pytest.mark.parametrize("kind", ["linear", "general", "einsum"])
def test_a_layer_that_promotes_in_its_own_way_is_not_packed(kind):
  layer = {
    "linear": lambda **o: nnx.Linear(64, 64, **o),
    "general": lambda **o: nnx.LinearGeneral(64, 64, **o),
    "einsum": lambda **o: nnx.Einsum("bd,df->bf", (64, 64), **o),
  }[kind](promote_dtype=twice, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"`a` sets .*`promote_dtype`"):
    nn.quantize_model(nnx.Dict(a=layer))


def test_a_second_adapter_is_refused():
  model = add("q_proj")(Model(nnx.Rngs(0)))
  with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.*adapter already"):
    add("q_proj|v_proj")(model)
  assert not isinstance(model.layers[0].self_attn.v_proj, nn.LoRALinear)
  with pytest.raises(ValueError, match="adapter already"):
    nn.LoRALinear(model.layers[0].self_attn.q_proj, 4, 8, rngs=nnx.Rngs(0))
  with pytest.raises(TypeError, match=r"`rngs`.*nnx.Rngs"):
    nn.add_lora(model, 4, 8, "v_proj", rngs=0)  # pyright: ignore[reportArgumentType]
  with pytest.raises(TypeError, match="got Embed"):
    nn.LoRALinear(model.embed_tokens, 4, 8, rngs=nnx.Rngs(0))


def test_a_tuple_is_refused():
  model = nnx.Dict(a=nnx.data((linear(64, 64),)))
  with pytest.raises(ValueError, match="tuple"):
    nn.quantize_model(model)


# Taking adapters out again.


@pytest.mark.parametrize("quantized", [False, True])
def test_merged_model_computes_the_same(quantized):
  model: Any = nnx.Dict(
    one=linear(64, 32), many=stack(width=32), other=linear(32, 32, use_bias=False)
  )
  if quantized:
    nn.quantize_model(model, exclude="other")
  nn.add_lora(model, 4, 8, "one|many", dropout=0.1, rngs=nnx.Rngs(1))
  for layer in (model.one, model.many):
    layer.lora_b[...] = normal(*layer.lora_b[...].shape, seed=3) / 8
  model.eval()
  x = normal(5, 64, seed=1)

  def run(model):
    return model.other(scanned(model.many, model.one(x)))

  want, bias = run(model), model.one.base.bias
  assert nn.merge_lora(model) is model
  assert of_type(model, nnx.Linear) == {"one", "many", "other"}
  assert model.one.kernel[...].dtype == jnp.float32 and model.one.bias is bias
  np.testing.assert_allclose(run(model), want, rtol=1e-4, atol=1e-5)
