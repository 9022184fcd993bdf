"""What `reproduce.py` trains: a language model on real text, and a classifier of digits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import train

IMAGES = 64  # of a batch of digits
HELD = 297  # of the 1,797 digits


@dataclasses.dataclass(frozen=True)
class Task:
  """Something to learn.

  Attributes:
    name: of the task.
    steps: how many.
    init: makes the parameters of a key.
    loss: of parameters and a batch.
    data: of a seed: batches of all steps, stacked, and those that are held out.
    measures: names and functions of the parameters, what is held out, and the last held-out loss.
    rates: the largest learning rate of each rule.
  """

  name: str
  steps: int
  init: Callable[[jax.Array], Any]
  loss: Callable[[Any, Any], jax.Array]
  data: Callable[[int], tuple[Any, Any]]
  measures: dict[str, Callable[[Any, Any, float], float]]
  rates: dict[str, float]


# Half of the best rate that `reproduce.py --sweep` finds for a small language model in 200 steps;
# at the best, training is chaotic. Between widths of a rule nothing differs but the storage.
RATES = {
  "adamw": 4e-3,
  "lion": 1.2e-3,
  "sgd": 0.1,
  "rmsprop": 4e-3,
  "adagrad": 0.04,
  "ademamix": 4e-3,
  "lamb": 5e-3,
  "lars": 4.0,
  "adafactor": 4e-3,
  "came": 1.5e-4,
}


def language(steps: int, width: int, layers: int) -> Task:
  """The transformer of train.py and its text; of width 160 and 3 layers, 1.02 M parameters."""

  @functools.cache
  def texts():
    return train.text()

  def data(seed):
    learn, held = texts()
    return train.batches(learn, steps, seed), train.batches(held, 64, seed=10_000)

  def perplexity(params, held, loss):
    del params, held
    return float(np.exp(loss))

  init = functools.partial(train.init, width=width, layers=layers)
  measures = {"perplexity of a byte": perplexity}
  return Task("language", steps, init, train.loss_of, data, measures, RATES)


def digits(steps: int) -> Task:
  """Convolutions and dense layers, 151,000 parameters, on scikit-learn's 8 × 8 digits."""
  from sklearn.datasets import load_digits  # pip install 'optax_lowmem[benchmarks]'

  source: Any = load_digits()
  images = (source.images / 16.0).astype(np.float32)[..., None]
  labels = source.target.astype(np.int32)
  order = np.random.default_rng(0).permutation(len(labels))
  learn, held = order[HELD:], order[:HELD]

  def init(key):
    keys = jax.random.split(key, 4)
    shapes = {"near": (3, 3, 1, 32), "far": (3, 3, 32, 64), "dense": (1024, 128), "head": (128, 10)}
    return {
      name: jax.random.normal(k, shape) * np.sqrt(2 / np.prod(shape[:-1]))
      for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

  def logits(params, images):
    x = images
    for name, stride in (("near", 1), ("far", 2)):
      x = jax.lax.conv_general_dilated(
        x, params[name], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
      )
      x = jax.nn.relu(x)
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["dense"])
    return x @ params["head"]

  def loss(params, batch):
    images, labels = batch
    each = optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels)
    return each.mean()

  def data(seed):
    drawn = np.random.default_rng(seed).choice(learn, (steps, IMAGES))
    return (images[drawn], labels[drawn]), (images[held][None], labels[held][None])

  def right(params, held, _):
    images, labels = (x[0] for x in held)
    return 100 * float(jnp.mean(jnp.argmax(logits(params, images), -1) == labels))

  return Task("digits", steps, init, loss, data, {"right, %": right}, RATES)


def task(name: str, quick: bool) -> Task:
  """That of this name; a `quick` one is smaller and shorter."""
  if name == "language":
    return language(80, 64, 2) if quick else language(400, 160, 3)
  return digits(80) if quick else digits(400)
