"""NF4Dense and LoRADense: Dense's parameters and outputs, adapters and packed bits beside them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import optax_lowmem as lowmem
from linen_cases import equal, gradient_temporaries, trained
from optax_lowmem import linen
from optax_lowmem import nn as lowmem_nn
from programs import temporaries_of

BAD: Any = "nf3"


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def with_b(lora, scale=0.1):
  """Adapters whose B is not zero."""
  return jax.tree.map(lambda leaf: leaf + scale * normal(*leaf.shape, seed=9), lora)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("use_bias", [True, False])
def test_new_adapter_is_dense_with_denses_own_parameters(dtype, use_bias):
  options: dict[str, Any] = {
    "use_bias": use_bias,
    "dtype": dtype,
    "bias_init": nn.initializers.normal(),
  }
  plain, layer = nn.Dense(24, **options), linen.LoRADense(24, rank=3, alpha=6, **options)
  x, key = normal(5, 16), jax.random.key(1)
  want: Any = plain.init(key, x)
  variables: Any = layer.init(key, x)
  equal(variables["params"], want["params"])
  got: Any = layer.apply(variables, x)
  assert got.dtype == (dtype or jnp.float32)
  np.testing.assert_array_equal(got, plain.apply(want, x))
  shapes = {"lora_a": ((16, 3), "float32"), "lora_b": ((3, 24), "float32")}
  assert {k: (v.shape, v.dtype.name) for k, v in variables["lora"].items()} == shapes
  bound = 1 / 16**0.5
  assert 0.8 * bound < float(jnp.abs(variables["lora"]["lora_a"]).max()) <= bound


@pytest.mark.parametrize("use_rslora", [False, True])
def test_gradient_is_that_of_the_merged_weight(use_rslora):
  layer, x = linen.LoRADense(6, rank=4, alpha=6, use_rslora=use_rslora), normal(5, 8)
  variables = jax.jit(layer.init)(jax.random.key(0), x)
  params, lora, g = variables["params"], with_b(variables["lora"]), normal(5, 6, seed=2)
  scale = 6 / (2 if use_rslora else 4)

  def merged(lora):
    kernel = params["kernel"] + scale * lora["lora_a"] @ lora["lora_b"]
    return ((x @ kernel + params["bias"]) * g).sum()

  def run(lora):
    y: Any = layer.apply({"params": params, "lora": lora}, x)
    return (y * g).sum()

  got, want = (jax.jit(jax.value_and_grad(f))(lora) for f in (run, merged))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int8"])
def test_packed_layer_is_nf4linear_on_denses_kernel(codebook):
  x, key = normal(5, 96), jax.random.key(1)
  options: dict[str, Any] = {"bias_init": nn.initializers.normal()}
  layer = linen.NF4Dense(40, codebook=codebook, **options)
  variables = jax.jit(layer.init)(key, x)
  dense = jax.jit(nn.Dense(40, **options).init)(key, x)["params"]
  reference = lowmem_nn.QuantizedLinear.from_weight(
    dense["kernel"].T, dense["bias"], codebook=codebook
  )
  equal(variables["quantized"]["kernel"], reference.weight.get_value())
  equal(variables["params"], {"bias": dense["bias"]})
  np.testing.assert_array_equal(layer.apply(variables, x), reference(x))
  equal(linen.pack(dense, variables["quantized"]), dict(variables))
  if codebook != "nf4":
    return
  adapted = linen.LoRADense(40, rank=2, alpha=2, codebook=codebook, **options)
  base = jax.jit(adapted.init)(key, x)
  equal(base["quantized"], variables["quantized"])
  np.testing.assert_array_equal(adapted.apply(base, x), reference(x))


def test_dtype_is_that_of_dense():
  layer, x = linen.NF4Dense(8, param_dtype=jnp.bfloat16), normal(2, 64)
  variables: Any = layer.init(jax.random.key(0), x)
  assert variables["quantized"]["kernel"].dtype == variables["params"]["bias"].dtype == jnp.bfloat16
  for given in (jnp.bfloat16, jnp.float32):
    plain = nn.Dense(8, param_dtype=jnp.bfloat16)
    want = jax.eval_shape(
      lambda p=plain, t=given: p.init_with_output(jax.random.key(0), x.astype(t))
    )
    got: Any = layer.apply(variables, x.astype(given))
    assert got.dtype == want[0].dtype == given


class Stack(nn.Module):
  """Three layers, one after another or scanned, on a packed base."""

  scanned: bool
  dropout: float = 0.0
  width: int = 64
  depth: int = 3
  remat: bool = False

  @nn.compact
  def __call__(self, x, deterministic=True):
    def layer(name=None):
      kind = nn.remat(linen.LoRADense) if self.remat else linen.LoRADense
      return kind(
        self.width,
        rank=4,
        alpha=8,
        codebook="nf4",
        dropout=self.dropout,
        deterministic=deterministic,
        name=name,
      )

    if not self.scanned:
      for i in range(self.depth):
        x = jnp.tanh(layer(f"layer_{i}")(x))
      return x
    body = nn.scan(
      lambda layer, x, _: (jnp.tanh(layer(x)), None),
      variable_axes={"params": 0, "quantized": 0, "lora": 0},
      split_rngs={"params": True, "dropout": True},
      length=self.depth,
    )
    return body(layer("layers"), x, None)[0]


def test_runs_under_scan_remat_vmap_and_abstract_init():
  x = normal(5, 64)
  model, unrolled = Stack(scanned=True, remat=True), Stack(scanned=False)
  variables = jax.jit(model.init)(jax.random.key(0), x)
  abstract = jax.eval_shape(model.init, jax.random.key(0), x)
  assert jax.tree.structure(abstract) == jax.tree.structure(variables)
  assert variables["quantized"]["layers"]["kernel"].shape == (3, 64, 64)
  variables["lora"] = with_b(variables["lora"])
  split = {
    name: {f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"]) for i in range(3)}
    for name, tree in variables.items()
  }
  want = jax.jit(unrolled.apply)(split, x)
  np.testing.assert_allclose(jax.jit(model.apply)(variables, x), want, rtol=1e-6, atol=1e-6)
  by_row = jax.jit(jax.vmap(model.apply, (None, 0)))(variables, x)
  np.testing.assert_allclose(by_row, want, rtol=1e-5, atol=1e-5)

  def loss(model, lora, variables):
    return (model.apply({**variables, "lora": lora}, x) ** 2).sum()

  gradient = jax.jit(jax.grad(loss, 1), static_argnums=0)
  got = gradient(model, variables["lora"], variables)
  want = gradient(unrolled, split["lora"], split)
  for name, leaf in got["layers"].items():
    right = jnp.stack([want[f"layer_{i}"][name] for i in range(3)])
    np.testing.assert_allclose(leaf, right, rtol=1e-4, atol=1e-5)


def test_layers_of_a_vmapped_module_are_each_their_own():
  kind = nn.vmap(
    linen.LoRADense,
    variable_axes={"params": 0, "quantized": 0, "lora": 0},
    split_rngs={"params": True},
  )
  layer, x = kind(8, rank=2, alpha=2, codebook="nf4"), normal(3, 5, 64)
  variables = jax.jit(layer.init)(jax.random.key(0), x)
  variables["lora"] = with_b(variables["lora"])
  got = jax.jit(layer.apply)(variables, x)
  apply = jax.jit(linen.LoRADense(8, rank=2, alpha=2, codebook="nf4").apply)
  for i in range(3):
    alone = apply(jax.tree.map(lambda leaf, i=i: leaf[i], variables), x[i])
    np.testing.assert_allclose(got[i], alone, rtol=1e-5, atol=1e-5)


def test_dropout_is_of_the_adapters_input_and_asks_as_linens_does():
  layer = linen.LoRADense(8, rank=2, alpha=2, dropout=0.5)
  x, key = normal(4, 64), jax.random.key(3)
  variables = layer.init(jax.random.key(0), x, deterministic=True)
  np.testing.assert_array_equal(
    layer.apply(variables, x, deterministic=False, rngs={"dropout": key}),
    layer.apply(variables, x, deterministic=True),
  )  # B is zero: the base's input is whole
  variables["lora"] = {"lora_a": jnp.eye(64)[:, :2], "lora_b": jnp.eye(2, 8)}
  base: Any = nn.Dense(8).apply({"params": variables["params"]}, x)
  adapted: Any = layer.apply(variables, x, deterministic=False, rngs={"dropout": key})
  low = adapted[:, :2] - base[:, :2]
  ratio = np.asarray(low / x[:, :2])
  assert ((np.abs(ratio) < 1e-4) | (np.abs(ratio - 2) < 1e-4)).all() and 0 < ratio.mean() < 2
  with pytest.raises(Exception, match="deterministic"):
    layer.apply(variables, x)
  with pytest.raises(Exception, match="dropout"):
    layer.apply(variables, x, deterministic=False)
  stack = Stack(scanned=True, dropout=0.5)
  variables = jax.jit(stack.init)(jax.random.key(0), x)
  variables["lora"] = with_b(variables["lora"])
  run = jax.jit(lambda key: stack.apply(variables, x, False, rngs={"dropout": key}))
  assert (run(key) == run(key)).all() and (run(key) != run(jax.random.key(4))).any()


def test_train_state_of_adapters_alone_learns_and_leaves_the_base():
  model, x = Stack(scanned=True), normal(16, 64)
  variables = jax.jit(model.init)(jax.random.key(0), x)
  base = {name: tree for name, tree in variables.items() if name != "lora"}
  before = jax.tree.map(np.array, base)
  tx = lowmem.adamw(3e-3, min_size=64)
  state = TrainState.create(apply_fn=model.apply, params=variables["lora"], tx=tx)
  target = jnp.roll(x, 1, axis=0)

  def loss(lora, base):
    y: Any = model.apply({**base, "lora": lora}, x)
    return ((y - target) ** 2).mean()

  state, losses = trained(state, loss, base)
  assert losses[-1] < 0.8 * losses[0]
  equal(base, before)
  assert (
    lowmem.state_bytes(state.opt_state)["device"] < 4 * lowmem.state_bytes(state.params)["device"]
  )


@pytest.mark.parametrize("scanned", [False, True])
def test_gradient_of_8_layers_needs_no_more_than_one_and_a_half(scanned):
  width = 512
  model = Stack(scanned=scanned, width=width, depth=8)
  x = jax.ShapeDtypeStruct((4, width), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)

  needed = gradient_temporaries(model.apply, variables, x)
  # 1.1 and 1.3, of which a sixth are activations and gradients; 8 where weights are kept.
  assert 0 < needed < 1.5 * width * width * 4


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: linen.LoRADense(4, rank=0, alpha=1), "`rank` must be an integer of at least 1, got 0"),
    (lambda: linen.LoRADense(4, rank=2, alpha=0), "`alpha` must be a positive number, got 0"),
    (lambda: linen.LoRADense(4, rank=2, alpha=2, dropout=1.0), r"`dropout` must be in \[0, 1\)"),
    (lambda: linen.LoRADense(4, rank=2, alpha=2, codebook=BAD), "`codebook` must be one of"),
    (lambda: linen.NF4Dense(4, codebook=BAD), "`codebook` must be one of nf4, fp4, int8"),
    (
      lambda: linen.NF4Dense(4, dot_general=jax.lax.dot_general),
      "this NF4Dense sets `dot_general`, which",
    ),
  ],
)
def test_settings_that_mean_nothing_are_refused_at_construction(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_variables_in_the_wrong_place_are_refused():
  x, key = normal(2, 64), jax.random.key(0)
  dense = nn.Dense(8).init(key, x)
  packed, adapted = linen.NF4Dense(8), linen.LoRADense(8, rank=2, alpha=2)
  variables = packed.init(key, x)
  with pytest.raises(ValueError, match=r"found a `kernel` in the collection 'params'.*`pack"):
    packed.apply({**variables, "params": dense["params"]}, x)
  with pytest.raises(TypeError, match="must be a QuantizedArray"):
    packed.apply({**variables, "quantized": {"kernel": dense["params"]["kernel"]}}, x)
  with pytest.raises(Exception, match="lora_a"):
    adapted.apply(dense, x)  # flax's own error: no collection "lora"
  lora = linen.LoRADense(8, rank=3, alpha=2).init(key, x)["lora"]
  with pytest.raises(ValueError, match=r"needs factors of shapes \(64, 2\)"):
    adapted.apply({**dense, "lora": lora}, x)
  with pytest.raises(ValueError, match=r"must have `kernel` of shape \(64, 8\)"):
    linen.pack({"kernel": jnp.ones((8, 8))}, variables["quantized"])
  with pytest.raises(ValueError, match="holds NaN or Inf"):
    linen.pack({"kernel": jnp.full((64, 8), jnp.nan)}, variables["quantized"])


def test_lora_plus_knows_the_names():
  lora = linen.LoRADense(8, rank=2, alpha=2).init(jax.random.key(0), normal(2, 64))["lora"]
  tx = optax.chain(optax.sgd(0.5), lowmem_nn.scale_lora_b(16.0))
  updates: Any
  updates, _ = tx.update(jax.tree.map(jnp.ones_like, lora), tx.init(lora))
  assert float(updates["lora_a"][0, 0]) == -0.5 and float(updates["lora_b"][0, 0]) == -8.0


@pytest.mark.parametrize("stacked", [False, True])
def test_a_packed_weight_that_a_vmapped_batch_shares_is_decoded_once(stacked):
  layer, width = linen.NF4Dense(256, use_bias=False), 256
  variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, width)))
  x = jnp.ones((16, 1, width))

  def loss(x, variables):  # of one example; with `stacked`, through two layers under `jax.vmap`
    one: Any = jax.vmap(layer.apply, (0, None)) if stacked else layer.apply
    return (one(variables, x) ** 2).sum()

  if stacked:
    variables = jax.tree.map(lambda s: jax.ShapeDtypeStruct((2, *s.shape), s.dtype), variables)
  gradient = jax.jit(jax.vmap(jax.grad(loss), (0, None)))
  compiled = gradient.lower(x, variables).compile()
  # 1.1 for one layer, 4.3 for two; 16 and 32 more if it is decoded for every example.
  assert temporaries_of(compiled) < (5 if stacked else 1.5) * 4 * width * width
