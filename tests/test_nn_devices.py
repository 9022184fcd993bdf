"""Packed layers and adapters under meshes of every kind of axes: the numbers of one device.

What needs eight devices runs in one process of its own: `python tests/test_nn_devices.py`.
"""

import re
import sys
import traceback
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as flax_linen
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import own_process
from optax_lowmem import linen, nn
from optax_lowmem._linear import packed_product as _multiply

MESHES = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
ROWS, FEATURES = P("d"), P(None, "d")  # of the input


def normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def spread(x, mesh, spec):
  return jax.device_put(x, NamedSharding(mesh, spec))


def float_lora():
  return nn.LoRALinear(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), 4, 8, rngs=nnx.Rngs(1))


def nf4_lora(**options):
  base = nn.NF4Linear.from_weight(normal(32, 64), normal(32, seed=1))
  return nn.LoRALinear(base, 4, 8, rngs=nnx.Rngs(1), **options)


def heads_lora():
  heads = nnx.LinearGeneral(64, (4, 8), rngs=nnx.Rngs(0))
  return nn.LoRALinear(nn.QuantizedEinsum(heads), 4, 8, rngs=nnx.Rngs(1))


def nnx_loss(make):
  layer = make()
  layer.lora_b[...] = normal(*layer.lora_b.shape, seed=2) / 8
  graph, lora, rest = nnx.split(layer, nnx.LoRAParam, ...)
  return (lambda lora, x: (jnp.tanh(nnx.merge(graph, lora, rest)(x)) ** 2).mean()), lora


def linen_loss(packed):
  model, x = flax_linen.Dense(32), normal(8, 64)
  params = model.init(jax.random.key(0), x)["params"]
  layers = linen.find_layers(model, {"params": params}, x)
  if packed:
    params = linen.quantize_params(params, layers)
  lora = linen.LoRA(model, layers, 4, 8, targets=".*")
  adapters = jax.tree.map(lambda a: normal(*a.shape) / 8, lora.init(jax.random.key(1)))

  def loss(adapters, x):
    return (jnp.tanh(lora.apply({"params": params, "lora": adapters}, x)) ** 2).mean()

  return loss, adapters


LAYERS = {
  "float": lambda: nnx_loss(float_lora),
  "nf4": lambda: nnx_loss(nf4_lora),
  "dora": lambda: nnx_loss(lambda: nf4_lora(use_dora=True)),
  "heads": lambda: nnx_loss(heads_lora),
  "linen": lambda: linen_loss(False),
  "linen nf4": lambda: linen_loss(True),
}


def close(got, want):
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(jax.device_get(one), jax.device_get(other), rtol=2e-5, atol=2e-6)


def gradients(layer, kind, spec):
  """Of the adapters and of the input, the latter placed as the input is."""
  mesh = jax.make_mesh((8,), ("d",), axis_types=(MESHES[kind],))
  loss, lora = LAYERS[layer]()
  x = normal(8, 64, seed=3)
  want = jax.grad(loss, (0, 1))(lora, x)
  with jax.set_mesh(mesh):
    x = spread(x, mesh, spec)
    got = jax.jit(jax.grad(loss, (0, 1)))(lora, x)
    if kind == "explicit":
      assert jax.typeof(got[1]).sharding.spec == jax.typeof(x).sharding.spec
    close(got, want)


def in_shard_map(layer, checked):
  """Each device takes its rows, and the sum over devices is differentiated in the map."""
  mesh = jax.make_mesh((8,), ("d",))
  loss, lora = LAYERS[layer]()
  x = normal(16, 64, seed=3)

  def step(lora, x):
    if not checked:  # then JAX adds up no gradients
      got = jax.grad(loss, (0, 1))(lora, x)
      return jax.lax.pmean(got[0], "d"), got[1] / 8
    return jax.grad(lambda lora, x: jax.lax.pmean(loss(lora, x), "d"), (0, 1))(lora, x)

  specs = {"in_specs": (P(), ROWS), "out_specs": (P(), ROWS), "check_vma": checked}
  got = jax.jit(jax.shard_map(step, mesh=mesh, **specs))(lora, spread(x, mesh, ROWS))
  close(got, jax.grad(loss, (0, 1))(lora, x))


def asked(kinds, whole):
  """`out_sharding`, of an axis name or of a mesh, as the layers of flax take it."""
  mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=kinds)
  want = NamedSharding(mesh, ROWS) if whole else ROWS
  linear = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
  embed = nn.LoRAEmbed(nnx.Embed(16, 32, rngs=nnx.Rngs(0)), 4, 8, rngs=nnx.Rngs(1))
  heads = nnx.LinearGeneral(64, (4, 8), rngs=nnx.Rngs(0))
  x, ids = normal(8, 64), jnp.arange(8) % 16
  layers = [
    (nn.quantize_model(nnx.Dict(a=nnx.clone(linear))).a, x),
    (nn.QuantizedEinsum(heads), x),
  ]
  if kinds[0] == AxisType.Explicit:  # layers of flax refuse others
    layers += [(nn.LoRALinear(linear, 4, 8, rngs=nnx.Rngs(1)), x), (embed, ids)]
  for layer, given in layers:
    with jax.set_mesh(mesh):
      y = jax.jit(lambda x, layer=layer: layer(x, out_sharding=want))(given)
      assert y.sharding.is_equivalent_to(NamedSharding(mesh, ROWS), y.ndim)
    close(y, layer(given))
  if kinds[0] == AxisType.Explicit:
    with jax.set_mesh(mesh):
      logits = embed.attend(normal(8, 32), out_sharding=want)
    assert jax.typeof(logits).sharding.spec[0] == "d"
  if whole:  # the mesh need not be that of a context
    y = jax.jit(lambda x: nn.QuantizedEinsum(heads)(x, out_sharding=want))(spread(x, mesh, P()))
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, ROWS), y.ndim)


def embedded():
  mesh = jax.make_mesh((8,), ("d",))
  layer = nn.LoRAEmbed(nnx.Embed(16, 32, rngs=nnx.Rngs(0)), 4, 8, rngs=nnx.Rngs(1))
  graph, lora, rest = nnx.split(layer, nnx.LoRAParam, ...)
  ids = jnp.arange(16).reshape(8, 2)

  def loss(lora, ids, **options):
    return (jnp.tanh(nnx.merge(graph, lora, rest)(ids, **options)) ** 2).mean()

  with jax.set_mesh(mesh):
    placed = jax.jit(jax.grad(lambda lora, ids: loss(lora, ids, out_sharding=ROWS)))
    close(placed(lora, spread(ids, mesh, ROWS)), jax.grad(loss)(lora, ids))


def as_on_gpus(case):
  """The case with weights bound to their input as GPUs bind them."""
  mine = _multiply._with_bits_of
  _multiply._with_bits_of = _multiply._bound_to
  try:
    case()
  finally:
    _multiply._with_bits_of = mine


def bound_without_sending(spec):
  """An element of a spread input stays where it is, and so do the codes."""
  mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
  weight = nn.NF4Linear.from_weight(normal(32, 64)).weight.get_value()
  codes = spread(weight.codes, mesh, spec)
  x = spread(normal(8, 64), mesh, ROWS)
  bind = jax.jit(lambda codes, x: _multiply._bound_to(replace(weight, codes=codes), x).codes)
  text = bind.lower(codes, x).compile().as_text()
  assert text is not None
  assert not re.search("all-|permute", text) and "xor" in text
  out = bind(codes, x)
  np.testing.assert_array_equal(out, weight.codes)
  assert out.sharding.is_equivalent_to(codes.sharding, out.ndim)


EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
CASES = {
  "embedding, explicit": embedded,
  **{
    f"asked for, {name}{', mesh' if whole else ''}": (lambda *a: lambda: asked(*a))(kinds, whole)
    for name, kinds in (
      ("explicit", (EXPLICIT, EXPLICIT)),
      ("mixed", (EXPLICIT, AUTO)),
      ("auto", (AUTO, AUTO)),
    )
    for whole in (False, True)
  },
  **{
    f"{layer}, {kind}, {name}": (lambda *a: lambda: gradients(*a))(layer, kind, spec)
    for kind, layers in (("explicit", LAYERS), ("auto", ("nf4",)))
    for layer in layers
    for name, spec in (("rows", ROWS), ("features", FEATURES))
  },
  **{
    f"{layer}, shard_map{'' if checked else ' unchecked'}": (lambda *a: lambda: in_shard_map(*a))(
      layer, checked
    )
    for layer, checked in (("float", True), ("nf4", True), ("dora", True), ("nf4", False))
  },
  **{
    f"bound, codes {spec}": (lambda *a: lambda: bound_without_sending(*a))(spec)
    for spec in (P(), ROWS, FEATURES)
  },
}
CASES |= {
  f"as on GPUs: {name}": (lambda case: lambda: as_on_gpus(case))(CASES[name])
  for name in CASES
  if name.startswith(("nf4, ", "dora, shard_map"))
}


@pytest.fixture(scope="module")
def failures():
  return own_process.printed(__file__)


@pytest.mark.parametrize("name", CASES)
def test_on_eight_devices(failures, name):
  assert f"ok: {name}\n" in failures, failures


if __name__ == "__main__":
  for name, case in CASES.items():
    if len(sys.argv) > 1 and sys.argv[1] not in name:
      continue
    try:
      case()
      print(f"ok: {name}", flush=True)
    except Exception:
      print(f"failed: {name}\n{traceback.format_exc(limit=-3)[-700:]}", flush=True)
