"""Adapters and packed weights for Linen models that were not edited."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import core, traverse_util
from flax import linen as nn
from flax.training.train_state import TrainState

import optax_lowmem as lowmem
from linen_cases import equal, gradient_temporaries, trained
from optax_lowmem import linen
from optax_lowmem import nn as lowmem_nn

VOCABULARY, WIDTH, HEADS, DEPTH = 32, 16, 2, 2
IDS = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (2, 5)))
KEY = jax.random.key(0)


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(x, x)
    y = jnp.tanh(nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm(name="norm")(x)))
    return x + nn.Dense(WIDTH, name="down")(y), None


class Model(nn.Module):
  """A small transformer as anyone writes it."""

  scanned: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(VOCABULARY, WIDTH, name="embed")(ids)
    block = nn.remat(Block) if self.remat else Block
    if self.scanned:
      split: Any = {"params": True, "dropout": True}
      stack = nn.scan(block, variable_axes={"params": 0}, split_rngs=split, length=DEPTH)
      x, _ = stack(name="layers")(x, None)
    else:
      for i in range(DEPTH):
        x, _ = block(name=f"layers_{i}")(x)
    return nn.Dense(VOCABULARY, name="lm_head")(x)


MODELS = {"unrolled": Model(), "scanned": Model(scanned=True, remat=True)}


def close(got, want, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want
  )


def new(lora):
  """What `init` gives, but for the values of A: drawing random numbers compiles for long."""
  shapes: Any = traverse_util.flatten_dict(jax.eval_shape(lora.init, KEY))
  random = np.random.default_rng(2)
  kept = {name: name[-1] == ("lora_b" if "embed" in name else "lora_a") for name in shapes}
  return traverse_util.unflatten_dict(
    {
      name: random.uniform(-0.25, 0.25, leaf.shape).astype("f4") * kept[name]
      for name, leaf in shapes.items()
    }
  )


def parameters_of(model, *args):
  """Random variables for a model."""
  random = np.random.default_rng(4)

  def draw(leaf):
    return jnp.asarray(random.normal(size=leaf.shape) / 4, leaf.dtype)

  return jax.tree.map(draw, jax.eval_shape(model.init, KEY, *args))


def moved(tree, scale=0.1):
  """The adapters after they were trained, so to speak: no factor is zero."""
  random = np.random.default_rng(3)
  return jax.tree.map(
    lambda a: np.asarray(a) + scale * random.normal(size=a.shape).astype("f4"), tree
  )


@functools.cache
def parameters(name, packed=False):
  model = MODELS[name]
  if packed:
    params, layers = parameters(name)
    return jax.jit(lambda p: linen.quantize_params(p, layers))(params), layers
  params = parameters_of(model, IDS)["params"]
  return params, linen.find_layers(model, {"params": params}, IDS)


def setup(name, packed=False, **options):
  params, layers = parameters(name, packed)
  lora = linen.LoRA(MODELS[name], layers, **{"rank": 4, "alpha": 8, **options})
  return MODELS[name], params, layers, lora


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_the_model_is_found_with_its_stack_and_matrix(name):
  _, _, layers, lora = setup(name)
  ends = ("query", "key", "value", "out")
  within = [*(f"attention.{end}" for end in ends), "up", "down"]
  stacks = ["layers"] if name == "scanned" else [f"layers_{i}" for i in range(DEPTH)]
  assert layers.names == ["embed", *(f"{s}.{w}" for s in stacks for w in within), "lm_head"]
  assert all(t.layer.stack == ((DEPTH,) if name == "scanned" else ()) for t in lora.chosen)
  assert [t.layer.name for t in lora.chosen] == layers.names[1:-1]  # all-linear: no head, no table
  adapters = new(lora)[stacks[0]]
  lead = (DEPTH,) if name == "scanned" else ()
  assert adapters["attention"]["out"]["lora_a"].shape == (*lead, WIDTH, 4)
  assert adapters["up"]["lora_b"].shape == (*lead, 4, 2 * WIDTH)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(adapters)} == {"float32"}


@pytest.mark.parametrize("name", MODELS)
def test_new_adapters_change_nothing_and_trained_ones_are_the_merged_weights(name):
  targets = "embed|query|out|up" if name == "scanned" else ".*"
  model, params, _, lora = setup(name, targets=targets)
  before = jax.tree.map(np.array, params)
  adapters = jax.jit(lora.init)(KEY) if name == "scanned" else new(lora)
  plain = jax.jit(model.apply)
  run = jax.jit(lora.apply)
  want = plain({"params": params}, IDS)
  np.testing.assert_array_equal(run({"params": params, "lora": adapters}, IDS), want)
  adapters = moved(adapters)
  got = run({"params": params, "lora": adapters}, IDS)
  assert float(jnp.abs(got - want).max()) > 0.1
  merged = jax.jit(lora.merge)(params, adapters)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  close(plain({"params": merged}, IDS), got)
  frozen = core.freeze({"params": params, "lora": adapters})
  np.testing.assert_array_equal(run(frozen, IDS), got)
  equal(params, before)


@pytest.mark.parametrize("name, packed", [("unrolled", False), ("scanned", True)])
def test_gradients_are_those_of_the_merged_weights(name, packed):
  model, params, _, lora = setup(
    name, packed, targets="query|out|up", use_rslora=True, rank_pattern={"up": 2}
  )
  adapters = moved(new(lora))
  want = jax.jit(
    jax.grad(lambda a: (linen.apply(model, {"params": lora.merge(params, a)}, IDS) ** 2).mean())
  )
  got = jax.jit(jax.grad(lambda a: (lora.apply({"params": params, "lora": a}, IDS) ** 2).mean()))
  close(got(adapters), want(adapters), 3e-5)


@pytest.mark.parametrize("name", ["scanned"])
def test_packed_model_is_the_model_with_decoded_kernels(name):
  model, params, _, lora = setup(name)
  packed, _ = parameters(name, True)
  again = jax.tree.leaves(packed, is_leaf=lambda x: isinstance(x, lowmem.QuantizedArray))
  kernels = [leaf for leaf in again if isinstance(leaf, lowmem.QuantizedArray)]
  assert len(kernels) == len(lora.chosen)
  zero = new(lora)
  decoded = jax.jit(lora.merge)(packed, zero)
  got = jax.jit(lambda p: linen.apply(model, {"params": p}, IDS))(packed)
  close(got, jax.jit(model.apply)({"params": decoded}, IDS))
  stacked = name == "scanned"
  up = (packed["layers"] if stacked else packed["layers_1"])["up"]
  dense = (params["layers"] if stacked else params["layers_1"])["up"]["kernel"]
  one = jax.tree.map(lambda leaf: leaf[1] if stacked else leaf, up["kernel"])
  reference = lowmem_nn.NF4Linear.from_weight((dense[1] if stacked else dense).T)
  equal(one, reference.weight.get_value())
  merged = lora.merge(params, moved(zero))  # from the original kernels, not the decoded ones
  assert merged["lm_head"]["kernel"] is params["lm_head"]["kernel"]


@pytest.mark.parametrize(
  "layer, shape",
  [
    (nn.DenseGeneral((3, 4), axis=(-1, 1)), (2, 6, 5)),
    (nn.DenseGeneral(4, axis=-1, batch_dims=(0,)), (2, 6, 5)),
    (nn.Einsum((3, 5, 4), "...d,ndh->...nh"), (2, 6, 5)),
    (nn.Einsum((3, 4, 5), "btnh,nhd->btd"), (2, 6, 3, 4)),
    (nn.Einsum((4, 3, 5), "bnd,hnd->bnh"), (2, 3, 5)),
    (nn.Dense(4, use_bias=False, dtype=jnp.bfloat16), (2, 5)),
    (nn.Dense(4, param_dtype=jnp.bfloat16), (5,)),
  ],
)
def test_any_arrangement_of_axes(layer, shape):
  x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
  params = parameters_of(layer, x)["params"]
  layers = linen.find_layers(layer, {"params": params}, x)
  lora = linen.LoRA(layer, layers, 2, 3, ".*")
  adapters = moved(new(lora))
  tolerance = 1e-5 if params["kernel"].dtype == jnp.float32 and layer.dtype is None else 3e-2
  for base in (params, linen.quantize_params(params, layers)):
    got = jax.jit(lora.apply)({"params": base, "lora": adapters}, x)
    want = jax.jit(lambda p, a: layer.apply({"params": lora.merge(p, a)}, x))(base, adapters)
    assert got.dtype == want.dtype and got.shape == want.shape
    close(got.astype("f4"), want.astype("f4"), tolerance)


def test_train_state_of_adapters_on_a_packed_model_learns_and_leaves_the_base():
  _, params, _, lora = setup("scanned", packed=True, targets="query|value|up")
  before = jax.tree.map(np.array, params)
  tx = lowmem.adamw(1e-2)
  state = TrainState.create(apply_fn=lora.apply, params=new(lora), tx=tx)

  def loss(adapters, params):
    logits = lora.apply({"params": params, "lora": adapters}, IDS)
    labels = jax.nn.one_hot(jnp.roll(IDS, 1, axis=1), VOCABULARY)
    return -(jax.nn.log_softmax(logits) * labels).sum(-1).mean()

  _, losses = trained(state, loss, params)
  assert losses[-1] < 0.5 * losses[0]
  equal(params, before)


def test_what_was_found_is_printed_in_a_line():
  class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
      for i in range(40):
        x = nn.Dense(8, name=f"layer_{i}")(x)
      for i in range(30):
        x = nn.Dense(8, name="wide" + "ab"[i % 2] * (i + 1))(x)
      return x

  x = jnp.ones((1, 8))
  variables = jax.eval_shape(Deep().init, jax.random.key(0), x)
  text = repr(linen.find_layers(Deep(), variables, x))
  assert text.startswith("Layers(70 found: layer_*, widea, widebb,") and len(text) < 300
  assert text.endswith("…; others: 1)")


def test_dropout_is_of_adapters_only_and_is_never_silently_off():
  _, params, _, lora = setup("scanned", dropout=0.5, targets=r"embed|up")
  run = jax.jit(
    lambda a, key: lora.apply({"params": params, "lora": a}, IDS, rngs={"dropout": key})
  )
  adapters = new(lora)
  plain = jax.jit(lora.model.apply)({"params": params}, IDS)
  np.testing.assert_array_equal(run(adapters, KEY), plain)
  adapters = moved(adapters)
  first = run(adapters, KEY)
  assert (run(adapters, KEY) == first).all() and (run(adapters, jax.random.key(1)) != first).any()
  with pytest.raises(ValueError, match=r"`rngs` has no 'dropout'.*deterministic=True"):
    lora.apply({"params": params, "lora": adapters}, IDS)
  layer, x = nn.Dense(4), jnp.ones((8, 64))
  variables = parameters_of(layer, x)
  layers = linen.find_layers(layer, variables, x)
  lora = linen.LoRA(layer, layers, 2, 4, ".*", dropout=0.25)
  variables["lora"] = moved(new(lora))
  keys = jax.random.split(KEY, 512)
  many = jax.jit(jax.vmap(lambda key: lora.apply(variables, x, rngs={"dropout": key})))(keys)
  assert float(many.std(0).min()) > 0.01
  close(
    many.mean((0, 1)), dataclasses.replace(lora, deterministic=True).apply(variables, x)[0], 0.02
  )


def test_other_collections_methods_and_mutable_are_the_models():
  class Normed(nn.Module):
    def setup(self):
      self.dense, self.norm = nn.Dense(4), nn.BatchNorm(use_running_average=False)

    def __call__(self, x):
      return self.norm(self.dense(x))

    def inner(self, x, *, double):
      return self.dense(x) * (2 if double else 1)

  model, x = Normed(), jnp.arange(10.0).reshape(2, 5)
  variables = parameters_of(model, x)
  layers = linen.find_layers(model, variables, x)
  assert layers == linen.find_layers(model, variables, x, method="inner", double=True)._replace(
    others=layers.others
  )
  lora = linen.LoRA(model, layers, 2, 4)
  with_lora = {**variables, "lora": new(lora)}
  for mutable in (["batch_stats"], True):
    want, updated = model.apply(variables, x, mutable=mutable)
    got, changed = lora.apply(with_lora, x, mutable=mutable)
    np.testing.assert_array_equal(got, want)
    changed.pop("lora", None)
    equal(changed, updated)
  got = lora.apply(with_lora, x, method="inner", double=True)
  np.testing.assert_array_equal(got, model.apply(variables, x, method="inner", double=True))


def test_shared_layers_vmap_jit_and_subclasses():
  class Doubled(nn.Dense):
    @nn.compact
    def __call__(self, x):
      return 2 * super().__call__(x)

  class Odd(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.jit(nn.Dense)(8, name="jitted")(x)
      tied = nn.Dense(8, name="tied")
      x = tied(tied(x))
      x = Doubled(8, name="doubled")(x)
      axes: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}
      x = nn.vmap(nn.Dense, axis_size=2, **axes)(8, name="experts")(x)
      conv = nn.Conv(8, (1,), name="conv")(x)
      return nn.Embed(8, 4, name="table").attend(nn.Dense(4, name="to")(conv))

  model, x = Odd(), jnp.arange(24.0).reshape(3, 8) / 10
  params = parameters_of(model, x)["params"]
  layers = linen.find_layers(model, {"params": params}, x)
  assert layers.names == ["jitted", "tied", "doubled", "experts", "to"]
  by_name = {layer.name: layer for layer in layers.layers}
  assert by_name["experts"].stack == (2,)
  packed = linen.quantize_params(params, layers)
  values = []
  for base, alpha in ((params, 2), (packed, 2), (packed, 8)):
    lora = linen.LoRA(model, layers, 2, alpha)
    adapters = moved(new(lora))
    got = jax.jit(lora.apply)({"params": base, "lora": adapters}, x)
    want = jax.jit(lambda p, a, m=lora.merge: model.apply({"params": m(p, a)}, x))
    close(got, want(base, adapters), 1e-4)
    values.append(got)
  assert (values[1] != values[2]).any()  # `nn.jit` did not take one trace for both


@pytest.mark.parametrize("scanned", [False, True])
def test_gradient_of_8_packed_layers_needs_no_more_than_one_and_a_half(scanned):
  width = 256

  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
      y = nn.DenseGeneral((3, width), name="up")(x)
      return x + nn.DenseGeneral(width, axis=(-2, -1), name="down")(jnp.tanh(y)), None

  class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
      if scanned:
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(Layer, length=8, **axes)(name="layers")(x, None)[0]
      for i in range(8):
        x, _ = Layer(name=f"layers_{i}")(x)
      return x

  model, x = Stack(), jax.ShapeDtypeStruct((4, width), jnp.float32)
  params = jax.eval_shape(model.init, KEY, x)["params"]
  layers = linen.find_layers(model, {"params": params}, x)
  packed = jax.eval_shape(lambda p: linen.quantize_params(p, layers), params)
  lora = linen.LoRA(model, layers, 8, 16)
  variables = {"params": packed, "lora": jax.eval_shape(lora.init, KEY)}
  layer = 6 * width * width * 4
  # 0.7 and 0.9; 8 and more where weights are kept, or are all decoded first.
  assert 0 < gradient_temporaries(lora.apply, variables, x) < 1.5 * layer


def test_adapters_and_packed_parameters_survive_orbax(tmp_path):
  _, params, _, lora = setup("scanned", packed=True)
  tree = {"params": params, "lora": moved(new(lora))}
  checkpointer = ocp.StandardCheckpointer()
  checkpointer.save(tmp_path / "tree", tree)
  checkpointer.wait_until_finished()
  back = checkpointer.restore(tmp_path / "tree", jax.eval_shape(lambda: tree))
  equal(back, tree)


class Tied(nn.Module):
  @nn.compact
  def __call__(self, ids):
    table = nn.Embed(8, 4, name="embed")
    return table.attend(nn.Dense(4, name="up")(table(ids)))


def test_an_adapter_of_a_tied_embedding_is_not_merged():
  ids = jnp.arange(4)[None]
  variables = Tied().init(jax.random.key(0), ids)
  layers = linen.find_layers(Tied(), variables, ids)
  lora = linen.LoRA(Tied(), layers, 2, 4, "embed|up")
  with pytest.raises(ValueError, match=r"embedding `embed` has an adapter.*tied"):
    lora.merge(variables["params"], lora.init(jax.random.key(1)))
  rest = linen.LoRA(Tied(), layers, 2, 4, "up")
  assert rest.merge(variables["params"], rest.init(jax.random.key(1)))
  with pytest.raises(ValueError, match="`rank_pattern` must be a regular expression"):
    linen.LoRA(Tied(), layers, 2, 4, "up", rank_pattern={"(": 2})


def test_errors_name_the_argument_and_what_there_is():
  model, params, layers, lora = setup("scanned")
  variables = {"params": params, "lora": new(lora)}
  for targets, message in {
    "quary": r"`targets` 'quary' matches no layer.*Nearest: query.*Available layers: embed, layers",
    "norm": r"`layers.norm` is a LayerNorm",
    "(": "`targets` must be a regular expression",
  }.items():
    with pytest.raises(ValueError, match=message):
      linen.LoRA(model, layers, 4, 8, targets)
  assert len(linen.LoRA(model, layers, 4, 8, "layers/attention/(query|value)").chosen) == 2
  with pytest.raises(ValueError, match=r"`exclude` 'quary' matches no layer.*Nearest: query"):
    linen.quantize_params(params, layers, exclude=["norm", "quary"])
  packed = linen.quantize_params(params, layers, exclude=["layers/attention/query", "norm"])
  attention = packed["layers"]["attention"]
  kinds = [isinstance(attention[name]["kernel"], jax.Array) for name in ("query", "value")]
  assert kinds == [True, False]
  with pytest.raises(ValueError, match="`rank` must be an integer of at least 1, got 0"):
    linen.LoRA(model, layers, 0, 8)
  with pytest.raises(ValueError, match="`rank_pattern` 'gate' matches no layer"):
    linen.LoRA(model, layers, 4, 8, rank_pattern={"gate": 2})
  with pytest.raises(TypeError, match=r"`model` must be a flax.linen.Module, got LoRA"):
    linen.LoRA(lora, layers, 4, 8)  # pyright: ignore[reportArgumentType]
  with pytest.raises(ValueError, match="has no collection 'lora', got"):
    lora.apply({"params": params}, IDS)
  with pytest.raises(ValueError, match="must have a collection 'params'"):
    linen.find_layers(model, params, IDS)
  twice = linen.LoRA(model, layers, 4, 8, "up")
  with pytest.raises(ValueError, match=r"`layers.attention.\w+.lora_a`, which is not in `targ"):
    twice.apply(variables, IDS)
  with pytest.raises(
    ValueError, match=r"must have `layers.attention.query.lora_a` of shape .*none"
  ):
    lora.apply({"params": params, "lora": new(twice)}, IDS)
  with pytest.raises(ValueError, match=r"of shape \(2, 16, 2\), got shape \(2, 16, 4\)"):
    dataclasses.replace(lora, rank=2).merge(params, variables["lora"])
  packed, _ = parameters("scanned", True)
  with pytest.raises(ValueError, match="is packed already"):
    linen.quantize_params(packed, layers)
  some = linen.quantize_params(params, layers, targets="up")
  for again in (some, linen.quantize_params(some, layers)):
    assert again["layers"]["up"]["kernel"] is some["layers"]["up"]["kernel"]
  assert jax.tree.structure(again) == jax.tree.structure(packed)
  with pytest.raises(ValueError, match=r"`embed` is a Embed"):
    linen.quantize_params(params, layers, targets="embed")
  bad = jax.tree.map(lambda p: np.asarray(p) * np.nan, params)
  with pytest.raises(ValueError, match="kernel` holds NaN or Inf"):
    linen.quantize_params(bad, layers)


def test_layer_with_an_adapter_of_its_own_is_left_to_itself():
  class Both(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(4, name="b")(linen.LoRADense(4, rank=2, alpha=2, name="a")(x))

  model, x = Both(), jnp.ones((2, 4))
  variables = parameters_of(model, x)
  layers = linen.find_layers(model, variables, x)
  with pytest.raises(ValueError, match="`a` is a LoRADense"):
    linen.LoRA(model, layers, 2, 4, "a")
  lora = linen.LoRA(model, layers, 2, 4)
  adapters = moved({**new(lora), "a": variables["lora"]["a"]})
  merged = lora.merge(variables["params"], adapters)
  want = model.apply({"params": merged, "lora": {"a": adapters["a"]}}, x)
  close(lora.apply({**variables, "lora": adapters}, x), want)


def test_stacks_along_other_axes_and_unknown_products_are_refused():
  class Late(nn.Module):
    @nn.compact
    def __call__(self, x):
      axes: Any = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}, "in_axes": None}
      return nn.vmap(nn.Dense, axis_size=3, **axes)(8, name="dense")(x)

  x = jnp.ones((2, 4))
  variables = parameters_of(Late(), x)
  with pytest.raises(ValueError, match=r"`dense` needs a kernel of shape.*`variable_axes`"):
    linen.find_layers(Late(), variables, x)
  own = nn.Dense(8, dot_general=lambda *a, **k: 2 * jax.lax.dot_general(*a, **k))
  variables = parameters_of(own, x)
  layers = linen.find_layers(own, variables, x)
  with pytest.raises(ValueError, match="sets `dot_general`"):
    linen.quantize_params(variables["params"], layers)
  lora = linen.LoRA(own, layers, 2, 4, ".*")
  adapters = new(lora)
  got = lora.apply({**variables, "lora": adapters}, x)
  np.testing.assert_array_equal(got, own.apply(variables, x))
  boxed = nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.normal(), (None, "x")))
  variables = parameters_of(boxed, x)
  layers = linen.find_layers(boxed, variables, x)
  with pytest.raises(ValueError, match="in a box of partitioning names"):
    linen.quantize_params(variables["params"], layers)
  lora = linen.LoRA(boxed, layers, 2, 4, ".*")
  adapters = moved(new(lora))
  merged = lora.merge(variables["params"], adapters)
  assert jax.tree.structure(merged) == jax.tree.structure(variables["params"])
  close(boxed.apply({"params": merged}, x), lora.apply({**variables, "lora": adapters}, x))


def test_layers_whose_weights_are_normalized_are_left_alone():
  class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(4, name="b")(nn.WeightNorm(nn.Dense(4, name="a"))(x))

  variables, x = jax.eval_shape(Normed().init, KEY, jnp.ones((2, 4))), jnp.ones((2, 4))
  layers = linen.find_layers(Normed(), variables, x)
  assert layers.names == ["b"]
  with pytest.raises(ValueError, match="`a` is a Dense in a WeightNorm"):
    linen.LoRA(Normed(), layers, 2, 4, "a")


class Step(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    return jnp.tanh(nn.Dense(4, name="a")(x)), None


class Stepwise(nn.Module):
  """A layer that runs in a condition, in a loop, and under a derivative."""

  def setup(self):
    self.a = nn.Dense(4)

  def __call__(self, x, _=None):
    if self.is_initializing():
      return self.a(x), None
    x = nn.cond(x.sum() > 0, lambda m, x: m.a(x), lambda m, x: x, self, x)
    x = nn.while_loop(
      lambda m, x: x.sum() < 0, lambda m, x: m.a(x), self, x, broadcast_variables="params"
    )
    return nn.vjp(lambda m, x: m.a(x), self, x)[1](x)[1], None


def doubled(variables):
  return jax.tree.map(lambda a: 2 * a, variables)


def mapped(kind, function=doubled, collection: Any = "params"):
  return nn.map_variables(kind, collection, function, init=False)


class Half(nn.Module):
  """A layer that is called as it is, and by a method whose variables are mapped."""

  def setup(self):
    self.a = nn.Dense(4)

  @functools.partial(nn.map_variables, mapped_collections="params", trans_in_fn=doubled)
  def other(self, x):
    return self.a(x)

  def __call__(self, x, _=None):
    return self.other(self.a(x)), None


OVER: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
STACK: Any = {"axis_size": 2, "in_axes": None, **OVER}


def found_in(kind, stack):
  """The layers of a model with that and a Dense, and its parameters: `stack` of the first."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(4, name="b")(kind(name="s")(x, None)[0])

  x, one = jnp.ones((2, 4)), {"kernel": (4, 4), "bias": (4,)}
  shapes = {"s": {"a": {k: (*stack, *s) for k, s in one.items()}}, "b": one}
  params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda s: isinstance(s, tuple))
  return Model(), linen.find_layers(Model(), {"params": params}, x), params, x


@pytest.mark.parametrize(
  "stack, kind",
  [
    ((), mapped(Step)),
    ((), mapped(Step, collection=True)),
    ((), mapped(Step, functools.partial(jax.tree.map, jnp.transpose))),
    ((), mapped(Step, functools.partial(jax.tree.map, jax.lax.stop_gradient))),
    ((), Half),
    ((2,), mapped(nn.scan(Step, length=2, **OVER))),
    ((2,), nn.scan(nn.remat(mapped(Step)), length=2, **OVER)),
    ((2,), nn.vmap(nn.jit(mapped(Step)), **STACK)),
  ],
)
def test_layers_whose_weights_are_mapped_are_left_alone(stack, kind):
  model, layers, params, _ = found_in(kind, stack)
  assert layers.names == ["b"]
  with pytest.raises(ValueError, match=r"`s.a` is a Dense whose kernel is computed"):
    linen.LoRA(model, layers, 2, 4, "a")
  with pytest.raises(ValueError, match=r"whose kernel is .* stored one \(`nn.map_variables`\)"):
    linen.quantize_params(params, layers, targets="s.a")


@pytest.mark.parametrize(
  "stack, kind",
  [
    ((), mapped(Step, collection="batch_stats")),
    ((), mapped(Step, lambda variables: variables)),
    ((), Stepwise),
    ((2,), nn.scan(nn.remat(Stepwise), length=2, **OVER)),
    ((2,), nn.scan(nn.jit(mapped(Step, jax.device_put)), length=2, **OVER)),
    ((2, 3), nn.vmap(nn.scan(Step, length=3, **OVER), **STACK)),
  ],
)
def test_layers_that_take_what_is_stored_are_found_however_it_comes_to_them(stack, kind):
  model, layers, params, x = found_in(kind, stack)
  assert {layer.name: layer.stack for layer in layers.layers} == {"s.a": stack, "b": ()}
  packed = linen.quantize_params(params, layers, exclude=None)
  assert linen.find_layers(model, {"params": packed}, x).names == ["s.a", "b"]


class Jitted(nn.Module):
  @nn.jit
  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name="a")(nn.LayerNorm(name="norm")(x))


def test_layers_of_modules_that_are_jitted_alike_are_all_found_each_time():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return Jitted(name="j_1")(Jitted(name="j_0")(x))

  x = jnp.ones((2, 4))
  variables = jax.eval_shape(Model().init, KEY, x)
  for _ in range(2):
    layers = linen.find_layers(Model(), variables, x)
    assert layers.names == ["j_0.a", "j_1.a"]
    assert ("j_1.norm", "LayerNorm") in layers.others


def test_merged_into_packed_parameters_layers_without_adapters_stay_packed():
  model, x = nn.Sequential([nn.Dense(8), nn.Dense(4)]), jnp.ones((2, 4))
  params = parameters_of(model, x)["params"]
  layers = linen.find_layers(model, {"params": params}, x)
  lora = linen.LoRA(model, layers, 2, 4, "layers_0")
  adapters = moved(new(lora))
  packed = linen.quantize_params(params, layers, exclude=None)
  merged = lora.merge(packed, adapters)
  assert isinstance(merged["layers_0"]["kernel"], jax.Array)
  assert isinstance(merged["layers_1"]["kernel"], lowmem.QuantizedArray)
  want = lora.apply({"params": packed, "lora": adapters}, x)
  close(linen.apply(model, {"params": merged}, x), want)
  want = lora.apply({"params": params, "lora": adapters}, x)
  close(model.apply({"params": lora.merge(params, adapters)}, x), want)


def test_the_head_is_found_by_its_sizes_and_not_packed():
  class Untied(nn.Module):
    @nn.compact
    def __call__(self, ids):
      x = nn.Embed(VOCABULARY, WIDTH, name="table")(ids)
      return nn.Dense(VOCABULARY, name="out")(nn.Dense(WIDTH, name="inner")(x))

  ids = jnp.arange(6)[None]
  variables = Untied().init(jax.random.key(0), ids)
  layers = linen.find_layers(Untied(), variables, ids)
  packed = linen.quantize_params(variables["params"], layers)
  assert isinstance(packed["out"]["kernel"], jax.Array)
  assert not isinstance(packed["inner"]["kernel"], jax.Array)
  packed = linen.quantize_params(variables["params"], layers, exclude=None)
  assert not isinstance(packed["out"]["kernel"], jax.Array)
