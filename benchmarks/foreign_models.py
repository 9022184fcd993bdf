"""QLoRA on models of other packages, by `nn.quantize_model` and `nn.add_lora` alone.

Every model is tiny and has random weights. Of each: what was found, that a new adapter changes no
bit, five steps of training in which nothing but adapters moves, and that merging changes nothing.

    pip install google-tunix
    pip install --no-deps dantinox mamba2-jax vitax jimmy-vision py7zr
    python benchmarks/foreign_models.py                  # all that are installed
    python benchmarks/foreign_models.py tunix.qwen3 flax # those whose names begin so
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from optax_lowmem import nn

VOCAB, LENGTH, STEPS = 96, 12, 5
Built = tuple[nnx.Module, Callable[[Any, jax.Array], jax.Array]]


def _tunix(name: str, cls: str, **settings: Any) -> Callable[[], Built]:
  def build() -> Built:
    module = importlib.import_module(f"tunix.models.{name}.model")
    sizes: dict[str, Any] = dict(
      num_layers=2, embed_dim=64, hidden_dim=128, num_heads=4, head_dim=32, num_kv_heads=2
    )
    sizes |= {"vocab_size": VOCAB, "rope_theta": 10_000, "norm_eps": 1e-5} | settings
    fields = {field.name for field in dataclasses.fields(module.ModelConfig)}
    sizes |= {"num_embed": VOCAB}
    if "attention_types" in fields:
      sizes["attention_types"] = (module.AttentionType.GLOBAL,) * 2
    config = module.ModelConfig(**{k: v for k, v in sizes.items() if k in fields})
    with nnx.use_eager_sharding(False):  # the weights are annotated for a mesh; there is none
      model = getattr(module, cls)(config, rngs=nnx.Rngs(0))

    def call(model: Any, ids: jax.Array) -> jax.Array:
      positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
      mask = jnp.broadcast_to(
        jnp.tri(ids.shape[1], dtype=bool), (ids.shape[0], ids.shape[1], ids.shape[1])
      )
      return model(ids, positions, None, mask)[0]

    return model, call

  return build


def _dantinox(**settings: Any) -> Callable[[], Built]:
  def build() -> Built:
    from dantinox.core.config import Config
    from dantinox.core.model import Transformer

    config = Config(
      dim=64, n_heads=4, head_size=16, num_blocks=2, vocab_size=VOCAB, max_context=32, **settings
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    return model, lambda model, ids: model(ids, deterministic=True).logits

  return build


def _mamba2() -> Built:
  import mamba2_jax

  config = mamba2_jax.Mamba2Config(
    vocab_size=VOCAB, hidden_size=64, state_size=16, head_dim=16, chunk_size=4, num_hidden_layers=2
  )
  model = mamba2_jax.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))

  def call(model: Any, ids: jax.Array) -> jax.Array:
    result = model(ids)
    return result["logits"] if isinstance(result, dict) else result.logits

  return model, call


def _images(call: Callable[[Any, jax.Array], jax.Array], size: int) -> Any:
  """A model of images, called on ids: each id is an image, and its class is to be guessed."""
  pictures = jax.random.normal(jax.random.key(7), (VOCAB, size, size, 3))
  return lambda model, ids: call(model, pictures[ids[:, 0]])[:, None]


def _vitax() -> Built:
  from vitax.models.vit import VisionTransformer

  with nnx.use_eager_sharding(False):
    model = VisionTransformer(
      num_classes=VOCAB, img_size=32, patch_size=8, num_layers=2, num_heads=4, mlp_dim=128,
      hidden_size=64, rngs=nnx.Rngs(0),
    )  # fmt: skip
  model.eval()
  return model, _images(lambda model, x: model(x), 32)


class FlaxDecoder(nnx.Module):
  """A decoder made of flax's own layers: Embed, MultiHeadAttention, Einsum, Linear."""

  def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
    self.embed = nnx.Embed(VOCAB, width, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
    self.up = nnx.Einsum("btd,cdf->cbtf", (2, width, 2 * width), rngs=rngs)
    self.down = nnx.LinearGeneral(2 * width, width, rngs=rngs)
    self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
    self.lm_head = nnx.Linear(width, VOCAB, rngs=rngs)

  def __call__(self, ids: jax.Array) -> jax.Array:
    x = self.embed(ids)
    x = x + self.attention(self.norms[0](x), mask=nnx.make_causal_mask(ids))
    gate, up = self.up(self.norms[1](x))
    return self.lm_head(x + self.down(jax.nn.silu(gate) * up))


def _flax() -> Built:
  return FlaxDecoder(64, 4, nnx.Rngs(0)), lambda model, ids: model(ids)


MODELS: dict[str, tuple[str, Callable[[], Built]]] = {
  "flax.MultiHeadAttention": ("flax", _flax),
  "tunix.llama3": ("google-tunix", _tunix("llama3", "Llama3")),
  "tunix.qwen2": ("google-tunix", _tunix("qwen2", "Qwen2")),
  "tunix.qwen3": ("google-tunix", _tunix("qwen3", "Qwen3")),
  "tunix.qwen3 MoE": (
    "google-tunix",
    _tunix("qwen3", "Qwen3", num_experts=4, num_experts_per_tok=2),
  ),
  "tunix.gemma": (
    "google-tunix",
    _tunix(
      "gemma", "Gemma", final_logit_softcap=None, use_post_attn_norm=True, use_post_ffw_norm=True
    ),
  ),
  "tunix.gemma MHA": (
    "google-tunix",
    _tunix(
      "gemma",
      "Gemma",
      final_logit_softcap=30.0,
      num_kv_heads=4,
      use_post_attn_norm=False,
      use_post_ffw_norm=False,
    ),
  ),
  "tunix.gemma3": (
    "google-tunix",
    _tunix("gemma3", "Gemma3", param_dtype=jnp.float32, sliding_window_size=8),
  ),
  "dantinox": ("dantinox", _dantinox()),
  "dantinox MLA": ("dantinox", _dantinox(attention_type="mla", rope_dim=8)),
  "mamba2_jax": ("mamba2-jax", _mamba2),
  "vitax.VisionTransformer": ("vitax", _vitax),
}


@dataclasses.dataclass
class Result:
  linears: int = 0  # linear layers with a weight of their own, by `add_lora`
  packed: int = 0
  adapters: int = 0
  warned: str = ""
  dense_bytes: int = 0
  packed_bytes: int = 0
  quantized_error: float = 0.0  # of logits, of their standard deviation
  losses: tuple[float, float] = (0.0, 0.0)
  merged_error: float = 0.0
  exact: bool = False  # B = 0 changes no bit
  frozen: bool = False  # nothing but adapters moved


def measure(build: Callable[[], Built], steps: int = STEPS) -> Result:
  """Goes the whole way with one model."""
  result = Result()
  model, call = build()
  ids = jax.random.randint(jax.random.key(3), (4, LENGTH), 0, VOCAB)
  logits = call(model, ids)
  result.dense_bytes = _bytes(model)

  # Adapters on the float model change no bit.
  floats, call = build()
  with warnings.catch_warnings(record=True):
    warnings.simplefilter("always")
    nn.add_lora(floats, rank=4, alpha=8, rngs=nnx.Rngs(1))
  result.linears = len(_of(floats, nn.LoRALinear))
  result.exact = bool((call(floats, ids) == logits).all())

  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    nn.quantize_model(model)
  result.warned = " ".join(str(w.message) for w in caught if w.category is UserWarning)
  quantized = call(model, ids)
  result.quantized_error = float(jnp.abs(quantized - logits).max() / logits.std())
  result.packed_bytes = _bytes(model)
  result.packed = len(_of(model, (nn.QuantizedLinear, nn.QuantizedEinsum)))
  with warnings.catch_warnings(record=True):
    warnings.simplefilter("always")
    nn.add_lora(model, rank=4, alpha=8, rngs=nnx.Rngs(1))
  result.adapters = len(_of(model, nn.LoRALinear))
  result.exact = result.exact and bool((call(model, ids) == quantized).all())

  before = _others(model)
  optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.LoRAParam)

  def loss(model: Any) -> jax.Array:
    y = call(model, ids)
    wanted = ids[:, :1] if y.shape[1] == 1 else jnp.roll(ids, -1, 1)
    return optax.softmax_cross_entropy_with_integer_labels(y, wanted).mean()

  @nnx.jit
  def step(model: Any, optimizer: Any) -> jax.Array:
    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    return value

  losses = [float(step(model, optimizer)) for _ in range(steps)]
  result.losses = losses[0], float(nnx.jit(loss)(model))
  after = _others(model)
  result.frozen = before.keys() == after.keys() and all(
    np.array_equal(before[key], after[key], equal_nan=True) for key in before
  )
  model = nnx.merge(*nnx.split(model))
  adapted = call(model, ids)
  merged = call(nn.merge_lora(model), ids)
  result.merged_error = float(jnp.abs(merged - adapted).max())
  return result


def _of(model: Any, kind: Any) -> list[Any]:
  return [module for _, module in nnx.iter_modules(model) if isinstance(module, kind)]


def _bytes(model: Any) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)) if hasattr(leaf, "nbytes"))


def _others(model: Any) -> dict[str, np.ndarray]:
  """All arrays but those of adapters and the keys and counters of random streams."""
  state = nnx.state(model, nnx.Not(nnx.Any(nnx.LoRAParam, nnx.RngState)))
  leaves = jax.tree.leaves_with_path(state)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("names", nargs="*", help="beginnings of names; all if none")
  names = tuple(parser.parse_args().names)
  print(
    "| model | package | linears | packed | adapters | KiB | packed KiB | error of NF4 | loss "
    f"| after {STEPS} steps | merged | bits kept |"
  )
  print("|---|---|---|---|---|---|---|---|---|---|---|---|")
  notes = []
  for name, (package, build) in MODELS.items():
    if names and not name.startswith(names):
      continue
    try:
      version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      notes.append(f"{name}: {package} is not installed")
      continue
    r = measure(build)
    kept = {True: "yes", False: "NO"}[r.exact and r.frozen]
    print(
      f"| {name} | {package} {version} | {r.linears} | {r.packed} | {r.adapters} "
      f"| {r.dense_bytes / 1024:.0f} | {r.packed_bytes / 1024:.0f} | {r.quantized_error:.2f} "
      f"| {r.losses[0]:.3f} | {r.losses[1]:.3f} | {r.merged_error:.0e} | {kept} |",
      flush=True,
    )
    if r.warned:
      notes.append(f"{name}: {r.warned}")
  print("", *notes, sep="\n")


if __name__ == "__main__":
  main()
