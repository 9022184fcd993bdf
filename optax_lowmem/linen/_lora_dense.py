"""A Dense layer of Flax Linen with a trainable low-rank correction."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from optax_lowmem._linear.contraction import Contraction
from optax_lowmem._variants.lora_scale import check_numbers, scale_of
from optax_lowmem._variants.low_rank import LowRank
from optax_lowmem.linen._nf4_dense import check_packable, packed_dense
from optax_lowmem.linen._product import correction, drop


class LoRADense(nn.Dense, kw_only=True):
  r"""A `flax.linen.Dense` plus a trainable low-rank correction.

  .. math:: y = \mathrm{Dense}(x) + s \, (\mathrm{drop}(x) \, A) \, B, \qquad s = \alpha / r

  `kernel` and `bias` are where Dense has them, in `"params"`, so that a checkpoint of Dense drops
  in. The factors, `lora_a` (in, rank) and `lora_b` (rank, out), float32, are alone in the
  collection `"lora"`: train ``variables["lora"]`` and nothing else. A starts uniform in
  :math:`\pm 1/\sqrt{\mathrm{in}}` as in PEFT and B at zero, so that a new adapter changes nothing.
  The correction is computed in the dtype of Dense's output.

  With a `codebook` the base is that of `NF4Dense`: the packed kernel is in `"quantized"`.
  Under `nn.scan` or `nn.vmap` give `variable_axes` the entries ``"lora": 0`` (and
  ``"quantized": 0``), and ``"dropout": True`` in `split_rngs`.

  Args:
    features: as in `flax.linen.Dense`, and so are all its other arguments.
    rank: r, the inner size of the correction.
    alpha: the numerator of the scale.
    dropout: the share of the inputs of A that are zeroed in training, from the stream `dropout`.
    deterministic: with dropout, whether nothing is dropped; or give it to the call, as in
      `flax.linen.Dropout`.
    use_rslora: scale by alpha / sqrt(rank) instead (rank-stabilized LoRA).
    codebook: None for a float base, or `"nf4"`, `"fp4"`, `"int8"`.
    block_size: as in `NF4Dense`.
    double_quantize: as in `NF4Dense`.

  Raises:
    ValueError: `rank`, `alpha`, `dropout` or `codebook` is out of range.

  >>> import jax, jax.numpy as jnp
  >>> from flax import linen as flax_linen
  >>> from optax_lowmem import linen
  >>> layer, x = linen.LoRADense(4, rank=2, alpha=4), jnp.ones((3, 8))
  >>> variables = layer.init(jax.random.key(0), x)
  >>> jax.tree.map(jnp.shape, variables["lora"])
  {'lora_a': (8, 2), 'lora_b': (2, 4)}
  >>> plain = flax_linen.Dense(4).apply({"params": variables["params"]}, x)
  >>> bool((layer.apply(variables, x) == plain).all())
  True

  References:
    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv:2106.09685.
    Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023,
    arXiv:2312.03732.
  """

  rank: int
  alpha: float
  dropout: float = 0.0
  deterministic: bool | None = None
  use_rslora: bool = False
  codebook: Literal["nf4", "fp4", "int8"] | None = None
  block_size: int | None = 64
  double_quantize: bool | None = None

  def __post_init__(self):
    check_numbers(self.rank, self.alpha, self.dropout)
    if self.codebook is not None:
      check_packable(self)
    super().__post_init__()

  @nn.compact
  def __call__(self, inputs: Any, deterministic: bool | None = None) -> jax.Array:
    """Returns Dense's output plus the correction, for `inputs` of shape (..., in)."""
    x = jnp.asarray(inputs)
    if self.codebook is None:
      y = super().__call__(x)
    else:
      y = packed_dense(self, x, self.codebook, self.block_size, self.double_quantize)
    variant, sizes = LowRank(), {"in": x.shape[-1], "out": self.features, "rank": self.rank}
    shapes = {part.name: part.shape(sizes) for part in variant.parts(False)}

    def new(name: str) -> jax.Array:
      key = self.make_rng("params") if name == "lora_a" else jax.random.key(0)  # B has none
      return variant.initial(key, shapes, False)[name]

    parts: Any = {name: self.variable("lora", name, new, name).value for name in shapes}
    found = {name: value.shape for name, value in parts.items()}
    if found != shapes:
      raise ValueError(
        f"LoRADense {'.'.join(self.path)!r} needs factors of shapes "
        f"{' and '.join(map(str, shapes.values()))}, the collection 'lora' holds "
        f"{' and '.join(map(str, found.values()))}."
      )
    x = jnp.asarray(x, y.dtype)
    if self.dropout > 0 and not nn.merge_param("deterministic", self.deterministic, deterministic):
      x = drop(x, self.dropout, self.make_rng("dropout"))
    parts["lora_b"] = scale_of(self.rank, self.alpha, self.use_rslora) * parts["lora_b"]
    return y + correction(x, variant, parts, Contraction.dense(x.shape[-1], self.features), y.dtype)
