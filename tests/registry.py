"""The transformations that keep the laws, and what the tests of the laws share.

A new transformation is covered by a line in `REGISTRY`.
"""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import optax_lowmem as lowmem
from optax_lowmem._programs.phases import in_phases
from optax_lowmem._state.moments import is_quantized
from optax_lowmem._update import tile_loop as _stream
from programs import times_compiled

LR = 1e-2


@dataclasses.dataclass(frozen=True)
class Entry:
  """One transformation with so many bits.

  Attributes:
    rule: its name in `optax_lowmem`, or in optax: then it is wrapped in `quantized`.
    bits: bits a moment.
    first: moments with a sign.
    second: positive moments.
    error: how far updates may lie from optax's after four random gradients: the mean distance, as
      a part of the mean update; a quarter above what was measured. Of Lion's signs, a few flip.
    arguments: further arguments of the rule.
    norms: whether an update depends on the whole array, by a norm or by rows and columns. One bad
      element is then all of its array's, in float32 too; only the state is kept from it.
    peak: most temporaries, in bytes a parameter. A norm takes a pass of its own, and what is made
      of it is held, until the moment is made of that; in a chain also what came before.
    factored: how many rows and columns of float32 there are besides, and below two axes a float32
      moment.
    wrapper: the key in `WRAPPERS` of what is around it, of optax's rule too. Parameters are
      bfloat16 then, but where it accumulates gradients.
  """

  rule: str
  bits: Literal[4, 8]
  first: int
  second: int
  error: float
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
  norms: bool = False
  peak: float = 0.1
  factored: int = 0
  wrapper: str | None = None

  @property
  def moments(self) -> int:
    return self.first + self.second

  @property
  def dtype(self) -> Any:
    """Of parameters."""
    return jnp.float32 if self.wrapper is None or self.accumulates else jnp.bfloat16

  @property
  def accumulates(self) -> bool:
    """Whether each second gradient makes a step. A sum in codes is counted as a moment."""
    return self.wrapper in SUMS

  def bytes(self, shape: tuple[int, ...]) -> float:
    """Most bytes a parameter: codes, and a scale of 4 bytes for 64 elements or more."""
    quantized = self.moments * (self.bits / 8 + 4 / 64)
    if self.wrapper is not None:
      quantized += BESIDE[self.wrapper] + 4 / math.prod(shape)  # and a step taken
    if not self.factored:
      return quantized
    if len(shape) < 2:  # and a number in the place of each row and column
      return quantized + 4 + 8 * self.factored / math.prod(shape)
    return quantized + 4 * self.factored * (1 / shape[-1] + 1 / shape[-2])

  @property
  def is_optax(self) -> bool:
    return hasattr(optax, self.rule) or hasattr(contrib, self.rule)

  @property
  def theirs(self) -> Callable[..., optax.GradientTransformation]:
    """Optax's; of what optax does not have, our own with float32 state."""
    if self.accumulates:
      return lambda *args, **kwargs: lowmem.multi_steps(self._theirs(*args, **kwargs), 2, bits=32)
    return self._wrapped(self._theirs)

  @property
  def ours(self) -> Callable[..., optax.GradientTransformationExtraArgs]:
    return self._wrapped(self._ours)

  def _wrapped(self, rule):
    if self.wrapper is None:
      return rule
    wrapper = WRAPPERS[self.wrapper]
    return lambda *args, **kwargs: wrapper(rule(*args, **kwargs))

  @property
  def _theirs(self) -> Callable[..., optax.GradientTransformation]:
    if not self.is_optax:
      return functools.partial(getattr(lowmem, self.rule), bits=32, **self.arguments)
    rule = getattr(optax, self.rule, None) or getattr(contrib, self.rule)
    return functools.partial(rule, **self.arguments)

  @property
  def _ours(self) -> Callable[..., optax.GradientTransformationExtraArgs]:
    if hasattr(lowmem, self.rule):
      return functools.partial(getattr(lowmem, self.rule), bits=self.bits, **self.arguments)

    def hold(lr: Any, bits: Any = self.bits, **storage: Any) -> Any:
      return lowmem.quantized(self._theirs(lr), bits, **storage)

    return hold


WRAPPERS = {
  "masters": lambda tx: lowmem.master_weights(tx),
  "masters8": lambda tx: lowmem.master_weights(tx, bits=8),
  "rounding": lambda tx: lowmem.stochastic_rounding(tx, seed=3),
  "sums8": lambda tx: lowmem.multi_steps(tx, 2, bits=8),
  "sums16": lambda tx: lowmem.multi_steps(tx, 2, bits=16),
}
SUMS = ("sums8", "sums16")
# Bytes a parameter that are not in codes: of remainders, or sums.
BESIDE = {"masters": 2, "masters8": 1, "rounding": 0, "sums8": 0, "sums16": 2}
FACTORED = {"momentum": 0.9, "min_dim_size_to_factor": 3}

# rule, bits, moments with a sign, without one, error
ENTRIES = [
  Entry("adam", 8, 1, 1, 0.0205),
  Entry("adamw", 8, 1, 1, 0.0205),
  Entry("lion", 8, 1, 0, 0.0025),
  Entry("sgd", 8, 1, 0, 0.017, {"momentum": 0.9}),
  Entry("rmsprop", 8, 0, 1, 0.0064),
  Entry("adagrad", 8, 0, 1, 0.0064),
  Entry("ademamix", 8, 2, 1, 0.0205),
  Entry("adamw", 4, 1, 1, 0.25),
  Entry("lion", 4, 1, 0, 0.0205),
  Entry("sgd", 4, 1, 0, 0.206, {"momentum": 0.9}),
  Entry("ademamix", 4, 2, 1, 0.25),
  Entry("adabelief", 8, 1, 1, 0.0207),
  Entry("nadam", 8, 1, 1, 0.0143),
  Entry("amsgrad", 8, 1, 2, 0.02),
  Entry("adan", 8, 3, 1, 0.0213),
  Entry("adopt", 8, 1, 1, 0.0153),
  Entry("lamb", 8, 1, 1, 0.0205, norms=True, peak=4.1),
  Entry("lamb", 4, 1, 1, 0.25, norms=True, peak=4.1),
  Entry("lars", 8, 1, 0, 0.017, norms=True, peak=8.1),
  Entry("adafactor", 8, 1, 0, 0.017, FACTORED, norms=True, peak=8.1, factored=1),
  Entry("adafactor", 4, 1, 0, 0.206, FACTORED, norms=True, peak=8.1, factored=1),
  Entry("came", 8, 1, 0, 0.017, norms=True, peak=4.1, factored=2),
  Entry("came", 4, 1, 0, 0.206, norms=True, peak=4.1, factored=2),
]
REGISTRY = {f"{e.rule}-{e.bits}": e for e in ENTRIES}
# Wrappers of bfloat16 parameters around representatives, for the laws that are asked of all of
# `LAWFUL`. An update from one rounded master to the next has the errors of both. What is around a
# rule that takes norms has a parameter in float32, and noise for it, before and after.
WRAPPED = {
  f"{wrapper}-{name}": dataclasses.replace(
    REGISTRY[name],
    wrapper=wrapper,
    error=REGISTRY[name].error * (1 if wrapper == "rounding" else 2.5),
    peak=8.1 if wrapper == "masters8" and REGISTRY[name].norms else REGISTRY[name].peak,
  )
  for wrapper, name in [
    ("masters", "adamw-8"),
    ("masters8", "adamw-8"),
    ("rounding", "adamw-8"),
    ("masters", "lion-4"),
    ("masters", "came-8"),
    ("masters8", "came-8"),
    ("rounding", "adamw-4"),
  ]
}
# On a CPU, sums of 16 bits are copied: tests/test_multi_steps.py.
WRAPPED["sums8-adamw-8"] = dataclasses.replace(
  REGISTRY["adamw-8"], wrapper="sums8", first=2, error=0.012
)
WRAPPED["sums16-adamw-8"] = dataclasses.replace(
  REGISTRY["adamw-8"], wrapper="sums16", error=0.0082, peak=2.1
)
LAWFUL = REGISTRY | WRAPPED
lawful = pytest.mark.parametrize("name", LAWFUL)
every = pytest.mark.parametrize("name", REGISTRY)
every_rule = pytest.mark.parametrize(
  "name", {e.rule: n for n, e in REGISTRY.items() if e.is_optax}.values()
)
# What one bad element does to a sum, and to the step that it ends, is in test_multi_steps.py: of
# `optax.MultiSteps`, which they are compared with, updates are NaN between steps as well.
LOCAL = [n for n, e in LAWFUL.items() if not e.norms and not e.accumulates]
every_local = pytest.mark.parametrize("name", LOCAL)
# Some of each kind, for what is compiled once more: the laws of updates in phases.
PHASED = ["adamw-8", "amsgrad-8", "lion-4", "came-8", "lamb-8", "lars-8", "adafactor-8"]
# And one for each kind of state: where a law is asked of every wrapper, and in runs with `--few`.
REPRESENTATIVES = [*PHASED, "adamw-4"]
BY_PHASES = [*PHASED, "masters-adamw-8", "rounding-adamw-8"]
# Of these, those of which every run asks all laws; of the others, `-m thorough` does.
ALWAYS = ["adamw-8", "lion-4", "came-8", "masters-adamw-8"]


def by_method(names):
  """Every entry as a whole and by tiles, and some in phases; by tiles, most are slow tests."""
  cases = [(name, "whole") for name in names]
  cases += [(name, "tiles") for name in names]
  cases += [(name, "phases") for name in names if name in BY_PHASES]
  return pytest.mark.parametrize(("name", "how"), cases)


every_normed = pytest.mark.parametrize("name", [n for n, e in REGISTRY.items() if e.norms])
adamw = pytest.mark.parametrize("name", ["adamw-8", "adamw-4"])

# One leaf with blocks along its last axis, one with blocks of several rows, one with a short last
# block, a convolution, and three that stay dense.
SHAPES = {
  "big": (60, 128),
  "lora": (512, 16),
  "ragged": (67, 97),
  "kernel": (3, 3, 8, 64),
  "small": (7,),
  "no": (),
  "o": (0, 3),
}
STORED = ("big", "lora", "ragged", "kernel")


def make(name, lr=LR, **kwargs):
  return LAWFUL[name].ours(lr, **kwargs)


def reference(name, lr=LR):
  return LAWFUL[name].theirs(lr)


def tree(seed, scale=1.0, dtype=jnp.float32, shapes=SHAPES):
  normal = np.random.default_rng(seed).standard_normal
  return {k: jnp.asarray(scale * normal(shape), dtype) for k, shape in shapes.items()}


def quantized_leaves(state):
  return [x for x in jax.tree.leaves(state, is_leaf=is_quantized) if is_quantized(x)]


@contextlib.contextmanager
def small_tiles():
  """What is traced within walks arrays in tiles of a thousand elements."""
  whole, smallest = _stream.WHOLE, _stream._SMALLEST
  _stream.WHOLE = _stream._SMALLEST = 1024
  try:
    yield
  finally:
    _stream.WHOLE, _stream._SMALLEST = whole, smallest


@contextlib.contextmanager
def by_rows():
  """What `offloaded` runs on a GPU, run on a CPU, which else evaluates all at once."""
  platform_dependent = jax.lax.platform_dependent

  def choose(*args, cpu, **others):
    if cpu.__name__ == "at_once":
      return others["default"](*args)
    return platform_dependent(*args, cpu=cpu, **others)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.lax, "platform_dependent", choose)
    yield


TRACES = collections.Counter()  # how often the updates of `update_of` were traced


@functools.cache
def update_of(name, how):
  """The compiled update of an entry, for trees of `SHAPES`.

  "whole"; by "tiles"; in "phases", as a GPU computes it where there is no kernel; or "optax"'s.
  """
  tx = reference(name) if how == "optax" else make(name)

  def update(grads, state, params):
    TRACES[name, how] += 1
    with small_tiles() if how == "tiles" else contextlib.nullcontext():
      if how == "phases":
        return in_phases(tx.update, grads, state, params)
      return tx.update(grads, state, params)

  return jax.jit(update)


@functools.cache
def start(name, how):
  """Parameters, and the state that an entry makes of them."""
  params = tree(0, dtype=LAWFUL[name].dtype)
  return params, (reference(name) if how == "optax" else make(name)).init(params)


def run(name, steps, how="whole", gradients=lambda t: tree(100 + t)) -> Any:
  """The last updates and state after a few steps of `gradients`, at the same parameters."""
  params, state = start(name, how)
  updates = None
  for t in range(steps):
    updates, state = update_of(name, how)(gradients(t), state, params)
  return updates, state


def trained_nnx(tx):
  """The losses of eight steps of an NNX model, and its optimizer's state."""
  nnx = pytest.importorskip("flax.nnx")
  model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  x = jnp.ones((4, 64))

  @nnx.jit
  def step(model, optimizer):
    loss, g = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2))(model)
    optimizer.update(model, g)
    return loss

  return [float(step(model, optimizer)) for _ in range(8)], nnx.state(optimizer)


def trained_linen(tx):
  """The losses of eight steps of a Linen model, its train state, and how often they compiled."""
  linen = pytest.importorskip("flax.linen")
  train_state = pytest.importorskip("flax.training.train_state")
  model, x = linen.Dense(128), jnp.ones((4, 64))
  params = model.init(jax.random.key(0), x)
  state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
  state = state.replace(step=jnp.int32(0))  # flax's is a Python number at first

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state):
    def loss(params):
      return jnp.mean((state.apply_fn(params, x) - 1) ** 2)

    value, g = jax.value_and_grad(loss)(state.params)
    return value, state.apply_gradients(grads=g)

  losses = []
  for _ in range(8):
    value, state = step(state)
    losses.append(float(value))
  return losses, state, times_compiled(step)
