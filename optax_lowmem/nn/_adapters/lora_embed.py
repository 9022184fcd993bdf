"""A trainable low-rank correction on top of a frozen embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optax_lowmem._variants.variant import Variant
from optax_lowmem.nn._adapters.adapter import Adapter
from optax_lowmem.nn._adapters.lora_init import Init
from optax_lowmem.nn._layers.base_layer import check_dense, with_matrix
from optax_lowmem.nn._layers.packed_layer import placed
from optax_lowmem.nn._proofs.flax_layers import is_embed


class LoRAEmbed(Adapter):
  r"""An embedding plus a trainable low-rank correction of its table.

  .. math:: y_t = E_t + s \, A_t B, \qquad s = \alpha / r

  The table :math:`E` is (vocabulary, features). A, (vocabulary, r), starts at zero and B,
  (r, features), normal, as in PEFT. With `use_dora` each feature (column of the table) has a
  trainable magnitude.

  `attend`, and `embedding`, by which tied output layers get at the table, are those of the base:
  as in PEFT the adapter is of the input alone.

  Args:
    base: an `nnx.Embed`.
    rank: as in `LoRALinear`.
    alpha: as in `LoRALinear`.
    use_rslora: as in `LoRALinear`.
    use_dora: as in `LoRALinear`.
    variant: as in `LoRALinear`.
    init: as in `LoRALinear`, of whose ways none applies to a table: they all start it alike.
    param_dtype: as in `LoRALinear`.
    rngs: gives the key for B (stream `params`).

  Raises:
    TypeError: `base` is no `nnx.Embed`, or `rngs` no `nnx.Rngs`.
    ValueError: as in `LoRALinear`.

  >>> import jax.numpy as jnp
  >>> from flax import nnx
  >>> from optax_lowmem import nn
  >>> base = nnx.Embed(32, 8, rngs=nnx.Rngs(0))
  >>> layer = nn.LoRAEmbed(base, rank=2, alpha=4, rngs=nnx.Rngs(1))
  >>> ids = jnp.array([3, 5])
  >>> bool((layer(ids) == base(ids)).all()), layer.lora_a.shape
  (True, (32, 2))
  """

  is_embed = True

  def __init__(
    self,
    base: nnx.Embed,
    rank: int | Sequence[int],
    alpha: float | Sequence[float],
    *,
    use_rslora: bool = False,
    use_dora: bool = False,
    variant: Variant | None = None,
    init: Init = "default",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    options: Any = {"use_dora": use_dora, "use_rslora": use_rslora, "variant": variant}
    options |= {"init": init, "param_dtype": param_dtype, "rngs": rngs}
    super().__init__(base, rank, alpha, **options)
    self.num_embeddings, self.features = base.num_embeddings, base.features

  @classmethod
  def check_base(cls, name: str, base: Any) -> None:
    super().check_base(name, base)
    if not is_embed(base):
      raise TypeError(f"`{name}` must be an nnx.Embed, got {type(base).__name__}.")
    check_dense("" if name == "base" else name, base)

  @property
  def embedding(self) -> nnx.Param:
    """The table of the base."""
    return self.base.embedding

  @property
  def dtype(self) -> Any:
    return self.base.dtype

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    self.check_one_layer()
    y = self.base(inputs, **_sharding(out_sharding))
    rows = inputs if self.num_embeddings > 1 else jnp.zeros_like(inputs)
    values = self.variant.looked_up(self.values(), lambda part: _rows(part, rows, out_sharding))
    added = self.variant.delta(self.scaled(values, y.dtype), jnp.matmul)
    return self.variant.apply(self, inputs, y, placed(added, out_sharding), None, {})

  def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
    """The base's `attend`."""
    return self.base.attend(query, **_sharding(out_sharding))

  def merge(self, original: jax.Array | None = None, dtype: Any = jnp.float32) -> nnx.Embed:
    """One plain `nnx.Embed`. An output layer that is tied to it gets the change too, then."""
    return with_matrix(self.base, self.merged_matrix(original), dtype)


def _rows(table: jax.Array, ids: jax.Array, out_sharding: Any) -> jax.Array:
  """Rows of A, placed along the axes of the ids as the output is to be."""
  if out_sharding is None:
    return jnp.take(table, ids, axis=0)
  whole = isinstance(out_sharding, NamedSharding)
  spec = P(*tuple(out_sharding.spec if whole else out_sharding)[: ids.ndim])
  place = NamedSharding(out_sharding.mesh, spec) if whole else spec
  return table.at[ids].get(out_sharding=place)


def _sharding(out_sharding: Any) -> dict[str, Any]:
  """The argument, only where it is given: subclasses may lack it."""
  return {} if out_sharding is None else {"out_sharding": out_sharding}
