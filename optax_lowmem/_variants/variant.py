"""What an adapter holds and computes: the contract of every kind of adapter."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

Arrays = dict[str, Any]


class Part(NamedTuple):
  """One array of an adapter, which is trained.

  Attributes:
    name: the attribute of the layer that holds it, such as `lora_a`.
    axes: what each axis is as long as: `"in"`, `"out"` or `"rank"`; or its length. Stacks and
      experts put their own axes before them.
    peft: the end of its name in PEFT's files, such as `lora_A.weight`. There its axes are in the
      opposite order, as PyTorch has them.
    scaled: whether the adapter's scale is multiplied into this array before it is used: of arrays
      that are multiplied with each other, into one.
    older: another end that is read too.
  """

  name: str
  axes: tuple[str | int, ...]
  peft: str
  scaled: bool = False
  older: str = ""

  def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape, for the lengths of `"in"`, `"out"` and `"rank"`."""
    return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self.axes)

  def within(self, rank: int) -> tuple[slice, ...]:
    """The index of what a layer of that rank has of an array of a larger one."""
    return tuple(slice(rank if axis == "rank" else None) for axis in self.axes)

  def rows(self, axis: str, rows: slice) -> tuple[slice, ...]:
    """The index of what some inputs or outputs need."""
    return tuple(rows if own == axis else slice(None) for own in self.axes)


@dataclasses.dataclass(frozen=True)
class Variant(abc.ABC):
  r"""A kind of adapter: what it holds, how it starts, what it does to a weight, its names in PEFT.

  A subclass is one whole kind. Pass an instance as `variant` to `add_lora`, `LoRALinear`,
  `LoRAEmbed`, `load_peft`, `merge_peft` and `optax_lowmem.linen.LoRA`; merging, stacks of layers,
  quantized bases, dropout, and the files of PEFT then work as for LoRA. Instances are compared,
  and are part of compiled programs: subclasses are frozen dataclasses.

  .. math:: y = x \, (W + s \, \Delta), \qquad s = \alpha / r

  `peft_type`, `parts`, `initial` and `delta` must be defined, and :math:`\Delta`, (in, out), must
  be zero at the start. The rest has defaults.

  Raises:
    ValueError: where it is used, no part is `scaled`.

  >>> import dataclasses, jax, jax.numpy as jnp
  >>> from flax import nnx
  >>> from optax_lowmem import nn
  >>> @dataclasses.dataclass(frozen=True)
  ... class Diagonal(nn.Variant):
  ...   peft_type = "DIAGONAL"
  ...   def parts(self, embedding):
  ...     return (nn.Part("diagonal_a", ("in", "rank"), "diagonal_A"),
  ...             nn.Part("diagonal_d", ("rank",), "diagonal_d", scaled=True),
  ...             nn.Part("diagonal_b", ("rank", "out"), "diagonal_B"))
  ...   def initial(self, key, shapes, embedding):
  ...     parts = {name: jax.random.normal(key, shape) for name, shape in shapes.items()}
  ...     return parts | {"diagonal_d": jnp.zeros(shapes["diagonal_d"])}
  ...   def delta(self, parts, dot):
  ...     return dot(parts["diagonal_a"] * parts["diagonal_d"][..., None, :], parts["diagonal_b"])
  >>> model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
  >>> model = nn.add_lora(model, 2, 4, ".*", variant=Diagonal(), rngs=nnx.Rngs(1))
  >>> sorted(nnx.state(model, nnx.LoRAParam)["layers"][0])
  ['diagonal_a', 'diagonal_b', 'diagonal_d']
  >>> nn.merge_lora(model)(jnp.ones((3, 8))).shape
  (3, 4)
  """

  peft_type: ClassVar[str]
  """What `peft_type` is in `adapter_config.json`."""

  peft_keys: ClassVar[Mapping[str, str | None]] = {}
  """Keys of LoRA's configuration that go by another name in this kind's, or that it has not."""

  normed: ClassVar[bool] = False
  """Whether each output's weights are multiplied by `factor`, too."""

  @abc.abstractmethod
  def parts(self, embedding: bool) -> tuple[Part, ...]:
    """The arrays of an adapter of a linear layer, or of an embedding, whose inputs are its rows."""

  @abc.abstractmethod
  def initial(self, key: jax.Array, shapes: Mapping[str, Any], embedding: bool) -> Arrays:
    """The parts as they start.

    Args:
      key: a random key.
      shapes: of the parts by their names, with the leading axes of stacks and experts.
      embedding: as in `parts`.

    Returns:
      The arrays by their names, float32.
    """

  @abc.abstractmethod
  def delta(self, parts: Arrays, dot: Callable[[Any, Any], Any]) -> Any:
    """What is added to the weight, before the scale.

    Args:
      parts: the arrays by their names; of jax, or of NumPy where files are merged, with all or some
        of the inputs and outputs.
      dot: the product of an (..., in, n) and an (..., n, out) array, transposed where the weight
        is.

    Returns:
      What `dot` returns, or an array of its shape.
    """

  def config(self) -> dict[str, Any]:
    """The fields of `adapter_config.json` that are this kind's own, and are set."""
    return {}

  @classmethod
  def of(cls, config: Mapping[str, Any]) -> Variant | None:
    """The variant that a configuration describes, if it is one of this class."""
    return cls() if config.get("peft_type") == cls.peft_type else None

  def check(self, name: str, base: Any, rank: Any, init: Any) -> None:
    """Refuses a layer that this kind cannot be put on, or cannot start on as `init` says.

    Args:
      name: what the layer is called in the message.
      base: the layer.
      rank: as in `LoRALinear`.
      init: as in `LoRALinear`.

    Raises:
      ValueError: `init` is not "default".
    """
    if init != "default":
      raise ValueError(
        f"`init` {init!r} is a way in which LoRA starts, and the adapter of {name} is "
        f"{type(self).__name__}. Leave it out."
      )

  def start(
    self, layer: Any, shapes: Mapping[str, Any], init: Any, dtype: Any, rngs: Any
  ) -> Arrays:
    """The parts as `init` says.

    Args:
      layer: the adapter that is made. `layer.base` may be replaced by another base.
      shapes: as in `initial`.
      init: as in `LoRALinear`.
      dtype: what the parts will be held in.
      rngs: as in `LoRALinear`.
    """
    return self.initial(rngs.params(), shapes, layer.is_embed)

  def room(self, layer: Any) -> Arrays:
    """The parts as they started, where `start` took what they add out of the base; or nothing."""
    return {}

  def difference(
    self, parts: Arrays, room: Arrays, rank: int, alpha: float, use_rslora: bool
  ) -> tuple[Arrays, int, float]:
    """Parts, rank and alpha of the adapter that adds what `parts` add and `room` did not."""
    raise NotImplementedError

  def looked_up(self, parts: Arrays, take: Callable[[Any], Any]) -> Arrays:
    """The parts for some rows of an embedding, which `take` picks from an array's first axis."""
    rows = {part.name for part in self.parts(True) if part.axes[0] == "in"}
    return {name: take(value) if name in rows else value for name, value in parts.items()}

  def product(self, parts: Arrays, x: jax.Array) -> jax.Array:
    """What is added to the output for inputs (..., in), the scale multiplied in already."""
    return x @ self.delta(parts, jnp.matmul)

  def apply(self, layer: Any, x: Any, y: Any, added: Any, dropped: Any, sharding: Any) -> jax.Array:
    """The layer's output.

    Args:
      layer: the `LoRALinear` or `LoRAEmbed`.
      x: its input.
      y: the base's output.
      added: that of `product`.
      dropped: the input with some of it zeroed, if dropout is on.
      sharding: keyword arguments for another call of the base.
    """
    return y + added

  def factor(self, parts: Arrays, norm: Any) -> Any:
    """What each output's weights, of that norm, are multiplied by, if `normed`."""
    raise NotImplementedError

  def bias(self, parts: Arrays) -> Any:
    """The part that is added to the bias when merged, or None."""
    return None


def check_settings(variant: Variant, use_rslora: bool, dropout: float) -> None:
  """Refuses settings that this kind of adapter has not, in PEFT or for want of a place."""
  if not any(part.scaled for part in variant.parts(False)):
    raise ValueError(
      f"`variant` {variant!r} has no part that is `scaled`: it would compute with a scale of 1, "
      "and be merged with alpha / rank. Set it on one of the parts that are multiplied."
    )
  for key, value in {"use_rslora": use_rslora, "lora_dropout": dropout}.items():
    if value and variant.peft_keys.get(key, key) is None:
      raise ValueError(
        f"`{key.removeprefix('lora_')}` is {value!r}, and {type(variant).__name__} has none in "
        "PEFT. Leave it out."
      )


def matrix(a: jax.Array, b: jax.Array) -> jax.Array:
  """A B as a matrix (..., out, in), in float32: the `dot` of weights that are held so."""
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return jnp.einsum("...ir,...ro->...oi", a, b, precision="highest")
