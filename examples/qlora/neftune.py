"""NEFTune: noise on the embeddings while training, so that answers are learned less by heart."""

import math
from typing import Any

import jax
from flax import nnx


class NoisyEmbed(nnx.Embed):
  r"""An embedding with uniform noise in :math:`\pm \alpha / \sqrt{T d}` on what it gives.

  T is the sequence's length, padding included, and d the embedding's size. ``model.eval()`` turns
  the noise off.

  References:
    Jain et al., NEFTune: Noisy Embeddings Improve Instruction Finetuning, 2023, arXiv:2310.05914.
  """

  def __init__(self, embed: nnx.Embed, alpha: float, rngs: nnx.Rngs):
    value = embed.embedding[...]
    super().__init__(
      *value.shape,
      dtype=embed.dtype,
      param_dtype=embed.param_dtype,
      embedding_init=lambda *_: value,
      rngs=nnx.Rngs(0),
    )
    self.alpha, self.rngs, self.deterministic = alpha, rngs, False

  def __call__(self, inputs: jax.Array) -> jax.Array:
    x = super().__call__(inputs)
    if self.deterministic:
      return x
    size = self.alpha / math.sqrt(x.shape[-2] * x.shape[-1])
    return x + jax.random.uniform(self.rngs.noise(), x.shape, x.dtype, -size, size)


def with_noise(model: Any, alpha: float, rngs: nnx.Rngs) -> Any:
  """Gives the embeddings of a Llama noise, in place."""
  model.model.embed_tokens = NoisyEmbed(model.model.embed_tokens, alpha, rngs)
  return model
