"""NEFTune: noise on the embeddings while training, so that answers are learned less by heart."""

import math
from typing import Any

import jax
from flax import nnx


class NoisyEmbed(nnx.Module):
  r"""An embedding with uniform noise in :math:`\pm \alpha / \sqrt{T d}` on what it gives.

  T is the sequence's length, padding included, and d the embedding's size. ``model.eval()`` turns
  the noise off. The output layer, where it is tied, gets at the table without noise.

  References:
    Jain et al., NEFTune: Noisy Embeddings Improve Instruction Finetuning, 2023, arXiv:2310.05914.
  """

  def __init__(self, embed: Any, alpha: float, rngs: nnx.Rngs):
    self.embed, self.alpha, self.rngs, self.deterministic = embed, alpha, rngs, False

  @property
  def embedding(self) -> Any:
    return self.embed.embedding

  @property
  def dtype(self) -> Any:
    return self.embed.dtype

  def __call__(self, ids: jax.Array) -> jax.Array:
    x = self.embed(ids)
    if self.deterministic:
      return x
    size = self.alpha / math.sqrt(x.shape[-2] * x.shape[-1])
    return x + jax.random.uniform(self.rngs.noise(), x.shape, x.dtype, -size, size)


def with_noise(model: Any, alpha: float, rngs: nnx.Rngs) -> Any:
  """Gives the embeddings of a Llama noise, in place."""
  model.model.embed_tokens = NoisyEmbed(model.model.embed_tokens, alpha, rngs)
  return model


def without_noise(model: Any) -> Any:
  """Takes the noise away, in place, and with it its place in the names of variables."""
  if isinstance(model.model.embed_tokens, NoisyEmbed):
    model.model.embed_tokens = model.model.embed_tokens.embed
  return model
