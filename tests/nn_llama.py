"""A Llama with one module a layer, under Hugging Face's names, for tests of adapters.

The one of the example has its layers stacked and scanned; models of other people seldom do.
"""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import safetensors.numpy
from flax import nnx


class Layer(nnx.Module):
  def __init__(self, c, bias, rngs):
    d, ff, hd = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * hd, c["num_key_value_heads"] * hd

    def linear(i, o, use_bias=False):
      return nnx.Linear(i, o, use_bias=use_bias, rngs=rngs)

    self.self_attn = nnx.Dict(
      q_proj=linear(d, q, bias), k_proj=linear(d, kv, bias), v_proj=linear(d, kv, bias),
      o_proj=linear(q, d, bias),
    )  # fmt: skip
    self.mlp = nnx.Dict(gate_proj=linear(d, ff), up_proj=linear(d, ff), down_proj=linear(ff, d))
    self.input_layernorm = nnx.RMSNorm(d, epsilon=c["rms_norm_eps"], rngs=rngs)
    self.post_attention_layernorm = nnx.RMSNorm(d, epsilon=c["rms_norm_eps"], rngs=rngs)
    self.head_dim = hd

  def __call__(self, x, cos, sin):
    h, a = self.input_layernorm(x), self.self_attn
    q, k, v = (a[f"{n}_proj"](h).reshape(*x.shape[:-1], -1, self.head_dim) for n in ("q", "k", "v"))

    def turn(x):
      first, second = jnp.split(x, 2, axis=-1)
      return x * cos + jnp.concatenate([-second, first], axis=-1) * sin

    out = jax.nn.dot_product_attention(turn(q), turn(k), v, is_causal=True)
    x = x + a["o_proj"](out.reshape(*x.shape[:-1], -1))
    h, m = self.post_attention_layernorm(x), self.mlp
    return x + m["down_proj"](jax.nn.silu(m["gate_proj"](h)) * m["up_proj"](h))


class Llama(nnx.Module):
  def __init__(self, c, bias=False, rngs=None):
    rngs = rngs or nnx.Rngs(0)
    self.theta, self.head_dim = c["rope_parameters"]["rope_theta"], c["head_dim"]
    self.model: Any = nnx.Dict(
      embed_tokens=nnx.Embed(c["vocab_size"], c["hidden_size"], rngs=rngs),
      layers=nnx.List([Layer(c, bias, rngs) for _ in range(c["num_hidden_layers"])]),
      norm=nnx.RMSNorm(c["hidden_size"], epsilon=c["rms_norm_eps"], rngs=rngs),
    )
    self.tied = c["tie_word_embeddings"]
    if not self.tied:
      self.lm_head = nnx.Linear(c["hidden_size"], c["vocab_size"], use_bias=False, rngs=rngs)

  def __call__(self, ids):
    frequency = self.theta ** (-jnp.arange(0, self.head_dim, 2) / self.head_dim)
    angle = jnp.tile(jnp.arange(ids.shape[1])[:, None, None] * frequency, 2)
    x = self.model.embed_tokens(ids)
    for layer in self.model.layers:
      x = layer(x, jnp.cos(angle), jnp.sin(angle))
    x = self.model.norm(x)
    return self.model.embed_tokens.attend(x) if self.tied else self.lm_head(x)


def child(node: Any, name: str) -> Any:
  if isinstance(node, nnx.List):
    return node[int(name)]
  return node[name] if isinstance(node, nnx.Dict) else getattr(node, name)


def load(path, bias=False):
  """The model of a Hugging Face directory."""
  model = Llama(json.loads((path / "config.json").read_text()), bias)
  for name, value in safetensors.numpy.load_file(path / "model.safetensors").items():
    *parents, field = name.split(".")
    node: Any = functools.reduce(child, parents, model)
    if field == "bias":
      node.bias[...] = jnp.asarray(value)
    elif isinstance(node, nnx.Linear):
      node.kernel[...] = jnp.asarray(value.T)
    elif isinstance(node, nnx.Embed):
      node.embedding[...] = jnp.asarray(value)
    else:
      node.scale[...] = jnp.asarray(value)
  return model
